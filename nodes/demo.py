"""The demo models as a node."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class ToyPortraits:
    DESCRIPTION = (
        "Loads Toy Portraits: a tiny diffusion model of cartoon portraits, 128x128, that comes with SphereGuide. It "
        "works with the stock nodes, so that every workflow of the pack can be tried with no download, even on a CPU. "
        "Use an Empty Latent Image of 128x128, cfg around 3, and prompts such as: a smiling person with long red hair, "
        "wearing glasses, green background, comic style."
    )
    SEARCH_ALIASES = ["toy portraits", "demo model", "test checkpoint", "tiny model", "checkpoint loader"]
    CATEGORY = "SphereGuide/demo"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = (
        "Noise-predicting U-Net on 4x16x16 latents.",
        "Text encoder with a small vocabulary: hair, glasses, clothes, background, expression, style. "
        "Other words are ignored.",
        "Autoencoder, 8x smaller, in TAESD layout.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def load(self) -> tuple:
        from ..demo import toy_portraits

        return toy_portraits.load()


class DrawToyPortraits:
    DESCRIPTION = (
        "Draws portraits of the world that Toy Portraits learnt, by the program that made its training data, from "
        "seeds that no network was trained on: real images for Calibrate Epsilon Scaling, and targets for losses."
    )
    SEARCH_ALIASES = ["toy portraits", "test images", "ground truth", "real images"]
    CATEGORY = "SphereGuide/demo"
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_TOOLTIPS = ("A batch of portraits, 128x128.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "first": (
                    "INT",
                    {"default": 0, "min": 0, "max": 9999, "tooltip": "Which portrait comes first: each number is one."},
                ),
                "count": ("INT", {"default": 32, "min": 1, "max": 1024, "tooltip": "How many, one after the other."}),
            }
        }

    def draw(self, first: int, count: int) -> tuple[Tensor]:
        from ..demo import portraits

        seeds = (portraits.VALIDATION_SEEDS[(first + i) % len(portraits.VALIDATION_SEEDS)] for i in range(count))
        return (torch.from_numpy(np.stack([portraits.render(seed) for seed in seeds])).float() / 255,)


NODES = {
    "SphereGuideToyPortraits": (ToyPortraits, "Load Toy Portraits"),
    "SphereGuideDrawToyPortraits": (DrawToyPortraits, "Draw Toy Portraits"),
}
