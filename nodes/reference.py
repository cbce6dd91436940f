"""ILVR: sampling with the coarse structure of a reference."""

from __future__ import annotations

from typing import Any

import comfy.samplers

from ..samplers.ilvr import referenced
from .schedule_range import check_range, percent


class ILVRReference:
    DESCRIPTION = (
        "Makes a sampler follow the coarse structure and colours of a reference latent, and leaves the rest to the "
        "model. Works with most samplers, deterministic ones too, and costs nothing. ILVR, Choi et al., ICCV 2021, "
        "arXiv 2108.02938."
    )
    CATEGORY = "SphereGuide/guidance"
    FUNCTION = "refer"
    RETURN_TYPES = ("SAMPLER",)
    RETURN_NAMES = ("sampler",)
    OUTPUT_TOOLTIPS = ("For SamplerCustom or SamplerCustomAdvanced, or for DSG Guidance.",)
    SEARCH_ALIASES = ["ilvr", "reference", "img2img", "low frequency", "composition", "structure"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "sampler": ("SAMPLER", {"tooltip": "Most will do. To guide it as well, put DSG Guidance behind."}),
                "reference": ("LATENT", {"tooltip": "The reference picture, encoded by the model's VAE."}),
                "factor": (
                    "INT",
                    {
                        "default": 4,
                        "min": 2,
                        "max": 64,
                        "tooltip": (
                            "N, in latent pixels (8 image pixels each): what is finer is free. 2 stays close to the "
                            "reference, 16 keeps its colours only."
                        ),
                    },
                ),
                "start_percent": percent(0.0, "Where the reference begins to count; 0 is pure noise."),
                "end_percent": percent(
                    0.8, "Where it ends; 1 is the finished image. Earlier lets the model fit the details together."
                ),
            }
        }

    def refer(
        self,
        sampler: comfy.samplers.KSAMPLER,
        reference: dict[str, Any],
        factor: int,
        start_percent: float,
        end_percent: float,
    ) -> tuple[comfy.samplers.KSAMPLER]:
        if not hasattr(sampler, "sampler_function"):
            kind = type(sampler).__name__
            raise ValueError(
                f"ILVR Reference: this sampler ({kind}) does not show how it samples. Connect one of KSamplerSelect."
            )
        check_range("ILVR Reference", start_percent, end_percent, "the reference would never count")
        return (referenced(sampler, reference["samples"], factor, start_percent, end_percent),)


NODES = {"SphereGuideILVR": (ILVRReference, "ILVR Reference")}
