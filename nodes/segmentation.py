"""Guidance by a segmentation map, the map's parts, and the loader of the network."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import Tensor

from ..losses.segmentation import UNLABELLED, Segmentation, from_colors, layered
from ..models import segmentation
from ..models.network import choices, models_folder, path_of, shortened
from ..models.pretrained import LoadedNetwork, class_index
from .images import from_image, from_mask
from .loss_node import LossNode

log = logging.getLogger("sphereguide")

TITLE = "Segmentation Loss"
FOLDER = "segmentation"
EMPTY = f"models/{FOLDER} is empty"
BY_NAME = "from the file name"
WHERE = (
    "Put a weights file of torchvision there, such as "
    "https://download.pytorch.org/models/lraspp_mobilenet_v3_large-d234d4ea.pth, or a folder of transformers "
    "(config.json, preprocessor_config.json, weights), such as "
    "https://huggingface.co/nvidia/segformer-b0-finetuned-ade-512-512."
)
# A label may hold commas: a pair ends with its colour.
PAIR = re.compile(r"([^=]+)=\s*#?([0-9a-fA-F]{6})(?:[\s,;]+|$)")
CLASS_TOOLTIP = (
    "What shall be there: one of the network's labels, such as hair or sky, or its number, counted from 0. The "
    "loader's labels output lists them; a name that is not there is answered with close ones."
)

models_folder(FOLDER)


class LoadSegmentationModel:
    DESCRIPTION = (
        "Loads a network that names the class of each pixel, for Segmentation Loss: a weights file of torchvision "
        "(lraspp, deeplabv3, fcn) or a folder of transformers (SegFormer and its like), in models/segmentation. "
        "Nothing is downloaded."
    )
    SEARCH_ALIASES = ["segmentation", "segformer", "deeplab", "lraspp", "semantic", "ade20k", "parsing"]
    CATEGORY = "SphereGuide/loaders"
    FUNCTION = "load"
    RETURN_TYPES = ("SEGMENTATION_MODEL", "STRING")
    RETURN_NAMES = ("segmentation_model", "labels")
    OUTPUT_TOOLTIPS = (
        "For Segmentation Loss.",
        "The names of its classes, one a line, each with its colour where the data set has known ones. For a node that "
        "shows text.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "name": (
                    choices(FOLDER) or [EMPTY],
                    {"tooltip": "A file or a folder (with / behind it) in models/segmentation."},
                ),
                "architecture": (
                    [BY_NAME, *segmentation.ARCHITECTURES],
                    {
                        "tooltip": (
                            "For a weights file of torchvision whose name does not hold its architecture. Folders say "
                            "it themselves."
                        )
                    },
                ),
            }
        }

    def load(self, name: str, architecture: str = BY_NAME) -> tuple[LoadedNetwork, str]:
        title = "Load Segmentation Model"
        path = path_of(FOLDER, name, title, WHERE)
        loaded = segmentation.load(path, None if architecture == BY_NAME else architecture, title)
        labels, palette = loaded.network.labels, loaded.network.palette
        lines = map("=".join, zip(labels, palette, strict=True)) if palette else labels
        return loaded, "\n".join(lines)


class SegmentationTarget:
    DESCRIPTION = (
        "Says what shall be under a mask, for Segmentation Loss. Connect one to another for several areas: where masks "
        "overlap, the later one counts."
    )
    SEARCH_ALIASES = ["segmentation target", "mask class", "regions", "layout"]
    CATEGORY = "SphereGuide/losses"
    FUNCTION = "add"
    RETURN_TYPES = ("SEGMENTATION_TARGET",)
    RETURN_NAMES = ("target",)
    OUTPUT_TOOLTIPS = ("For Segmentation Loss, or for the next Segmentation Target.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "mask": ("MASK", {"tooltip": "Where: more than half white counts. Stretched to the image."}),
                "class_name": ("STRING", {"default": "", "tooltip": CLASS_TOOLTIP}),
            },
            "optional": {
                "target": ("SEGMENTATION_TARGET", {"tooltip": "What is below: another Segmentation Target."}),
            },
        }

    def add(
        self, mask: Tensor, class_name: str, target: tuple[tuple[Tensor, str], ...] = ()
    ) -> tuple[tuple[tuple[Tensor, str], ...]]:
        return ((*target, (mask, class_name)),)


class SegmentationLoss(LossNode):
    DESCRIPTION = (
        "Steers towards images with the given things in the given places, as a segmentation network sees them: from a "
        "colour-coded map, one mask, or several (Segmentation Target). Cross-entropy, as in Universal Guidance, arXiv "
        "2302.07121, and DSG."
    )
    SEARCH_ALIASES = ["segmentation", "layout", "semantic map", "composition", "regions", "universal guidance"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "segmentation_model": ("SEGMENTATION_MODEL", {"tooltip": "From Load Segmentation Model."}),
                "class_name": ("STRING", {"default": "", "tooltip": f"For the mask input. {CLASS_TOOLTIP}"}),
                "colors": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": (
                            "For the color_map input: which colour means which class, as in skin=#f0be96, "
                            "hair=#784628. Empty: the colours of the network's own data set, which the loader's labels "
                            "output shows if they are known."
                        ),
                    },
                ),
                "tolerance": (
                    "INT",
                    {
                        "default": 8,
                        "min": 0,
                        "max": 128,
                        "tooltip": (
                            "How far a pixel of color_map may be from its colour, of 255 in each channel. 8 forgives a "
                            "mild JPEG. What is further from all colours has no class, like soft edges."
                        ),
                    },
                ),
                "unlabelled": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": (
                            "The class of pixels without one, such as background: what is outside of the masks then "
                            "must not show the classes inside. Empty: they are left out, and free to be anything."
                        ),
                    },
                ),
            },
            "optional": {
                "color_map": (
                    "IMAGE",
                    {"tooltip": "A picture in which each colour stands for a class. Stretched to the image."},
                ),
                "mask": (
                    "MASK",
                    {
                        "tooltip": (
                            "Where the class class_name shall be: more than half white counts. Stretched to the image. "
                            "Lies over target and color_map."
                        )
                    },
                ),
                "target": (
                    "SEGMENTATION_TARGET",
                    {"tooltip": "Several masks with a class each, from Segmentation Target. Lies over color_map."},
                ),
                "region": (
                    "MASK",
                    {"tooltip": "How much each place counts: black is left out, white counts in full."},
                ),
            },
        }

    def make(
        self,
        segmentation_model: LoadedNetwork,
        class_name: str,
        colors: str,
        tolerance: int,
        unlabelled: str,
        color_map: Tensor | None = None,
        mask: Tensor | None = None,
        target: tuple[tuple[Tensor, str], ...] = (),
        region: Tensor | None = None,
    ) -> tuple[Segmentation]:
        network = segmentation_model.network
        if mask is not None:
            target = (*target, (mask, class_name))
        elif class_name.strip():
            raise ValueError(
                f"{TITLE}: class_name is '{shortened(class_name, 200)}', and there is no mask. Connect a mask, or "
                "empty class_name."
            )
        if color_map is None and not target:
            raise ValueError(f"{TITLE}: nothing says what shall be where. Connect color_map, mask or target.")
        maps = [] if color_map is None else [_classes(color_map, colors, tolerance, network)]
        for part, name in target:
            index = class_index(network.labels, name, TITLE)
            maps.append(torch.where(from_mask(part)[:, 0] > 0.5, index, UNLABELLED))
        classes = layered(maps)
        if unlabelled.strip():
            index = class_index(network.labels, unlabelled, TITLE)
            classes = torch.where(classes == UNLABELLED, index, classes)
        region = None if region is None else from_mask(region)
        return (Segmentation(network, classes, region, [segmentation_model.patcher]),)


def _classes(color_map: Tensor, colors: str, tolerance: int, network: segmentation.SegmentationNetwork) -> Tensor:
    """The classes `[R, H, W]` of a colour-coded IMAGE."""
    pairs = _pairs(colors, network.labels) or list(enumerate(network.palette))
    if not pairs:
        raise ValueError(
            f"{TITLE}: colors is empty, and the network's data set has no colours that are known. Say which colour of "
            f"the map means which class, as in {network.labels[0]}=#f0be96, {network.labels[-1]}=#784628."
        )
    images = from_image(color_map)
    classes = from_colors(images, pairs, tolerance)
    known = (classes != UNLABELLED).float().mean()
    if known == 0:
        seen, counts = (images * 255).round().int().movedim(1, -1).reshape(-1, 3).unique(dim=0, return_counts=True)
        common = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in seen[counts.argsort(descending=True)[:5]].tolist()]
        raise ValueError(
            f"{TITLE}: no pixel of color_map has one of the colours {', '.join(color for _, color in pairs[:8])}"
            f"{' …' if len(pairs) > 8 else ''}. Its commonest are {', '.join(common)}. Name those in colors, or raise "
            f"tolerance (now {tolerance})."
        )
    log.info("%s: %.1f %% of color_map has a class.", TITLE, 100 * float(known))
    return classes


def _pairs(colors: str, labels: tuple[str, ...]) -> list[tuple[int, str]]:
    """'skin=#f0be96, hair=#784628', by commas or lines, as (class, colour) pairs. A class may have several colours."""
    text, position = colors.strip(" ,;\t\r\n"), 0
    found: dict[str, int] = {}
    while position < len(text):
        pair = PAIR.match(text, position)
        if pair is None:
            line = shortened(text[position:].splitlines()[0], 200)
            raise ValueError(f"{TITLE}: '{line}' in colors is not of the form skin=#f0be96, hair=#784628.")
        index, color = class_index(labels, pair[1], TITLE), f"#{pair[2].lower()}"
        if found.setdefault(color, index) != index:
            raise ValueError(
                f"{TITLE}: colors gives {color} to both {labels[found[color]]} and {labels[index]}. Choose one."
            )
        position = pair.end()
    return [(index, color) for color, index in found.items()]


NODES = {
    "SphereGuideLoadSegmentationModel": (LoadSegmentationModel, "Load Segmentation Model"),
    "SphereGuideSegmentationTarget": (SegmentationTarget, "Segmentation Target"),
    "SphereGuideSegmentationLoss": (SegmentationLoss, "Segmentation Loss"),
}
