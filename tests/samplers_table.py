#!/usr/bin/env python3
"""Which samplers are guided, as `test_samplers.py` saw it: `python tests/samplers_table.py` brings it to the README.

`pytest tests/test_samplers.py --samplers-table docs/samplers.json` writes what one host does into the file.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

__all__ = [
    "FILE",
    "GUIDED",
    "LEAVES_NOISE",
    "PREDICTIONS",
    "README",
    "REFUSED",
    "Results",
    "between_marks",
    "dump",
    "render",
]

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "samplers.json"
README = ROOT / "README.md"

GUIDED, LEAVES_NOISE, REFUSED = "guided", "guided, leaves noise by itself", "refused"
SYMBOLS = {GUIDED: "●", LEAVES_NOISE: "○", REFUSED: "–"}
LEGEND = (
    "● guided. ○ guided, but ComfyUI's sampler itself leaves noise in the picture of such a model, guided or not. "
    "– refused: adds no noise. Blank: not in this ComfyUI."
)

#: By their names in `comfy.model_base.ModelType`, what people call them.
PREDICTIONS = {
    "EPS": "ε",
    "V_PREDICTION": "v",
    "V_PREDICTION_DDPM": "v of CogVideoX",
    "EDM": "EDM",
    "FLOW_COSMOS": "Cosmos",
    "FLOW": "flow",
    "FLUX": "Flux",
}

#: host → sampler → prediction → one of the above
Results = dict[str, dict[str, dict[str, str]]]


def dump(results: Results) -> str:
    """A line a sampler."""
    hosts = []
    for host, samplers in sorted(results.items()):
        lines = [f"    {json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}" for name, row in samplers.items()]
        hosts.append(f"  {json.dumps(host)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(hosts) + "\n}\n"


def render(results: Results) -> str:
    """A Markdown table: a row for the samplers, a column for the predictions of a host, that fare alike."""
    samplers = list(dict.fromkeys(itertools.chain(*map(results.get, sorted(results, reverse=True)))))
    columns: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for host in sorted(results):
        for prediction, label in PREDICTIONS.items():
            cells = tuple(SYMBOLS.get(results[host].get(name, {}).get(prediction), "") for name in samplers)
            if any(cells):
                columns.setdefault((host, cells), []).append(label)
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in zip(samplers, *(cells for _, cells in columns), strict=True):
        rows.setdefault(tuple(cells), []).append(name)
    header = ["sampler", *(f"ComfyUI {host}: {', '.join(labels)}" for (host, _), labels in columns.items())]
    ordered = sorted(rows.items(), key=lambda row: ["●○– ".index(cell or " ") for cell in reversed(row[0])])
    body = [[", ".join(f"`{name}`" for name in _twins(names)), *cells] for cells, names in ordered]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *body]) + f"\n\n{LEGEND}"


def _twins(names: list[str]) -> list[str]:
    """A `_gpu` twin beside its sampler becomes a note on it."""
    return [
        f"{n}(_gpu)" if f"{n}_gpu" in names else n for n in names if n.removesuffix("_gpu") == n or n[:-4] not in names
    ]


def between_marks(text: str, table: str | None = None) -> str | None:
    """What stands between the README's marks; with `table`, the text with that there. None without marks."""
    match = re.search(r"(?<=<!-- samplers -->\n).*?(?=\n<!-- /samplers -->)", text, re.DOTALL)
    if match is None or table is None:
        return match and match[0]
    return text[: match.start()] + table + text[match.end() :]


if __name__ == "__main__":
    table = render(json.loads(FILE.read_text(encoding="utf-8")))
    changed = between_marks(README.read_text(encoding="utf-8"), table)
    if changed is None:
        print(table)
    else:
        README.write_text(changed, encoding="utf-8")
