"""Writes the demo workflows, each twice, from one description: `python workflows/build.py`.

`<name>.json` is what the page opens: it knows where the nodes stand. `api/<name>.json` is what the server runs. Made
from the same list of nodes, the two cannot drift apart; `tests/test_workflows.py` checks that these files are what this
script writes and, against a running ComfyUI, that the first converts to the second.

It also draws the pictures that they start from, and the thumbnails of those that need a checkpoint: what that would
draw is not known here, so they show the workflow itself. `python workflows/build.py --pictures DIR` makes thumbnails of
the others too, out of what `quickstart.py demo --out DIR` wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import checkpoints
import toys
from graph import NOT_RUN, OURS, Workflow
from layouts import MAP, PICTURE, STYLE
from wires import curves

HERE = Path(__file__).resolve().parent
WORKFLOWS = {**toys.WORKFLOWS, **checkpoints.WORKFLOWS}


def files() -> dict[Path, str]:
    """What this script writes: text by path."""
    return {
        path: json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        for name, workflow in WORKFLOWS.items()
        for path, content in [
            (HERE / f"{name}.json", workflow.ui()),
            (HERE / "api" / f"{name}.json", workflow.api()),
        ]
    }


SHOWN, STYLE_SHOWN, MAP_SHOWN = 1, 33, 38  # which of the demo's portraits


def thumbnail(name: str, demo: Path) -> None:
    """What guidance starts from beside what it makes of that: degraded, or else unguided, and guided."""
    from PIL import Image

    restored = (demo / name / f"{SHOWN}_degraded.png").exists()
    shown, before = (SHOWN, "degraded") if restored else (0, "unguided")
    pair = Image.new("RGB", (512, 256))
    for column, stage in enumerate((before, "guided")):
        with Image.open(demo / name / f"{shown}_{stage}.png") as picture:
            nearest = picture.width < 128  # the small picture of super-resolution shows its pixels
            resample = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
            pair.paste(picture.convert("RGB").resize((256, 256), resample), (256 * column, 0))
    pair.save(HERE / f"{name}.jpg", quality=88)


def card(name: str, workflow: Workflow) -> None:
    """A thumbnail that shows the workflow: its groups, nodes and wires, under its name."""
    from PIL import Image, ImageColor, ImageDraw, ImageFont

    times = 3  # drawn larger, for smooth edges
    picture = Image.new("RGB", (512 * times, 256 * times), "#1f2023")
    draw = ImageDraw.Draw(picture)
    family, what = name.split("_", 1)
    draw.text((16 * times, 8 * times), checkpoints.TITLES[what], "#eee", ImageFont.load_default(30 * times))
    label = ImageFont.load_default(22 * times)
    draw.text((496 * times, 14 * times), checkpoints.LABELS[family], "#9ab", label, anchor="ra")

    nodes = {key: node for key, node in workflow.nodes.items() if node.type not in NOT_RUN}
    bounds = [group.bounding for group in workflow.groups]
    left, top = (min(bound[axis] for bound in bounds) for axis in (0, 1))
    width, height = (max(bound[axis] + bound[axis + 2] for bound in bounds) - (left, top)[axis] for axis in (0, 1))
    scale = min(480 / width, 184 / height)
    corner = 256 - width * scale / 2, 152 - height * scale / 2

    def at(x: float, y: float) -> tuple[float, float]:
        return (corner[0] + (x - left) * scale) * times, (corner[1] + (y - top) * scale) * times

    def box(x: float, y: float, w: float, h: float) -> list[tuple[float, float]]:
        return [at(x, y), at(x + w, y + h)]

    for group in workflow.groups:
        color = ImageColor.getrgb(group.color)
        draw.rounded_rectangle(box(*group.bounding), 4 * times, tuple(34 + part // 3 for part in color))
    for link, curve in curves(workflow.ui()):
        draw.line([at(*point) for point in curve], WIRES.get(link[5], "#8a8a8a"), times)
    for node in nodes.values():
        ours = node.type.startswith("SphereGuide")
        (x, y), (w, h) = node.at, node.size
        draw.rounded_rectangle(box(x, y - 30, w, h + 30), 2 * times, OURS["bgcolor"] if ours else "#3b3b3b")
        draw.rounded_rectangle(box(x, y - 30, w, 30), 2 * times, "#5c9a9a" if ours else "#6a6a6a")
    picture.resize((512, 256), Image.Resampling.LANCZOS).save(HERE / f"{name}.jpg", quality=75)


# As the page colours them
WIRES = {
    "MODEL": "#b39ddb",
    "CLIP": "#ffd500",
    "CONDITIONING": "#ffa931",
    "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6",
    "MASK": "#81c784",
    "VAE": "#ff6e6e",
}


def draw_pictures() -> None:
    """What the workflows start from, drawn by the generator from seeds that nothing was trained on."""
    sys.path.insert(0, str(HERE.parent / "demo"))
    import portraits
    from PIL import Image

    Image.fromarray(portraits.render(portraits.DEMO_SEEDS[SHOWN])).save(HERE / PICTURE)
    Image.fromarray(portraits.render(portraits.DEMO_SEEDS[STYLE_SHOWN])).save(HERE / STYLE)
    classes = portraits.segment(portraits.DEMO_SEEDS[MAP_SHOWN])
    colours = Image.fromarray(classes, mode="P")
    colours.putpalette([channel for color in portraits.CLASS_COLORS for channel in color])
    colours.convert("RGB").save(HERE / MAP, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="what quickstart.py demo wrote")
    options = parser.parse_args()
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    draw_pictures()
    for name, workflow in checkpoints.WORKFLOWS.items():
        card(name, workflow)
    for name in WORKFLOWS if options.pictures else ():
        if (options.pictures / name).is_dir():  # not the sweep: its thumbnail is its own pictures
            thumbnail(name, options.pictures)


if __name__ == "__main__":
    main()
