"""Epsilon Scaling: correcting a model's noise, which is too long while it samples."""

from __future__ import annotations

from typing import Any

import comfy.samplers

from ..samplers.epsilon import EpsilonScaling, EpsilonSchedule, linear, scaled, scaled_model, uniform
from .schedule_range import check_range, percent

SCHEDULES = ("uniform", "linear")

WIDGETS: dict[str, Any] = {
    "schedule": (
        list(SCHEDULES),
        {
            "tooltip": (
                "What the noise is divided by. uniform: b at each step. linear: k·t + b, with t counted from the last "
                "step (0) to the first, as the paper's tables have it."
            )
        },
    ),
    "b": (
        "FLOAT",
        {
            "default": 1.005,
            "min": 0.5,
            "max": 1.5,
            "step": 0.0001,
            "round": 0.0001,
            "tooltip": (
                "1 is off. Above 1 keeps more of the noise, and of the detail in it; below 1 smooths. Fewer steps need "
                "more: 1.002 to 1.02."
            ),
        },
    ),
    "k": (
        "FLOAT",
        {
            "default": 0.0,
            "min": -0.1,
            "max": 0.1,
            "step": 0.0001,
            "round": 0.00001,
            "tooltip": "For linear: by how much each step before the last adds to b. 0.0002 to 0.0025 in the paper.",
        },
    ),
    "start_percent": percent(0.0, "Where the correction begins, as part of the model's noise schedule: 0 is noise."),
    "end_percent": percent(1.0, "Where it ends; 1 is the finished image."),
}


def scaling(title: str, schedule: str, b: float, k: float, start_percent: float, end_percent: float) -> EpsilonScaling:
    """Raises ValueError, for the node of that title, for what can't be meant."""
    check_range(title, start_percent, end_percent, "no step would be corrected")

    def counted(sigmas: list[float]) -> EpsilonSchedule:
        if not sigmas:
            raise ValueError(
                f"{title}: 'linear' counts steps, and this ComfyUI does not tell a model which ones are taken. Use "
                "Epsilon Scaling Sampler with SamplerCustom, or choose uniform."
            )
        try:
            return linear(k, b, sigmas)
        except ValueError as error:
            raise ValueError(f"{title}: with k {k:g} and b {b:g} λ falls to 0 or below. {error}") from None

    return EpsilonScaling(counted if schedule == "linear" else lambda _: uniform(b), start_percent, end_percent)


class EpsilonScalingSampler:
    DESCRIPTION = (
        "Corrects a bias that each diffusion model has while it samples: the noise that it predicts is a little too "
        "long, since it never saw its own errors. For any sampler, model and number of steps; costs nothing. Epsilon "
        "Scaling, Ning et al., ICLR 2024, arXiv 2308.15321."
    )
    CATEGORY = "SphereGuide/epsilon scaling"
    FUNCTION = "scale"
    RETURN_TYPES = ("SAMPLER",)
    RETURN_NAMES = ("sampler",)
    OUTPUT_TOOLTIPS = ("The corrected sampler, for SamplerCustom, SamplerCustomAdvanced or DSG Guidance.",)
    SEARCH_ALIASES = ["epsilon scaling", "exposure bias", "noise scaling", "detail", "sharpness"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        sampler = {"sampler": ("SAMPLER", {"tooltip": "Any sampler, guided or not."})}
        return {"required": sampler | WIDGETS}

    def scale(self, sampler: comfy.samplers.KSAMPLER, **settings: Any) -> tuple[comfy.samplers.KSAMPLER]:
        if not hasattr(sampler, "sampler_function"):
            raise ValueError(
                f"Epsilon Scaling Sampler: this sampler ({type(sampler).__name__}) does not show how it samples. Use "
                "Epsilon Scaling (Model)."
            )
        return (scaled(sampler, scaling("Epsilon Scaling Sampler", **settings)),)


class EpsilonScalingModel:
    DESCRIPTION = (
        "The same correction for whatever samples from this model, the plain KSampler included: put it between the "
        "model, after its other patches, and the sampler. Epsilon Scaling, Ning et al., ICLR 2024, arXiv 2308.15321."
    )
    CATEGORY = "SphereGuide/epsilon scaling"
    FUNCTION = "scale"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, corrected while it samples.",)
    SEARCH_ALIASES = ["epsilon scaling", "exposure bias", "noise scaling", "detail", "patch model"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        model = {"model": ("MODEL", {"tooltip": "The model, after its LoRAs and other patches."})}
        return {"required": model | WIDGETS}

    def scale(self, model: Any, **settings: Any) -> tuple[Any]:
        return (scaled_model(model, scaling("Epsilon Scaling (Model)", **settings)),)


NODES = {
    "SphereGuideEpsilonScaling": (EpsilonScalingSampler, "Epsilon Scaling Sampler"),
    "SphereGuideEpsilonScalingModel": (EpsilonScalingModel, "Epsilon Scaling (Model)"),
}
