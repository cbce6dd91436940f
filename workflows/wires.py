"""How the wires of a workflow run on the page: which cross, and which pass behind a node."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

Point = tuple[float, float]
TITLE, SLOT, POINTS = 30, 20, 24


def curves(workflow: dict[str, Any]) -> Iterator[tuple[list[Any], list[Point]]]:
    """Each wire with its curve: a spline that leaves and enters level, as the page draws it."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link in workflow["links"]:
        _, source, out, target, into, _ = link
        (x0, y0), (x1, y1) = socket(nodes[source], out, nodes[source]["size"]["0"]), socket(nodes[target], into, 0)
        bend = 0.25 * ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        xs, ys = (x0, x0 + bend, x1 - bend, x1), (y0, y0, y1, y1)
        curve = []
        for i in range(POINTS + 1):
            t = i / POINTS
            weights = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
            curve.append(tuple(sum(w * v for w, v in zip(weights, axis, strict=True)) for axis in (xs, ys)))
        yield link, curve


def socket(node: dict[str, Any], slot: int, right: float) -> Point:
    x, y = node["pos"]
    return x + right, y + (13 if node["type"] == "Reroute" else 14 + SLOT * slot)


def crossings(workflow: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Pairs of wires that cross. Those of one output are one wire."""
    return [
        (a, b)
        for (a, one), (b, other) in combinations(curves(workflow), 2)
        if a[1:3] != b[1:3] and any(cross(*s, *t) for s in pairwise(one) for t in pairwise(other))
    ]


def cross(a: Point, b: Point, c: Point, d: Point) -> bool:
    def side(p: Point, q: Point, r: Point) -> float:
        return (r[1] - p[1]) * (q[0] - p[0]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


def behind(workflow: dict[str, Any]) -> list[tuple[Any, str]]:
    """Wires that pass behind a node that is neither of their ends."""
    found = []
    for link, curve in curves(workflow):
        for node in workflow["nodes"]:
            (left, top), size = node["pos"], node["size"]
            right, bottom = left + size["0"], top + size["1"]
            top -= 0 if node["type"] == "Reroute" else TITLE
            if node["id"] not in (link[1], link[3]) and any(left < x < right and top < y < bottom for x, y in curve):
                found.append((link, node.get("title", node["type"])))
    return found
