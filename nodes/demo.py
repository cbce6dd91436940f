"""The demo models as a node."""

from __future__ import annotations


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


NODES = {"SphereGuideToyPortraits": (ToyPortraits, "Load Toy Portraits")}
