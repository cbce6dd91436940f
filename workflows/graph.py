"""The format of the workflows: nodes, wires and groups, as the page opens them and as the server runs them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
    "EmptySD3LatentImage": Type({}, {"LATENT": "LATENT"}),
    "ImageScale": Type({"image": "IMAGE"}, {"IMAGE": "IMAGE"}),
    "KSamplerSelect": Type({}, {"SAMPLER": "SAMPLER"}),
    "LoadImage": Type({}, {"IMAGE": "IMAGE", "MASK": "MASK"}),
    "MaskComposite": Type({"destination": "MASK", "source": "MASK"}, {"MASK": "MASK"}),
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
    "SolidMask": Type({}, {"MASK": "MASK"}),
    "VAEEncode": Type({"pixels": "IMAGE", "vae": "VAE"}, {"LATENT": "LATENT"}),
    "VAEDecode": Type({"samples": "LATENT", "vae": "VAE"}, {"IMAGE": "IMAGE"}),
    "SphereGuideDSG": Type(
        {"sampler": "SAMPLER", "loss": "GUIDANCE_LOSS", "vae": "VAE"},
        {"sampler": "SAMPLER", "trace": "GUIDANCE_TRACE"},
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
            "ratio_schedule": "EPSILON_SCHEDULE",
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
    "SphereGuideSegmentationTarget": Type(
        {"mask": "MASK", "target": "SEGMENTATION_TARGET"}, {"target": "SEGMENTATION_TARGET"}
    ),
    "SphereGuideStyleGramLoss": Type(
        {"style": "IMAGE", "open_clip_model": "OPEN_CLIP_MODEL", "vgg": "VGG_FEATURES"}, {"loss": "GUIDANCE_LOSS"}
    ),
    "SphereGuideSuperResolutionLoss": Type({"image": "IMAGE"}, {"loss": "GUIDANCE_LOSS"}),
    "SphereGuideSweep": Type({}, {"value": "FLOAT", "whole": "INT"}),
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
                self.sockets(name).index(key),
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
                    "type": TYPES[node.type].inputs.get(key) or self.kind(node.wires[key]),
                    "link": next((link[0] for link in links if link[3:5] == [node_id, slot]), None),
                    **({} if key in TYPES[node.type].inputs else {"widget": {"name": key}}),
                }
                for slot, key in enumerate(self.sockets(name))
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

    def sockets(self, name: str) -> list[str]:
        """The inputs of a node, and behind them those of its widgets that a wire goes into."""
        inputs = TYPES[self.nodes[name].type].inputs
        return [*inputs, *(key for key in self.nodes[name].wires if key not in inputs)]

    def slot(self, name: str, output: str) -> int:
        return list(TYPES[self.nodes[name].type].outputs).index(output)

    def kind(self, wire: tuple[str, str]) -> str:
        return TYPES[self.nodes[wire[0]].type].outputs[wire[1]]
