"""Nodes that guide a sampler."""

from __future__ import annotations

from typing import Any

import comfy.samplers

from .. import host
from ..losses.base import Loss
from ..models.decoder import Decoder
from ..samplers.dsg import GRADIENTS, Guidance, deterministic_sampler_message, guided
from ..samplers.trace import GuidanceTrace


class DSGGuidance:
    DESCRIPTION = (
        "Steers a sampler towards whatever the loss asks for, with any model and without training. It turns the noise "
        "that the sampler adds at each step, and keeps its length, so that images stay in the range that the model "
        "knows. For samplers that add noise, such as euler_ancestral, ddpm or dpmpp_2m_sde. "
        "DSG, Yang et al., ICML 2024, arXiv 2402.03201."
    )
    CATEGORY = "SphereGuide/guidance"
    FUNCTION = "guide"
    RETURN_TYPES = ("SAMPLER", "GUIDANCE_TRACE")
    RETURN_NAMES = ("sampler", "trace")
    OUTPUT_TOOLTIPS = (
        "The guided sampler, for SamplerCustom or SamplerCustomAdvanced.",
        "What guidance did at each step, for Guidance Report.",
    )
    SEARCH_ALIASES = ["dsg", "loss guidance", "training-free guidance", "steer", "universal guidance", "freedom", "dps"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "sampler": (
                    "SAMPLER",
                    {
                        "tooltip": (
                            "A sampler that adds noise: euler_ancestral, ddpm, dpmpp_2m_sde, lcm …. Deterministic "
                            "ones such as euler or dpmpp_2m leave nothing to steer."
                        )
                    },
                ),
                "loss": ("GUIDANCE_LOSS", {"tooltip": "What to steer towards: one of the loss nodes."}),
                "guidance_rate": (
                    "FLOAT",
                    {
                        "default": 0.2,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": (
                            "Strength: how far the noise of each step is turned towards the loss. 0 is off. 0.1 to "
                            "0.2 suits measured images (inpainting, super-resolution, deblurring). Higher follows the"
                            " loss more and varies less."
                        ),
                    },
                ),
                "interval": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": 1000,
                        "tooltip": (
                            "Guide every step (1), every second (2), and so on. Larger is faster and weaker; useful "
                            "from 100 steps up."
                        ),
                    },
                ),
                "start_percent": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.001,
                        "tooltip": (
                            "Where guidance begins, as part of the model's whole noise schedule: 0 is pure noise. "
                            "Image-to-image at denoise 0.4 begins at about 0.6."
                        ),
                    },
                ),
                "end_percent": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.001,
                        "tooltip": (
                            "Where guidance ends, as part of the model's whole noise schedule: 1 is the finished image."
                        ),
                    },
                ),
                "gradient": (
                    list(GRADIENTS),
                    {
                        "tooltip": (
                            "full: exact, through the whole model. cond only: the negative prompt counts as constant,"
                            " which saves time with CFG on large models. fast: no backward pass through the model; "
                            "cheap in time and memory, and weaker."
                        )
                    },
                ),
                "checkpointing": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": (
                            "Saves memory in 'full' and 'cond only' for about one more model call a step. Turn on if "
                            "memory runs out."
                        ),
                    },
                ),
            },
            "optional": {
                "vae": (
                    "VAE",
                    {
                        "tooltip": (
                            "Decodes the estimate for losses that look at images: nearly all of them. A TAESD VAE is "
                            "much faster and often good enough."
                        )
                    },
                ),
            },
        }

    def guide(
        self,
        sampler: comfy.samplers.KSAMPLER,
        loss: Loss,
        guidance_rate: float,
        interval: int,
        start_percent: float,
        end_percent: float,
        gradient: str,
        checkpointing: bool,
        vae: Any = None,
    ) -> tuple[comfy.samplers.KSAMPLER, GuidanceTrace]:
        if not hasattr(sampler, "sampler_function"):
            raise ValueError(
                deterministic_sampler_message(f"({type(sampler).__name__}) does not show how it does that")
            )
        if host.adds_noise(sampler) is False:
            name = getattr(sampler.sampler_function, "__name__", "").removeprefix("sample_")
            raise ValueError(deterministic_sampler_message(f"({name}) adds none that can be reached"))
        if loss.space == "image" and vae is None:
            raise ValueError(
                "DSG Guidance: this loss looks at images, and there is no VAE to decode them. Connect the VAE of the "
                "model, or a TAESD VAE, to the vae input."
            )
        if start_percent >= end_percent:
            raise ValueError(
                f"DSG Guidance: start_percent ({start_percent}) is not before end_percent ({end_percent}), so no "
                "step would be guided. Lower the one or raise the other."
            )
        guidance = Guidance(
            loss=loss,
            decode=Decoder(vae) if loss.space == "image" else None,
            guidance_rate=guidance_rate,
            interval=interval,
            start_percent=start_percent,
            end_percent=end_percent,
            gradient=gradient,
            checkpointing=checkpointing,
        )
        trace = GuidanceTrace()
        return guided(sampler, guidance, trace), trace


NODES = {"SphereGuideDSG": (DSGGuidance, "DSG Guidance")}
