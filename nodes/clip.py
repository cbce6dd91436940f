"""CLIP losses, and the loader of their models."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from ..losses.clip import DISTANCES, CLIPImage, CLIPText, Cutouts
from ..models import clip_model
from ..models.clip_model import OpenCLIP
from ..models.network import shortened
from .images import from_image
from .loss_node import LossNode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

MODEL = ("OPEN_CLIP_MODEL", {"tooltip": "From Load open_clip Model: the network that judges."})
VIEWS = {
    "distance": (
        list(DISTANCES),
        {
            "tooltip": (
                "How embeddings are compared. spherical: half the squared angle. cosine: 1 - cosine similarity. They "
                "differ only in how much each text and cutout counts: with spherical, what is far off counts for more."
            )
        },
    ),
    "cutouts": (
        "INT",
        {
            "default": 4,
            "min": 0,
            "max": 128,
            "tooltip": (
                "How many random squares of the image are judged at each step, and averaged. More is steadier, and "
                "takes time and memory in proportion. 0: the whole image, squeezed to a square."
            ),
        },
    ),
    "min_size": (
        "FLOAT",
        {
            "default": 0.5,
            "min": 0.01,
            "max": 1.0,
            "step": 0.01,
            "tooltip": (
                "Side of the smallest cutout, as a share of the image's shorter side. Small ones put the subject into "
                "each corner; large ones judge the composition."
            ),
        },
    ),
    "max_size": (
        "FLOAT",
        {
            "default": 1.0,
            "min": 0.01,
            "max": 1.0,
            "step": 0.01,
            "tooltip": "Side of the largest cutout, as a share of the image's shorter side.",
        },
    ),
    "augment": (
        "BOOLEAN",
        {
            "default": True,
            "tooltip": (
                "Turn, shift, mirror and recolour each cutout a little, with some noise, so that the network can't be "
                "pleased by a texture that only it sees. Turn off where left and right or lettering matter. Without "
                "cutouts it does nothing."
            ),
        },
    ),
}


class LoadOpenCLIP:
    DESCRIPTION = (
        "Loads a CLIP model, which tells how well a picture and a text agree, for the CLIP and style losses. Any "
        "pretrained model of open_clip, or a folder of your own under models/open_clip. Nothing is downloaded unless "
        "you pick an entry that says so."
    )
    CATEGORY = "SphereGuide/loaders"
    FUNCTION = "load"
    RETURN_TYPES = ("OPEN_CLIP_MODEL",)
    RETURN_NAMES = ("open_clip_model",)
    OUTPUT_TOOLTIPS = ("For CLIP Text Loss, CLIP Image Loss and Style Gram Loss.",)
    SEARCH_ALIASES = ["open_clip", "openclip", "clip model", "siglip", "laion", "clip guidance"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (
                    clip_model.entries(),
                    {
                        "tooltip": (
                            "Folders end in /. 'model:tag' is a pretrained model of open_clip whose weights lie under "
                            "models/open_clip or in the Hugging Face cache; with (download) behind it they are fetched "
                            "when the node runs. ViT-B-32 and ViT-B-16 are the small ones, and cost the least at each "
                            "step."
                        )
                    },
                ),
                "dtype": (
                    list(DTYPES),
                    {"tooltip": "fp32 is exact. bf16 halves the memory, for large models on recent GPUs."},
                ),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model: str) -> bool:
        return True  # an entry of a shared workflow may be written with or without "(download)"

    def load(self, model: str, dtype: str) -> tuple[OpenCLIP]:
        return (clip_model.load(model, DTYPES[dtype]),)


class CLIPTextLoss(LossNode):
    DESCRIPTION = (
        "Guides the sampler to pictures that a CLIP model finds to agree with a text. It adds to the prompt of the "
        "model, or stands in for it in models that know no text."
    )
    SEARCH_ALIASES = ["clip guidance", "text guidance", "prompt", "clip loss", "text loss"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "open_clip_model": MODEL,
                "text": (
                    "STRING",
                    {
                        "multiline": True,
                        "default": "",
                        "tooltip": (
                            "What the picture shall show. Several texts with weights: 'a red car | at night:0.5'. A "
                            "weight below 0 moves away. A colon without a number behind it is part of the text."
                        ),
                    },
                ),
                "negative_text": (
                    "STRING",
                    {
                        "multiline": True,
                        "default": "",
                        "tooltip": "What to move away from, written in the same way. Empty: nothing.",
                    },
                ),
                "negative_weight": (
                    "FLOAT",
                    {
                        "default": 0.5,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.05,
                        "tooltip": "How much the negative text counts, where the text counts 1.",
                    },
                ),
                **VIEWS,
            }
        }

    def make(
        self,
        open_clip_model: OpenCLIP,
        text: str,
        negative_text: str,
        negative_weight: float,
        distance: str,
        cutouts: int,
        min_size: float,
        max_size: float,
        augment: bool,
    ) -> tuple[CLIPText]:
        views = _cutouts("CLIP Text Loss", cutouts, min_size, max_size, augment)
        texts, weights = weighted_texts(text, "text")
        negative_texts, negative_weights = [], []
        if negative_text.strip():
            negative_texts, negative_weights = weighted_texts(negative_text, "negative_text")
        embeddings = open_clip_model.embed_texts(texts + negative_texts)
        loss = CLIPText(
            open_clip_model.tower,
            open_clip_model.image,
            embeddings[: len(texts)],
            weights,
            views,
            distance,
            embeddings[len(texts) :],
            negative_weights,
            negative_weight,
        )
        return (loss,)


class CLIPImageLoss(LossNode):
    DESCRIPTION = (
        "Guides the sampler to pictures that mean the same to a CLIP model as a reference: its subject, mood and "
        "style, not its pixels."
    )
    SEARCH_ALIASES = ["clip guidance", "image prompt", "reference", "variation", "clip loss", "similar image"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "open_clip_model": MODEL,
                "image": (
                    "IMAGE",
                    {"tooltip": "One or several references, of any size. Each is seen whole, squeezed to a square."},
                ),
                "references": (
                    ["average", "one per sample"],
                    {
                        "tooltip": (
                            "average: each sample is drawn to all references alike. one per sample: sample 1 to "
                            "reference 1, sample 2 to reference 2, and over again where there are fewer."
                        )
                    },
                ),
                **VIEWS,
            }
        }

    def make(
        self,
        open_clip_model: OpenCLIP,
        image: Tensor,
        references: str,
        distance: str,
        cutouts: int,
        min_size: float,
        max_size: float,
        augment: bool,
    ) -> tuple[CLIPImage]:
        views = _cutouts("CLIP Image Loss", cutouts, min_size, max_size, augment)
        targets = open_clip_model.embed_images(from_image(image))
        per_sample = references == "one per sample"
        return (CLIPImage(open_clip_model.tower, open_clip_model.image, targets, views, distance, per_sample),)


def _cutouts(title: str, count: int, min_size: float, max_size: float, augment: bool) -> Cutouts:
    if min_size > max_size:
        raise ValueError(f"{title}: min_size ({min_size:g}) is above max_size ({max_size:g}). Lower it.")
    return Cutouts(count, min_size, max_size, augment)


def weighted_texts(value: str, name: str) -> tuple[list[str], list[float]]:
    """Texts and weights of "a | b:0.5": parted by |, each with a weight behind its last colon, or 1.

    A colon that no number follows is part of the text. Raises ValueError for an empty text, and for weights that are
    all 0.
    """
    texts, weights = [], []
    for part in value.split("|"):
        match = re.fullmatch(r"(.*):\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*", part, re.DOTALL)
        text, weight = match.groups() if match else (part, "1")
        if not text.strip():
            raise ValueError(
                f"CLIP Text Loss: there is no text in part {len(texts) + 1} of {name} "
                f"'{shortened(value, 200)}'. Write texts parted by "
                "|, each with a weight behind a colon if it is not 1, such as: a red car | at night:0.5"
            )
        texts.append(text.strip())
        weights.append(float(weight))
    if not any(weights) or not all(map(math.isfinite, weights)):
        raise ValueError(
            f"CLIP Text Loss: the weights of {name} '{shortened(value, 200)}' are all 0, or too large. Set one to 1."
        )
    return texts, weights


NODES = {
    "SphereGuideLoadOpenCLIP": (LoadOpenCLIP, "Load open_clip Model"),
    "SphereGuideCLIPTextLoss": (CLIPTextLoss, "CLIP Text Loss"),
    "SphereGuideCLIPImageLoss": (CLIPImageLoss, "CLIP Image Loss"),
}
