"""Nodes of the methods around DSG: DiffRGD on its sphere, and TFG, which holds the methods before it."""

from __future__ import annotations

from typing import Any

import comfy.samplers

from ..losses.base import Loss
from ..samplers.diffrgd import Riemannian, riemannian_guided
from ..samplers.tfg import PRESETS, Unified, unified_guided
from ..samplers.trace import GuidanceTrace
from .guidance import DECODE_SIZE, HIDDEN, LOSS, SAMPLER, STEPS, VAE, GuidanceNode


class DiffRGDGuidance(GuidanceNode):
    DESCRIPTION = (
        "Steers a sampler by gradient steps on the sphere of the noise that it drew, taken where its step leads to: "
        "the closest follower of DSG, nearer to the loss in as many steps, with more model calls in each. For samplers "
        "that add noise. DiffRGD, Liao et al., ECCV 2026, arXiv 2606.28417."
    )
    SEARCH_ALIASES = ["diffrgd", "riemannian", "sphere", "loss guidance", "training-free guidance", "inverse problem"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        descent = {
            "step_size": (
                "FLOAT",
                {
                    "default": 5.0,
                    "min": 0.0,
                    "max": 1000.0,
                    "step": 0.01,
                    "tooltip": (
                        "η: how far a step moves along the gradient of the loss, which it is multiplied by, before it "
                        "goes back to the sphere. Too large is less of a danger here than in DPS Guidance. 0 is off."
                    ),
                },
            ),
            "iterations": (
                "INT",
                {
                    "default": 3,
                    "min": 1,
                    "max": 20,
                    "tooltip": (
                        "K: how many such steps follow each step of the sampler. Each takes a model call and its "
                        "gradient, so that with 3 a step takes more than three times as long as one of DSG Guidance."
                    ),
                },
            ),
        }
        return {"required": SAMPLER | LOSS | descent | STEPS, "optional": VAE | DECODE_SIZE, "hidden": HIDDEN}

    KIND = Riemannian

    def guided(self, sampler: comfy.samplers.KSAMPLER, objective: Any, trace: GuidanceTrace) -> comfy.samplers.KSAMPLER:
        return riemannian_guided(sampler, objective, trace)


class TFGGuidance(GuidanceNode):
    DESCRIPTION = (
        "Steers a sampler by a method that holds most others: gradient steps on the noisy image, on the estimate of "
        "the finished one, or on both, with smoothing and repetitions. preset makes it DPS, LGD-MC, FreeDoM, MPGD or "
        "UGD. For samplers that add noise. TFG, Ye et al., NeurIPS 2024, arXiv 2409.15761."
    )
    SEARCH_ALIASES = [
        "tfg",
        "training-free guidance",
        "loss guidance",
        "freedom",
        "mpgd",
        "ugd",
        "universal guidance",
        "lgd",
        "dps",
    ]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        space = {
            "preset": (
                list(PRESETS),
                {
                    "tooltip": (
                        "custom: TFG, with the settings below. A name: that method; what it leaves out counts as 0 (or "
                        "1), whatever is set: DPS, LGD-MC and FreeDoM take rho, MPGD mu, UGD both."
                    )
                },
            ),
            "rho": (
                "FLOAT",
                {
                    "default": 1.0,
                    "min": 0.0,
                    "max": 1000.0,
                    "step": 0.01,
                    "tooltip": (
                        "ρ: strength of the steps on the noisy image, whose gradient goes through the whole model. "
                        "Find it by doubling until the image breaks. 0 saves the time of that gradient."
                    ),
                },
            ),
            "mu": (
                "FLOAT",
                {
                    "default": 1.0,
                    "min": 0.0,
                    "max": 1000.0,
                    "step": 0.01,
                    "tooltip": (
                        "μ: size of the steps on the estimate of the finished image, without the model. Cheap, and "
                        "follows the loss to the letter, artefacts included. 0 is off; with rho at 0 too, nothing is "
                        "guided."
                    ),
                },
            ),
            "n_iter": (
                "INT",
                {
                    "default": 4,
                    "min": 0,
                    "max": 100,
                    "tooltip": (
                        "N_iter: how many steps of size mu are taken in each step of the sampler. Each takes a decode "
                        "and the loss."
                    ),
                },
            ),
            "n_recur": (
                "INT",
                {
                    "default": 1,
                    "min": 1,
                    "max": 20,
                    "tooltip": (
                        "N_recur: how often each step is done, undone by fresh noise in between (time travel). Each "
                        "costs a step's time; 1 is once."
                    ),
                },
            ),
            "sigma_bar": (
                "FLOAT",
                {
                    "default": 0.0,
                    "min": 0.0,
                    "max": 10.0,
                    "step": 0.001,
                    "tooltip": (
                        "σ̄: noise on the estimate before the loss sees it, most at the start, so that it judges a "
                        "neighbourhood and not a point. 0.001 to 0.1 in the paper; 0 is off."
                    ),
                },
            ),
            "samples": (
                "INT",
                {
                    "default": 1,
                    "min": 1,
                    "max": 64,
                    "tooltip": (
                        "How many such noises the loss is averaged over, each with a decode. Without effect at "
                        "sigma_bar 0."
                    ),
                },
            ),
        }
        return {"required": SAMPLER | LOSS | space | STEPS, "optional": VAE | DECODE_SIZE, "hidden": HIDDEN}

    KIND = Unified

    def guided(self, sampler: comfy.samplers.KSAMPLER, objective: Any, trace: GuidanceTrace) -> comfy.samplers.KSAMPLER:
        return unified_guided(sampler, objective, trace)

    def objective(self, loss: Loss, vae: Any, decode_scale: float, **settings: Any) -> Unified:
        unified = super().objective(loss, vae, decode_scale, **settings)
        if loss.space == "noisy" and unified.resolved.rho == 0:
            raise ValueError(
                f"{Unified.METHOD}: this loss looks at the noisy image, and with preset {unified.preset} and rho "
                f"{unified.rho:g} only the estimate of the finished one would be moved. Set rho above 0, or preset to "
                "another than MPGD."
            )
        return unified


NODES = {
    "SphereGuideDiffRGD": (DiffRGDGuidance, "DiffRGD Guidance"),
    "SphereGuideTFG": (TFGGuidance, "TFG Guidance"),
}
