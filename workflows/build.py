"""Writes the demo workflows, each twice, from one description: `python workflows/build.py`.

`<name>.json` is what the page opens: it knows where the nodes stand. `api/<name>.json` is what the server runs. Made
from the same list of nodes, the two cannot drift apart; `tests/test_workflows.py` checks that these files are what this
script writes and, against a running ComfyUI, that the first converts to the second.

It also draws the pictures that they start from. `python workflows/build.py --pictures DIR` makes their thumbnails too,
out of what `quickstart.py demo --out DIR` wrote.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# These lie beside the workflows, for a person to drop on Load Image.
PICTURE = "sphereguide_portrait.png"
MAP = "sphereguide_map.png"
STYLE = "sphereguide_style.png"
STEPS = 20


@dataclass(frozen=True)
class Type:
    """The sockets of a node type, in the order in which ComfyUI shows them. Widgets are in `Node.widgets`."""

    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


TYPES = {
    "BasicScheduler": Type({"model": "MODEL"}, {"SIGMAS": "SIGMAS"}),
    "CLIPTextEncode": Type({"clip": "CLIP"}, {"CONDITIONING": "CONDITIONING"}),
    "CheckpointLoaderSimple": Type({}, {"MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"}),
    "ConditioningCombine": Type(
        {"conditioning_1": "CONDITIONING", "conditioning_2": "CONDITIONING"}, {"CONDITIONING": "CONDITIONING"}
    ),
    "EmptyLatentImage": Type({}, {"LATENT": "LATENT"}),
    "KSamplerSelect": Type({}, {"SAMPLER": "SAMPLER"}),
    "LoadImage": Type({}, {"IMAGE": "IMAGE", "MASK": "MASK"}),
    "LatentBatch": Type({"samples1": "LATENT", "samples2": "LATENT"}, {"LATENT": "LATENT"}),
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
    "VAEEncode": Type({"pixels": "IMAGE", "vae": "VAE"}, {"LATENT": "LATENT"}),
    "VAEDecode": Type({"samples": "LATENT", "vae": "VAE"}, {"IMAGE": "IMAGE"}),
    "SphereGuideDSG": Type(
        {"sampler": "SAMPLER", "loss": "GUIDANCE_LOSS", "vae": "VAE"},
        {"sampler": "SAMPLER", "trace": "GUIDANCE_TRACE"},
    ),
    "SphereGuideKSampler": Type(
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "loss": "GUIDANCE_LOSS",
            "vae": "VAE",
        },
        {"latent": "LATENT", "trace": "GUIDANCE_TRACE"},
    ),
    "SphereGuideAMEDLoad": Type({}, {"predictor": "AMED_PREDICTOR", "about": "STRING"}),
    "SphereGuideAMEDSampler": Type({"predictor": "AMED_PREDICTOR"}, {"sampler": "SAMPLER"}),
    "SphereGuideAMEDSave": Type({"predictor": "AMED_PREDICTOR"}),
    "SphereGuideAMEDScheduler": Type(
        {
            "predictor": "AMED_PREDICTOR",
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent": "LATENT",
        },
        {"sigmas": "SIGMAS"},
    ),
    "SphereGuideAMEDTrain": Type(
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT"},
        {"predictor": "AMED_PREDICTOR", "curves": "IMAGE", "report": "STRING"},
    ),
    "SphereGuideCLIPTextLoss": Type({"open_clip_model": "OPEN_CLIP_MODEL"}, {"loss": "GUIDANCE_LOSS"}),
    "SphereGuideCombineLosses": Type(
        {f"loss_{number}": "GUIDANCE_LOSS" for number in (1, 2, 3, 4)}, {"loss": "GUIDANCE_LOSS"}
    ),
    "SphereGuideDegradeImage": Type({"image": "IMAGE"}, {"image": "IMAGE", "mask": "MASK"}),
    "SphereGuideDrawToyPortraits": Type({}, {"images": "IMAGE"}),
    "SphereGuideEpsilonScaling": Type(
        {"sampler": "SAMPLER", "epsilon_schedule": "EPSILON_SCHEDULE"}, {"sampler": "SAMPLER"}
    ),
    "SphereGuideEpsilonScalingCalibrate": Type(
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "sampler": "SAMPLER",
            "sigmas": "SIGMAS",
            "latents": "LATENT",
        },
        {
            "b": "FLOAT",
            "k": "FLOAT",
            "epsilon_schedule": "EPSILON_SCHEDULE",
            "curves": "IMAGE",
            "verdict": "STRING",
        },
    ),
    "SphereGuideFaceIDLoss": Type({"face_encoder": "FACE_ENCODER", "image": "IMAGE"}, {"loss": "GUIDANCE_LOSS"}),
    "SphereGuideGaussianDeblurLoss": Type({"image": "IMAGE"}, {"loss": "GUIDANCE_LOSS"}),
    "SphereGuideInpaintingLoss": Type({"image": "IMAGE", "mask": "MASK"}, {"loss": "GUIDANCE_LOSS"}),
    "SphereGuideLoadFaceEncoder": Type({}, {"face_encoder": "FACE_ENCODER"}),
    "SphereGuideLoadOpenCLIP": Type({}, {"open_clip_model": "OPEN_CLIP_MODEL"}),
    "SphereGuideLoadSegmentationModel": Type({}, {"segmentation_model": "SEGMENTATION_MODEL", "labels": "STRING"}),
    "SphereGuideReport": Type(
        {"samples": "LATENT", "trace": "GUIDANCE_TRACE"},
        {"samples": "LATENT", "report": "IMAGE", "summary": "STRING"},
    ),
    "SphereGuideSegmentationLoss": Type(
        {
            "segmentation_model": "SEGMENTATION_MODEL",
            "color_map": "IMAGE",
            "mask": "MASK",
            "target": "SEGMENTATION_TARGET",
            "region": "MASK",
        },
        {"loss": "GUIDANCE_LOSS"},
    ),
    "SphereGuideStyleGramLoss": Type(
        {"style": "IMAGE", "open_clip_model": "OPEN_CLIP_MODEL", "vgg": "VGG_FEATURES"}, {"loss": "GUIDANCE_LOSS"}
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


def guidance(rate: float) -> dict[str, Any]:
    """The widgets that DSG Guidance and KSampler (DSG Guided) share."""
    return {
        "guidance_rate": rate,
        "interval": 1,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "gradient": "full",
        "checkpointing": False,
        "rate_steps": 50,
        "recurrence": 0,
        "recurrence_start": 0.0,
        "recurrence_end": 1.0,
        "decode_scale": 1.0,
    }


def prompts(positive: str = "") -> dict[str, Node]:
    title = "Prompt" if positive else "Prompt (may be empty)"
    wire = {"clip": ("toy", "CLIP")}
    return {
        "positive": Node("CLIPTextEncode", (760, 180), (300, 100), {"text": positive}, wire, title),
        "negative": Node("CLIPTextEncode", (760, 335), (300, 100), {"text": ""}, wire, "Negative prompt"),
    }


def steered(
    name: str,
    condition: dict[str, Node],
    what: str,
    note: str,
    guidance_rate: float,
    prompt: str = "",
    cfg: float = 1.0,
    floor: int = 1040,
) -> Workflow:
    """The model samples from `prompt`, and DSG Guidance steers it by the node called "loss" of `condition`.

    `condition` is what makes that loss, in x from 380 to 1430 and in y from 540 (the loss: from 640) to `floor`, where
    the VAE's wire runs. `what` is the title of its group.
    """
    nodes = {
        "note": Node("Note", (0, 0), (320, 560), {"text": paragraphs(note)}, title="What this does"),
        "toy": Node("SphereGuideToyPortraits", (380, 0), (250, 70), title="Load Toy Portraits"),
        "vae": Node("Reroute", (720, floor), (75, 26), {}, {"": ("toy", "VAE")}),
        "vae of guidance": Node("Reroute", (1380, floor), (75, 26), {}, {"": ("vae", "")}),
        "vae of result": Node("Reroute", (2420, floor), (75, 26), {}, {"": ("vae of guidance", "")}),
        **prompts(prompt),
        **condition,
        # Guidance
        "select": Node("KSamplerSelect", (1130, 540), (300, 60), {"sampler_name": "euler_ancestral"}, title="Sampler"),
        "dsg": Node(
            "SphereGuideDSG",
            (1520, 540),
            (300, 340),
            guidance(guidance_rate),
            {"sampler": ("select", "SAMPLER"), "loss": ("loss", "loss"), "vae": ("vae of guidance", "")},
            "DSG Guidance",
        ),
        # Sampling
        "schedule": Node(
            "BasicScheduler",
            (1520, 250),
            (300, 110),
            {"scheduler": "normal", "steps": STEPS, "denoise": 1.0},
            {"model": ("toy", "MODEL")},
            "Steps",
        ),
        "latent": Node("EmptyLatentImage", (1520, 60), (300, 110), {"width": 128, "height": 128, "batch_size": 1}),
        "sample": Node(
            "SamplerCustom",
            (1900, 0),
            (300, 442),  # with the preview that the page puts into it
            {"add_noise": True, "noise_seed": 7, "cfg": cfg},
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
            (2270, 680),
            (270, 280),
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
        Group(what, (360, 460, 720, floor - 590), "#88A"),
        Group("Guidance: the loss steers the sampler", (1110, 460, 730, 560), "#8A8"),
        Group("Sampling", (1500, -80, 720, 530), "#A88"),
        Group("Result", (2250, 170, 900, 810), "#b06634"),
    ]
    return Workflow(nodes, groups)


def restoration(
    name: str,
    operator: str,
    loss: str,
    loss_widgets: dict[str, Any],
    guidance_rate: float,
    note: str,
) -> Workflow:
    """Degrades a portrait in a known way, and guides a model that never learnt restoration to undo that."""
    measured = {"image": ("degrade", "image")}
    if loss == "SphereGuideInpaintingLoss":
        measured["mask"] = ("degrade", "mask")
    condition = {
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
        "degraded": Node(
            "PreviewImage", (1130, 760), (300, 240), {}, {"images": ("degrade", "image")}, "Degraded picture"
        ),
        "loss": Node(loss, (1130, 640), (300, 80), loss_widgets, measured),
    }
    return steered(name, condition, "A picture, degraded in a known way", note + RESTORATION, guidance_rate)


TOY = "toy_portraits/"  # the folder in which each loader finds the network that comes with the demo


def open_clip(y: int = 540, x: int = 760) -> Node:
    return Node("SphereGuideLoadOpenCLIP", (x, y), (300, 90), {"model": TOY, "dtype": "fp32"})


def text_loss(at: tuple[int, int], text: str) -> Node:
    widgets = {
        "text": text,
        "negative_text": "",
        "negative_weight": 0.5,
        "distance": "spherical",
        "cutouts": 4,
        "min_size": 0.5,
        "max_size": 1.0,
        "augment": True,
    }
    return Node("SphereGuideCLIPTextLoss", at, (300, 350), widgets, {"open_clip_model": ("clip", "open_clip_model")})


def picture_of(title: str, picture: str, y: int = 540) -> Node:
    return Node("LoadImage", (380, y), (250, 340), {"image": picture}, title=title)


def by_style() -> dict[str, Node]:
    layers = {"clip_layers": "3", "vgg_layers": "relu1_1, relu2_1, relu3_1, relu4_1, relu5_1", "vgg_size": 256}
    wires = {"style": ("style", "IMAGE"), "open_clip_model": ("clip", "open_clip_model")}
    return {
        "style": picture_of("Picture of the style", STYLE),
        "clip": open_clip(),
        "loss": Node("SphereGuideStyleGramLoss", (1130, 640), (300, 180), layers, wires),
    }


def segmentation_loader(y: int = 540, x: int = 760) -> Node:
    widgets = {"name": TOY, "architecture": "from the file name"}
    return Node("SphereGuideLoadSegmentationModel", (x, y), (300, 100), widgets)


def segmentation_loss(at: tuple[int, int]) -> Node:
    widgets = {"class_name": "", "colors": "", "tolerance": 8, "unlabelled": ""}
    wires = {"segmentation_model": ("segmenter", "segmentation_model"), "color_map": ("map", "IMAGE")}
    return Node("SphereGuideSegmentationLoss", at, (300, 290), widgets, wires)


def face_loader(y: int = 540, x: int = 760) -> Node:
    return Node("SphereGuideLoadFaceEncoder", (x, y), (300, 90), {"name": TOY, "embedding": "output"})


def face_loss(at: tuple[int, int]) -> Node:
    """In the box in which the face encoder of Toy Portraits learnt to look: `FACE_BOX` of demo/portraits.py."""
    widgets = {
        "references": "average",
        "crop": "fixed box",
        "detect_every": 5,
        "margin": 0.1,
        "box_left": 0.2,
        "box_top": 0.26,
        "box_right": 0.8,
        "box_bottom": 0.86,
        "distance": "euclidean",
    }
    wires = {"face_encoder": ("encoder", "face_encoder"), "image": ("face", "IMAGE")}
    return Node("SphereGuideFaceIDLoss", at, (300, 310), widgets, wires)


def sweep(name: str, condition: dict[str, Node], rates: tuple[float, ...], note: str) -> Workflow:
    """One seed at each of the strengths, side by side. `condition` makes the node "loss", like that of `steered`."""
    samplers, batches = {}, {}
    last = len(rates) - 1
    for i, rate in enumerate(rates):
        samplers[f"sample {i}"] = Node(
            "SphereGuideKSampler",
            (1520 + 340 * i, 0),
            (300, 560),
            {
                "seed": 7,
                "steps": STEPS,
                "cfg": 1.0,
                "sampler_name": "euler_ancestral",
                "scheduler": "normal",
                "denoise": 1.0,
                **guidance(rate),
            },
            {
                "model": ("toy", "MODEL"),
                "positive": ("positive", "CONDITIONING"),
                "negative": ("negative", "CONDITIONING"),
                "latent_image": ("latent", "LATENT"),
                "loss": ("loss", "loss"),
                "vae": ("vae of guidance", ""),
            },
            f"Strength {rate:g}",
        )
        if i:
            before = ("sample 0", "latent") if i == 1 else (f"batch {i - 1}", "LATENT")
            wires = {"samples1": before, "samples2": (f"sample {i}", "latent")}
            batches[f"batch {i}"] = Node("LatentBatch", (1520 + 340 * i, 700), (300, 60), {}, wires)
    right = 1520 + 340 * len(rates)
    nodes = {
        "note": Node("Note", (0, 0), (320, 560), {"text": paragraphs(note)}, title="What this does"),
        "toy": Node("SphereGuideToyPortraits", (380, 0), (250, 70), title="Load Toy Portraits"),
        "vae": Node("Reroute", (720, 1040), (75, 26), {}, {"": ("toy", "VAE")}),
        "vae of guidance": Node("Reroute", (1430, 1040), (75, 26), {}, {"": ("vae", "")}),
        "vae of result": Node("Reroute", (right - 100, 1040), (75, 26), {}, {"": ("vae of guidance", "")}),
        **prompts(),
        "latent": Node("EmptyLatentImage", (1130, 335), (300, 110), {"width": 128, "height": 128, "batch_size": 1}),
        **condition,
        **samplers,
        **batches,
        "decode": Node(
            "VAEDecode",
            (right, 700),
            (200, 60),
            {},
            {"samples": (f"batch {last}", "LATENT"), "vae": ("vae of result", "")},
        ),
        "save": Node(
            "SaveImage",
            (right, 0),
            (620, 560),
            {"filename_prefix": f"sphereguide/{name}"},
            {"images": ("decode", "IMAGE")},
            "From no guidance to too much",
        ),
    }
    groups = [
        Group("Model and prompt", (360, -80, 1090, 530), "#3f789e"),
        Group("What to steer by", (360, 460, 1090, 560), "#88A"),
        Group("One seed at rising strength", (1500, -80, 340 * len(rates), 660), "#8A8"),
        Group("Side by side", (1840, 620, 340 * len(rates) + 500, 170), "#b06634"),
    ]
    return Workflow(nodes, groups)


def calibration(note: str) -> dict[str, Node]:
    """A model, its recipe of 10 Euler steps, and what Calibrate Epsilon Scaling finds for it; x up to 1490."""
    return {
        "note": Node("Note", (0, 0), (320, 560), {"text": paragraphs(note)}, title="What this does"),
        "toy": Node("SphereGuideToyPortraits", (380, 0), (250, 70), title="Load Toy Portraits"),
        "real": Node(
            "SphereGuideDrawToyPortraits", (380, 540), (250, 90), {"first": 0, "count": 32}, title="Real images"
        ),
        **prompts(),
        "encode": Node(
            "VAEEncode", (760, 540), (200, 60), {}, {"pixels": ("real", "images"), "vae": ("toy", "VAE")}, "Latents"
        ),
        "select": Node("KSamplerSelect", (1130, 0), (300, 60), {"sampler_name": "euler"}, title="Sampler"),
        "schedule": Node(
            "BasicScheduler",
            (1130, 130),
            (300, 110),
            {"scheduler": "normal", "steps": 10, "denoise": 1.0},
            {"model": ("toy", "MODEL")},
            "Steps",
        ),
        "calibrate": Node(
            "SphereGuideEpsilonScalingCalibrate",
            (1130, 540),
            (360, 440),
            {"cfg": 1.0, "samples": 32, "batch_size": 16, "calibration_seed": 0, "from_images": False},
            {
                "model": ("toy", "MODEL"),
                "positive": ("positive", "CONDITIONING"),
                "negative": ("negative", "CONDITIONING"),
                "sampler": ("select", "SAMPLER"),
                "sigmas": ("schedule", "SIGMAS"),
                "latents": ("encode", "LATENT"),
            },
            "Calibrate Epsilon Scaling",
        ),
    }


CALIBRATION = (
    Group("Model and prompt", (360, -80, 720, 530), "#3f789e"),
    Group("What real images look like", (360, 460, 720, 200), "#88A"),
    Group("The recipe", (1110, -80, 400, 340), "#8A8"),
    Group("What it needs", (1110, 460, 400, 540), "#b06634"),
)


def calibrate(name: str, note: str) -> Workflow:
    """The measurement alone, with its plot."""
    save = Node(
        "SaveImage",
        (1600, 0),
        (1000, 420),
        {"filename_prefix": f"sphereguide/{name}"},
        {"images": ("calibrate", "curves")},
        "What was measured",
    )
    groups = [*CALIBRATION, Group("Before and after", (1580, -80, 1040, 520), "#A88")]
    return Workflow({**calibration(note), "save": save}, groups)


Wire = tuple[str, str]


def sampling(at: tuple[int, int], cfg: float, sampler: Wire, sigmas: Wire, title: str) -> Node:
    return Node(
        "SamplerCustom",
        at,
        (300, 442),
        {"add_noise": True, "noise_seed": 7, "cfg": cfg},
        {
            "model": ("toy", "MODEL"),
            "positive": ("positive", "CONDITIONING"),
            "negative": ("negative", "CONDITIONING"),
            "sampler": sampler,
            "sigmas": sigmas,
            "latent_image": ("latent", "LATENT"),
        },
        title,
    )


def compared(name: str, runs: dict[str, tuple[Wire, Wire]], title: str) -> dict[str, Node]:
    """The same seeds through three (sampler, sigmas), from x = 1980 on, and their pictures in one batch."""
    nodes = {
        f"sample {place}": sampling((1980 + 340 * place, 0), 1.0, *wires, title)
        for place, (title, wires) in enumerate(runs.items())
    }
    for place in (1, 2):
        before = ("sample 0", "output") if place == 1 else ("batch 1", "LATENT")
        nodes[f"batch {place}"] = Node(
            "LatentBatch",
            (1980 + 340 * place, 560),
            (300, 60),
            {},
            {"samples1": before, "samples2": (f"sample {place}", "output")},
        )
    nodes["decode"] = Node(
        "VAEDecode", (3020, 560), (200, 60), {}, {"samples": ("batch 2", "LATENT"), "vae": ("vae of result", "")}
    )
    nodes["save"] = Node(
        "SaveImage",
        (3280, 0),
        (640, 560),
        {"filename_prefix": f"sphereguide/{name}"},
        {"images": ("decode", "IMAGE")},
        title,
    )
    return nodes


def side_by_side(name: str, b: float, note: str) -> Workflow:
    """The same seeds without correction, with a uniform one, and with what the calibration found."""
    settings = {"start_percent": 0.0, "end_percent": 1.0}
    nodes = {
        **calibration(note),
        "vae": Node("Reroute", (900, 1040), (75, 26), {}, {"": ("toy", "VAE")}),
        "vae of result": Node("Reroute", (2700, 1040), (75, 26), {}, {"": ("vae", "")}),
        "latent": Node("EmptyLatentImage", (1600, 0), (300, 110), {"width": 128, "height": 128, "batch_size": 4}),
        "uniform": Node(
            "SphereGuideEpsilonScaling",
            (1600, 240),
            (300, 210),
            {"schedule": "uniform", "b": b, "k": 0.0, **settings},
            {"sampler": ("select", "SAMPLER")},
            "Uniform",
        ),
        "measured": Node(
            "SphereGuideEpsilonScaling",
            (1600, 540),
            (300, 210),
            {"schedule": "measured", "b": 1.0, "k": 0.0, **settings},
            {"sampler": ("select", "SAMPLER"), "epsilon_schedule": ("calibrate", "epsilon_schedule")},
            "Calibrated",
        ),
    }
    steps = ("schedule", "SIGMAS")
    off, uniform, measured = ("select", "SAMPLER"), ("uniform", "sampler"), ("measured", "sampler")
    runs = {"Off": (off, steps), "Uniform": (uniform, steps), "Calibrated": (measured, steps)}
    nodes |= compared(name, runs, "Off, uniform, calibrated: four of each")
    nodes["curves"] = Node(
        "PreviewImage", (1980, 720), (640, 280), {}, {"images": ("calibrate", "curves")}, "What was measured"
    )
    groups = [
        *CALIBRATION,
        Group("Correction", (1580, 160, 340, 620), "#b58b2a"),
        Group("The same seeds", (1960, -80, 1020, 540), "#8A8"),
        Group("Side by side", (3000, -80, 940, 720), "#A88"),
    ]
    return Workflow(nodes, groups)


def few_calls(name: str, note: str) -> Workflow:
    """A learned solver beside a stock one of as many model calls, and of fifty."""
    model = ("toy", "MODEL")
    nodes = {
        "note": Node("Note", (0, 0), (320, 560), {"text": paragraphs(note)}, title="What this does"),
        "toy": Node("SphereGuideToyPortraits", (380, 0), (250, 70), title="Load Toy Portraits"),
        **prompts("comic portrait of a smiling person with long red hair, wearing round glasses, teal background"),
        "latent": Node("EmptyLatentImage", (1130, 0), (300, 110), {"width": 128, "height": 128, "batch_size": 4}),
        "load": Node(
            "SphereGuideAMEDLoad",
            (1130, 240),
            (300, 90),
            {"name": "toy_portraits_ipndm_6.safetensors"},
            title="Predictor",
        ),
        "amed sigmas": Node(
            "SphereGuideAMEDScheduler",
            (1580, 0),
            (300, 130),
            {"points": "base"},
            {"predictor": ("load", "predictor"), "model": model},
            "Its steps",
        ),
        "amed": Node("SphereGuideAMEDSampler", (1580, 240), (300, 60), {}, {"predictor": ("load", "predictor")}),
        "select": Node("KSamplerSelect", (1580, 480), (300, 60), {"sampler_name": "dpmpp_2m"}, title="Stock sampler"),
        "six": Node(
            "BasicScheduler",
            (1580, 620),
            (300, 110),
            {"scheduler": "sgm_uniform", "steps": 6, "denoise": 1.0},
            {"model": model},
            "Six steps",
        ),
        "fifty": Node(
            "BasicScheduler",
            (1580, 800),
            (300, 110),
            {"scheduler": "karras", "steps": 50, "denoise": 1.0},
            {"model": model},
            "Fifty steps",
        ),
        "vae": Node("Reroute", (900, 1040), (75, 26), {}, {"": ("toy", "VAE")}),
        "vae of result": Node("Reroute", (2700, 1040), (75, 26), {}, {"": ("vae", "")}),
        **compared(
            name,
            {
                "AMED, 6 calls": (("amed", "sampler"), ("amed sigmas", "sigmas")),
                "Stock, 6 calls": (("select", "SAMPLER"), ("six", "SIGMAS")),
                "Stock, 50 calls": (("select", "SAMPLER"), ("fifty", "SIGMAS")),
            },
            "AMED with 6 calls, stock with 6, stock with 50: four of each",
        ),
    }
    groups = [
        Group("Model and prompt", (360, -80, 720, 530), "#3f789e"),
        Group("What was learnt", (1110, -80, 360, 430), "#b06634"),
        Group("Learned solver", (1560, -80, 340, 400), "#b58b2a"),
        Group("Stock sampler", (1560, 400, 340, 530), "#88A"),
        Group("The same seeds", (1960, -80, 1020, 540), "#8A8"),
        Group("Side by side", (3000, -80, 940, 720), "#A88"),
    ]
    return Workflow(nodes, groups)


def taught(
    name: str, model: dict[str, Node], size: int, settings: dict[str, Any], called: str, prompt: Wire, note: str
) -> Workflow:
    """Trains a predictor, saves it, and draws with it. `model` has the nodes "toy", "positive" and "negative"."""
    training = {
        "cfg": 1.0,
        "student": "ipndm",
        "steps": 3,
        "schedule": "polynomial",
        "rho": 0.0,
        "afs": False,
        "max_order": 4,
        "scale_dir": 0.1,
        "scale_time": 0.3,
        "teacher": "ipndm",
        "teacher_points": 4,
        "trajectories": 128,
        "epochs": 3,
        "batch_size": 16,
        "objective": "endpoint",
        "learning_rate": 0.02,
        "training_seed": 0,
        "name": called,
        "checkpointing": False,
        **settings,
    }
    nodes = {
        "note": Node("Note", (0, 0), (320, 560), {"text": paragraphs(note)}, title="What this does"),
        **model,
        "latent": Node("EmptyLatentImage", (1130, 0), (300, 110), {"width": size, "height": size, "batch_size": 4}),
        "train": Node(
            "SphereGuideAMEDTrain",
            (1130, 240),
            (360, 720),
            training,
            {
                "model": ("toy", "MODEL"),
                "positive": prompt,
                "negative": ("negative", "CONDITIONING"),
                "latent": ("latent", "LATENT"),
            },
        ),
        "keep": Node(
            "SphereGuideAMEDSave", (1600, 0), (300, 60), {"name": called}, {"predictor": ("train", "predictor")}
        ),
        "curves": Node("PreviewImage", (1600, 560), (640, 300), {}, {"images": ("train", "curves")}, "How it learnt"),
        "sigmas": Node(
            "SphereGuideAMEDScheduler",
            (1600, 190),
            (300, 130),
            {"points": "base"},
            {"predictor": ("train", "predictor"), "model": ("toy", "MODEL")},
            "Its steps",
        ),
        "amed": Node("SphereGuideAMEDSampler", (1600, 400), (300, 60), {}, {"predictor": ("train", "predictor")}),
        "sample": sampling((1960, 0), training["cfg"], ("amed", "sampler"), ("sigmas", "sigmas"), "Few model calls"),
        "decode": Node("VAEDecode", (2320, 0), (200, 60), {}, {"samples": ("sample", "output"), "vae": ("toy", "VAE")}),
        "save": Node(
            "SaveImage",
            (2580, 0),
            (500, 500),
            {"filename_prefix": f"sphereguide/{name}"},
            {"images": ("decode", "IMAGE")},
            "Drawn with it",
        ),
    }
    groups = [
        Group("Model and prompt", (360, -80, 720, 1060), "#3f789e"),
        Group("Learning", (1110, -80, 400, 1060), "#b06634"),
        Group("What was learnt", (1580, -80, 340, 560), "#b58b2a"),
        Group("In use", (1940, -80, 1160, 600), "#8A8"),
    ]
    return Workflow(nodes, groups)


def checkpoint() -> dict[str, Node]:
    """A real checkpoint, three prompts that take turns, and a negative one."""
    texts = {
        "positive": "portrait photo of an old fisherman, soft light",
        "second": "a mountain lake at dawn, pine forest, oil painting",
        "third": "a red vintage car in a narrow street, rain",
        "negative": "blurry, low quality",
    }
    nodes = {
        "toy": Node(
            "CheckpointLoaderSimple",
            (380, 0),
            (300, 100),
            {"ckpt_name": "v1-5-pruned-emaonly.safetensors"},
            title="Checkpoint",
        )
    }
    for place, (key, text) in enumerate(texts.items()):
        title = "Negative prompt" if key == "negative" else f"Prompt {place + 1}"
        nodes[key] = Node(
            "CLIPTextEncode", (380, 180 + 155 * place), (300, 100), {"text": text}, {"clip": ("toy", "CLIP")}, title
        )
    for place, key in enumerate(("second", "third")):
        before = ("positive" if place == 0 else "prompts 0", "CONDITIONING")
        nodes[f"prompts {place}"] = Node(
            "ConditioningCombine",
            (750, 260 + 155 * place),
            (250, 60),
            {},
            {"conditioning_1": before, "conditioning_2": (key, "CONDITIONING")},
            "Take turns",
        )
    return nodes


RESTORATION = f"""
Drop {PICTURE}, which lies beside this workflow, on Load Image, and queue.

Turn these:
- guidance_rate (DSG Guidance) is the strength. At 0 you see what the model paints on its own with this seed. Too high,
and the noise of the measurement shows.
- steps (Steps): more steps match the measurement more closely.
- noise_seed (Sample): another answer that fits the same measurement.
- The prompts may stay empty. With cfg above 1 they join in, at twice the time.

How guidance went: the loss should fall over the steps.

Your own picture: a portrait of 128 x 128 pixels. Another size needs the same width and height in Empty Latent Image."""

STEERING = """
Turn these:
- guidance_rate (DSG Guidance) is the strength. At 0 you see what the model paints on its own with this seed. Too high,
and the picture pleases the network that judges it more than it pleases you.
- steps (Steps): more steps give guidance more turns.
- noise_seed (Sample): another picture that fits.

How guidance went: the loss should fall over the steps.

With your own checkpoint: put a network that was trained on photos in place of the Toy Portraits one, in its loader."""


def drop(*pairs: tuple[str, str]) -> str:
    """Which picture belongs on which Load Image."""
    places = " and ".join(f"{picture} on {title}" for picture, title in pairs)
    return f"\nDrop {places}, from the folder of this workflow, and queue.\n"


def paragraphs(text: str) -> str:
    """Text whose lines were broken for the source, with its paragraphs and list entries on one line each."""
    return re.sub(r"(?<!\n)\n(?!\n|- )", " ", text).strip()


WORKFLOWS = {
    "toy_inpainting": restoration(
        "inpainting",
        "inpainting",
        "SphereGuideInpaintingLoss",
        {},
        guidance_rate=0.2,
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
        guidance_rate=0.14,
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
        guidance_rate=0.14,
        note="""
The portrait is blurred (sigma 3 pixels), with noise. The model only knows how to paint portraits; nobody taught it to
sharpen them. Gaussian Deblur Loss blurs each estimate in the same way and compares, and DSG Guidance turns the noise of
the sampler so that the result agrees. Set the same kernel_size and sigma in Degrade Image and in the loss.
""",
    ),
    "toy_clip_text": steered(
        "clip_text",
        {
            "clip": open_clip(),
            "loss": text_loss((1130, 640), "a person with red hair, yellow clothes, teal background"),
        },
        "The network that judges",
        """
The prompt is empty. CLIP Text Loss asks an open_clip model how well each estimate agrees with the text in it, and DSG
Guidance turns the sampler's noise so that the picture agrees better. This works with models that know no text at all.

Queue, then change the text. Parts of it are joined by | and weighed: red hair | glasses:0.5
"""
        + STEERING,
        guidance_rate=0.1,
    ),
    "toy_segmentation": steered(
        "segmentation",
        {
            "map": picture_of("Map of colours", MAP),
            "segmenter": segmentation_loader(),
            "loss": segmentation_loss((1130, 640)),
        },
        "What shall be where",
        """
A map says what shall be where, in colours that stand for hair, skin, clothes and so on. Segmentation Loss asks a
network that names the class of each pixel how far each estimate is from that map, and DSG Guidance turns the sampler's
noise so that the picture agrees.
"""
        + drop((MAP, "Map of colours"))
        + STEERING,
        guidance_rate=0.1,
    ),
    "toy_style": steered(
        "style",
        by_style(),
        "A style",
        """
Style Gram Loss compares which features of a network go together in each estimate, wherever they lie, with those of a
picture: its colours and textures, not its subject. DSG Guidance turns the sampler's noise so that they agree.
"""
        + drop((STYLE, "Picture of the style"))
        + STEERING,
        guidance_rate=0.2,
    ),
    "toy_text_style": steered(
        "text_style",
        by_style(),
        "A style",
        """
The prompt says what to paint, and cfg sees to it as always; the style comes from a picture, through Style Gram Loss.
The two don't know of each other: guidance adds to any workflow that samples.
"""
        + drop((STYLE, "Picture of the style"))
        + STEERING,
        guidance_rate=0.2,
        prompt="a laughing person with long hair, wearing square glasses",
        cfg=3.0,
    ),
    "toy_faceid": steered(
        "faceid",
        {"face": picture_of("Reference face", PICTURE), "encoder": face_loader(), "loss": face_loss((1130, 640))},
        "A face",
        """
FaceID Loss asks a face recognition network how far the face of each estimate is from that of a reference, and DSG
Guidance turns the sampler's noise so that it is the same person: the shape of the face, not its hair or background.

For photos set crop to detect, which finds the face by itself. Cartoons have theirs in a fixed box.
"""
        + drop((PICTURE, "Reference face"))
        + STEERING,
        guidance_rate=0.3,
    ),
    "toy_strength_sweep": sweep(
        "strength_sweep",
        {
            "clip": open_clip(),
            "loss": text_loss((1130, 640), "a person with red hair, yellow clothes, teal background"),
        },
        (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0),
        """
The same seed seven times, with guidance_rate from 0 to 1: no guidance on the left, and on the right more than the
picture can bear. Here all that the text says is there at 0.3, and at 0.5 the face falls apart. Where that is depends on
the loss, the model, the seed and the number of steps, so sweep once for each of your recipes, and then work below it.

Turn these:
- the guidance_rate of each KSampler, to look more closely at a range.
- the loss: put any other in its place.
- seed: the same number in all of them.""",
    ),
    "toy_combined": steered(
        "combined",
        {
            "clip": open_clip(540, 380),
            "face": picture_of("Reference face", PICTURE, 1070),
            "encoder": face_loader(940, 380),
            "map": picture_of("Map of colours", MAP, 1590),
            "segmenter": segmentation_loader(1450, 380),
            "text": text_loss((760, 540), "a person with blue hair, orange background"),
            "identity": face_loss((760, 940)),
            "layout": segmentation_loss((760, 1450)),
            "loss": Node(
                "SphereGuideCombineLosses",
                (1130, 640),
                (300, 240),
                {"weight_1": 1.0, "weight_2": 1.0, "weight_3": 1.0, "weight_4": 1.0, "normalise": True},
                {"loss_1": ("text", "loss"), "loss_2": ("identity", "loss"), "loss_3": ("layout", "loss")},
            ),
        },
        "A text, a face and a layout",
        """
Three losses at once: the text says the colours, the reference who it is, the map what is where. Combine Losses gives
each its weight; with normalise on, equal weights pull equally, whatever numbers the losses give.
"""
        + drop((PICTURE, "Reference face"), (MAP, "Map of colours"))
        + STEERING,
        guidance_rate=0.2,
        floor=2070,
    ),
    "toy_epsilon_scaling": side_by_side(
        "epsilon_scaling",
        1.05,
        """
With few steps a sampler loses detail. Epsilon Scaling divides the noise that the model predicts by a number close to 1,
and gives it back. Here: four portraits of ten Euler steps without it, with the same number at each step (b), and with
what Calibrate Epsilon Scaling finds.

Queue: it measures first, for about a minute.

Turn these:
- b (Uniform): above 1 gives detail, then grain; below 1 smooths.
- steps (Steps), sampler_name (Sampler): each recipe needs a correction of its own. More steps need less.
- noise_seed in all three: other portraits.""",
    ),
    "toy_amed_sample": few_calls(
        "amed_sample",
        """
A sampler of few steps goes wrong since it asks the model at the wrong times. AMED has learnt, for this model, where
to ask. Here: four portraits of six model calls with a learned solver, of six with a stock sampler, and of fifty with
it. The first row should look like the last.

Queue.

Turn these:
- name (Predictor): toy_portraits_ipndm_4 makes four calls. Give Six steps as many.
- sampler_name and scheduler (Stock sampler): is there one that does as well?
- noise_seed in all three: other portraits.
- points (Its steps): expanded, with euler in place of AMED Sampler, is the same schedule for stock samplers.""",
    ),
    "toy_amed_train": taught(
        "amed_train",
        {
            "toy": Node("SphereGuideToyPortraits", (380, 0), (250, 70), title="Load Toy Portraits"),
            **prompts("comic portrait of a smiling person with long red hair, wearing round glasses, teal background"),
        },
        128,
        {},
        "toy_try",
        ("positive", "CONDITIONING"),
        """
Teaches a predictor for Toy Portraits: where a sampler of six model calls should ask, to come out where one of many
does. Then draws four portraits with it.

Queue: some minutes on a computer without a GPU. Cancel keeps the best so far, and queueing again goes on from there.

Turn these:
- steps (Train AMED Predictor): each is two model calls.
- trajectories and epochs: more learn better, and take longer.
- student: amed is AMED-Solver, the others are AMED-Plugin on a known solver.
- cfg: the one that you will draw with, in the sampler too.""",
    ),
    "sd15_amed_train": taught(
        "sd15_amed_train",
        checkpoint(),
        512,
        {
            "cfg": 7.0,
            "scale_dir": 0.01,
            "scale_time": 0.2,
            "schedule": "discrete",
            "trajectories": 512,
            "batch_size": 4,
        },
        "sd15_ipndm_6",
        ("prompts 1", "CONDITIONING"),
        """
Teaches a predictor for a checkpoint of Stable Diffusion 1.5: choose yours on the left. The three prompts take turns
while it learns; put kinds of pictures there that you will ask for.

Queue. It needs a GPU with much memory: turn on checkpointing, lower batch_size or set objective to each point, where
that is too little. Cancel keeps the best so far, and queueing again goes on from there.

Turn these:
- steps (Train AMED Predictor): each is two model calls, doubled by cfg as always.
- cfg: the one that you will draw with, in the sampler too. Each needs a predictor of its own.
- trajectories: the paper takes 5000.

Then: Load AMED Predictor, AMED Scheduler and AMED Sampler, as in toy_amed_sample.""",
    ),
    "toy_calibrate": calibrate(
        "calibrate",
        """
Measures which Epsilon Scaling a recipe needs: model, prompt, cfg, sampler and steps. It compares what the recipe draws
with real images, and says on the node what to use, or to leave it off.

Queue, and read the verdict on Calibrate Epsilon Scaling. On the right: how long the predicted noise is in training and
in sampling, the correction of each step, and how much detail the pictures have beside the real ones, 1 being right.

Turn these:
- sampler_name and steps: what they need differs.
- samples: more make the verdict surer, and take longer.

With your own checkpoint: VAE Encode of 32 or more pictures of the kind that your prompt asks for, in place of Draw Toy
Portraits.""",
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
    for name in WORKFLOWS if options.pictures else ():
        if (options.pictures / name).is_dir():  # not the sweep: its thumbnail is its own pictures
            thumbnail(name, options.pictures)


if __name__ == "__main__":
    main()
