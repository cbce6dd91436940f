"""Writes the demo workflows, each twice, from one description: `python workflows/build.py`.

`<name>.json` is what the page opens: it knows where the nodes stand. `api/<name>.json` is what the server runs. Made
from the same list of nodes, the two cannot drift apart; `tests/test_workflows.py` checks that these files are what this
script writes and, against a running ComfyUI, that the first converts to the second.

`python workflows/build.py --pictures DIR` also makes their thumbnails and the portrait that they start from, out of
what `quickstart.py demo --out DIR` wrote.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PICTURE = "sphereguide_portrait.png"  # lies beside the workflows, for a person to drop on Load Image


@dataclass(frozen=True)
class Type:
    """The sockets of a node type, in the order in which ComfyUI shows them. Widgets are in `Node.widgets`."""

    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


TYPES = {
    "BasicScheduler": Type({"model": "MODEL"}, {"SIGMAS": "SIGMAS"}),
    "CLIPTextEncode": Type({"clip": "CLIP"}, {"CONDITIONING": "CONDITIONING"}),
    "EmptyLatentImage": Type({}, {"LATENT": "LATENT"}),
    "KSamplerSelect": Type({}, {"SAMPLER": "SAMPLER"}),
    "LoadImage": Type({}, {"IMAGE": "IMAGE", "MASK": "MASK"}),
    "PreviewImage": Type({"images": "IMAGE"}),
    "SamplerCustom": Type(
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "sampler": "SAMPLER",
            "sigmas": "SIGMAS",
            "latent_image": "LATENT",
        },
        {"output": "LATENT", "denoised_output": "LATENT"},
    ),
    "SaveImage": Type({"images": "IMAGE"}),
    "VAEDecode": Type({"samples": "LATENT", "vae": "VAE"}, {"IMAGE": "IMAGE"}),
    "SphereGuideDSG": Type(
        {"sampler": "SAMPLER", "loss": "GUIDANCE_LOSS", "vae": "VAE"},
        {"sampler": "SAMPLER", "trace": "GUIDANCE_TRACE"},
    ),
    "SphereGuideDegradeImage": Type({"image": "IMAGE"}, {"image": "IMAGE", "mask": "MASK"}),
    "SphereGuideGaussianDeblurLoss": Type({"image": "IMAGE"}, {"loss": "GUIDANCE_LOSS"}),
    "SphereGuideInpaintingLoss": Type({"image": "IMAGE", "mask": "MASK"}, {"loss": "GUIDANCE_LOSS"}),
    "SphereGuideReport": Type(
        {"samples": "LATENT", "trace": "GUIDANCE_TRACE"}, {"samples": "LATENT", "report": "IMAGE"}
    ),
    "SphereGuideSuperResolutionLoss": Type({"image": "IMAGE"}, {"loss": "GUIDANCE_LOSS"}),
    "SphereGuideToyPortraits": Type({}, {"MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"}),
    "Note": Type(),
    "Reroute": Type({"": "*"}, {"": "*"}),
}
NOT_RUN = {"Note", "Reroute"}  # live in the page only
# Widgets that the page adds behind one that the server knows, with the value they get.
PAGE_WIDGETS = {"seed": "fixed", "noise_seed": "fixed", "image": "image"}

PROPERTIES = {"Note": {}, "Reroute": {"showOutputText": False, "horizontal": False}}
OURS = {"color": "#233", "bgcolor": "#355"}
NOTE = {"color": "#432", "bgcolor": "#653"}


@dataclass(frozen=True)
class Node:
    """One node. Widgets are in ComfyUI's order; each wire comes from (the name of a node, one of its outputs)."""

    type: str
    at: tuple[int, int]
    size: tuple[int, int]
    widgets: dict[str, Any] = field(default_factory=dict)
    wires: dict[str, tuple[str, str]] = field(default_factory=dict)
    title: str = ""


@dataclass(frozen=True)
class Group:
    title: str
    bounding: tuple[int, int, int, int]
    color: str


@dataclass(frozen=True)
class Workflow:
    """Nodes by name, in the order of their ids, which is an order in which they can run."""

    nodes: dict[str, Node]
    groups: list[Group]

    def api(self) -> dict[str, Any]:
        """The workflow as the server's /prompt takes it."""
        ids = self.ids()
        origins = {
            name: {key: self.origin(wire) for key, wire in node.wires.items()} for name, node in self.nodes.items()
        }
        return {
            str(ids[name]): {
                "class_type": node.type,
                "inputs": {
                    **node.widgets,
                    **{key: [str(ids[source]), self.slot(source, out)] for key, (source, out) in origins[name].items()},
                },
                "_meta": {"title": node.title or node.type},
            }
            for name, node in self.nodes.items()
            if node.type not in NOT_RUN
        }

    def origin(self, wire: tuple[str, str]) -> tuple[str, str]:
        """Where a wire really comes from: what lies behind its reroutes."""
        while self.nodes[wire[0]].type == "Reroute":
            wire = self.nodes[wire[0]].wires[""]
        return wire

    def ui(self) -> dict[str, Any]:
        """The workflow as the page opens it."""
        ids = self.ids()
        wires = [(name, key, wire) for name, node in self.nodes.items() for key, wire in node.wires.items()]
        links = [
            [
                number,
                ids[wire[0]],
                self.slot(*wire),
                ids[name],
                list(TYPES[self.nodes[name].type].inputs).index(key),
                self.kind(self.origin(wire)),
            ]
            for number, (name, key, wire) in enumerate(wires, 1)
        ]
        return {
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [self.ui_node(name, links) for name in self.nodes],
            "links": links,
            "groups": [
                {"title": group.title, "bounding": list(group.bounding), "color": group.color, "font_size": 24}
                for group in self.groups
            ],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def ui_node(self, name: str, links: list[list[Any]]) -> dict[str, Any]:
        node, node_id = self.nodes[name], self.ids()[name]
        values = []
        for key, value in node.widgets.items():
            values.append(value)
            if key in PAGE_WIDGETS:
                values.append(PAGE_WIDGETS[key])
        return {
            "id": node_id,
            "type": node.type,
            "pos": list(node.at),
            "size": {"0": node.size[0], "1": node.size[1]},
            "flags": {},
            "order": node_id - 1,
            "mode": 0,
            "inputs": [
                {
                    "name": key,
                    "type": kind,
                    "link": next((link[0] for link in links if link[3:5] == [node_id, slot]), None),
                }
                for slot, (key, kind) in enumerate(TYPES[node.type].inputs.items())
            ],
            "outputs": [
                {
                    "name": key,
                    "type": kind,
                    "links": [link[0] for link in links if link[1:3] == [node_id, slot]],
                    "shape": 3,
                    "slot_index": slot,
                }
                for slot, (key, kind) in enumerate(TYPES[node.type].outputs.items())
            ],
            **({"title": node.title} if node.title else {}),
            "properties": PROPERTIES.get(node.type, {"Node name for S&R": node.type}),
            "widgets_values": values,
            **(NOTE if node.type == "Note" else OURS if node.type.startswith("SphereGuide") else {}),
        }

    def ids(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.nodes, 1)}

    def slot(self, name: str, output: str) -> int:
        return list(TYPES[self.nodes[name].type].outputs).index(output)

    def kind(self, wire: tuple[str, str]) -> str:
        return TYPES[self.nodes[wire[0]].type].outputs[wire[1]]


def restoration(
    name: str,
    operator: str,
    loss: str,
    loss_widgets: dict[str, Any],
    guidance_rate: float,
    steps: int,
    note: str,
) -> Workflow:
    """Degrades a portrait in a known way, and guides a model that never learnt restoration to undo that."""
    measured = {"image": ("degrade", "image")}
    if loss == "SphereGuideInpaintingLoss":
        measured["mask"] = ("degrade", "mask")
    nodes = {
        "note": Node("Note", (0, 0), (320, 560), {"text": paragraphs(note + HOW_TO)}, title="What this does"),
        # The model; its VAE runs along the bottom.
        "toy": Node("SphereGuideToyPortraits", (380, 0), (250, 70), title="Load Toy Portraits"),
        "vae": Node("Reroute", (720, 1040), (75, 26), {}, {"": ("toy", "VAE")}),
        "vae of guidance": Node("Reroute", (1380, 1040), (75, 26), {}, {"": ("vae", "")}),
        "vae of result": Node("Reroute", (2420, 1040), (75, 26), {}, {"": ("vae of guidance", "")}),
        "positive": Node(
            "CLIPTextEncode", (760, 180), (300, 100), {"text": ""}, {"clip": ("toy", "CLIP")}, "Prompt (may be empty)"
        ),
        "negative": Node(
            "CLIPTextEncode", (760, 335), (300, 100), {"text": ""}, {"clip": ("toy", "CLIP")}, "Negative prompt"
        ),
        # The picture
        "picture": Node("LoadImage", (380, 540), (250, 340), {"image": PICTURE}, title="Original picture"),
        "degrade": Node(
            "SphereGuideDegradeImage",
            (760, 540),
            (300, 300),
            {
                "operator": operator,
                "mask_fraction": 0.5,
                "factor": 4,
                "kernel_size": 61,
                "sigma": 3.0,
                "noise": 0.025,
                "seed": 1,
                "length": 9.0,
                "angle": 0.0,
            },
            {"image": ("picture", "IMAGE")},
            "Degrade Image",
        ),
        # Guidance
        "degraded": Node(
            "PreviewImage", (1130, 760), (300, 240), {}, {"images": ("degrade", "image")}, "Degraded picture"
        ),
        "loss": Node(loss, (1130, 640), (300, 80), loss_widgets, measured),
        "select": Node("KSamplerSelect", (1130, 540), (300, 60), {"sampler_name": "euler_ancestral"}, title="Sampler"),
        "dsg": Node(
            "SphereGuideDSG",
            (1520, 540),
            (300, 230),
            {
                "guidance_rate": guidance_rate,
                "interval": 1,
                "start_percent": 0.0,
                "end_percent": 1.0,
                "gradient": "full",
                "checkpointing": False,
            },
            {"sampler": ("select", "SAMPLER"), "loss": ("loss", "loss"), "vae": ("vae of guidance", "")},
            "DSG Guidance",
        ),
        # Sampling
        "schedule": Node(
            "BasicScheduler",
            (1520, 250),
            (300, 110),
            {"scheduler": "normal", "steps": steps, "denoise": 1.0},
            {"model": ("toy", "MODEL")},
            "Steps",
        ),
        "latent": Node("EmptyLatentImage", (1520, 850), (300, 110), {"width": 128, "height": 128, "batch_size": 1}),
        "sample": Node(
            "SamplerCustom",
            (1900, 0),
            (300, 442),  # with the preview that the page puts into it
            {"add_noise": True, "noise_seed": 7, "cfg": 1.0},
            {
                "model": ("toy", "MODEL"),
                "positive": ("positive", "CONDITIONING"),
                "negative": ("negative", "CONDITIONING"),
                "sampler": ("dsg", "sampler"),
                "sigmas": ("schedule", "SIGMAS"),
                "latent_image": ("latent", "LATENT"),
            },
            "Sample",
        ),
        # The result
        "report": Node(
            "SphereGuideReport",
            (2270, 540),
            (230, 60),
            {},
            {"samples": ("sample", "output"), "trace": ("dsg", "trace")},
            "Guidance Report",
        ),
        "decode": Node(
            "VAEDecode", (2560, 540), (200, 60), {}, {"samples": ("report", "samples"), "vae": ("vae of result", "")}
        ),
        "save": Node(
            "SaveImage",
            (2830, 250),
            (300, 350),
            {"filename_prefix": f"sphereguide/{name}"},
            {"images": ("decode", "IMAGE")},
            "Guided picture",
        ),
        "curves": Node(
            "PreviewImage", (2560, 680), (570, 280), {}, {"images": ("report", "report")}, "How guidance went"
        ),
    }
    groups = [
        Group("Model and prompt", (360, -80, 720, 530), "#3f789e"),
        Group("A picture, degraded in a known way", (360, 460, 720, 450), "#88A"),
        Group("Guidance: the loss steers the sampler", (1110, 460, 730, 560), "#8A8"),
        Group("Sampling", (1500, -80, 720, 530), "#A88"),
        Group("Result", (2250, 170, 900, 810), "#b06634"),
    ]
    return Workflow(nodes, groups)


HOW_TO = f"""
Drop {PICTURE}, which lies beside this workflow, on Load Image, and queue.

Turn these:
- guidance_rate (DSG Guidance) is the strength. At 0 you see what the model paints on its own with this seed. Too high,
and the noise of the measurement shows.
- steps (Steps): more steps match the measurement more closely.
- noise_seed (Sample): another answer that fits the same measurement.
- The prompts may stay empty. With cfg above 1 they join in, at twice the time.

How guidance went: the loss should fall over the steps.

Your own picture: a portrait of 128 x 128 pixels. Another size needs the same width and height in Empty Latent Image."""


def paragraphs(text: str) -> str:
    """Text whose lines were broken for the source, with its paragraphs and list entries on one line each."""
    return re.sub(r"(?<!\n)\n(?!\n|- )", " ", text).strip()


WORKFLOWS = {
    "toy_inpainting": restoration(
        "inpainting",
        "inpainting",
        "SphereGuideInpaintingLoss",
        {},
        guidance_rate=0.3,
        steps=30,
        note="""
Half of the pixels are missing, one by one at random, and there is noise on the rest. The model only knows how to paint
portraits; nobody taught it to repair them. Inpainting Loss measures how far each estimate is from the pixels that are
known, and DSG Guidance turns the sampler's noise so that the result agrees with them.
""",
    ),
    "toy_super_resolution": restoration(
        "super_resolution",
        "super-resolution",
        "SphereGuideSuperResolutionLoss",
        {"factor": 4},
        guidance_rate=0.2,
        steps=30,
        note="""
The portrait is scaled down to 32 x 32 pixels, with noise. The model only knows how to paint portraits;
nobody taught it to enlarge them. Super-Resolution Loss scales each estimate down in the same way and compares, and DSG
Guidance turns the sampler's noise so that the result agrees. Set the same factor in Degrade Image and in the loss.
""",
    ),
    "toy_deblur": restoration(
        "deblur",
        "gaussian blur",
        "SphereGuideGaussianDeblurLoss",
        {"kernel_size": 61, "sigma": 3.0},
        guidance_rate=0.2,
        steps=30,
        note="""
The portrait is blurred (sigma 3 pixels), with noise. The model only knows how to paint portraits; nobody taught it to
sharpen them. Gaussian Deblur Loss blurs each estimate in the same way and compares, and DSG Guidance turns the noise of
the sampler so that the result agrees. Set the same kernel_size and sigma in Degrade Image and in the loss.
""",
    ),
}


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


SHOWN = 1  # which of the demo's portraits


def thumbnail(name: str, demo: Path) -> None:
    """Degraded beside guided."""
    from PIL import Image

    pair = Image.new("RGB", (512, 256))
    for column, stage in enumerate(("degraded", "guided")):
        with Image.open(demo / name / f"{SHOWN}_{stage}.png") as picture:
            nearest = picture.width < 128  # the small picture of super-resolution shows its pixels
            resample = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
            pair.paste(picture.convert("RGB").resize((256, 256), resample), (256 * column, 0))
    pair.save(HERE / f"{name}.jpg", quality=88)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="what quickstart.py demo wrote")
    options = parser.parse_args()
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if options.pictures:
        shutil.copy(options.pictures / f"portrait_{SHOWN}.png", HERE / PICTURE)
        for name in WORKFLOWS:
            thumbnail(name, options.pictures)


if __name__ == "__main__":
    main()
