"""Nodes that guide a sampler."""

from __future__ import annotations

from typing import Any

import comfy.samplers

from .. import host
from ..losses.base import Loss
from ..models.decoder import Decoder
from ..samplers.dps import Posterior, posterior_guided
from ..samplers.dsg import Guidance, guided
from ..samplers.kernel import GRADIENTS, Objective, deterministic_sampler_message
from ..samplers.trace import GuidanceTrace
from .schedule_range import check_range, percent

TRACE_TOOLTIP = "What guidance did at each step, for Guidance Report."

SAMPLER: dict[str, Any] = {
    "sampler": (
        "SAMPLER",
        {
            "tooltip": (
                "A sampler that adds noise: euler_ancestral, ddpm, dpmpp_2m_sde, lcm …. Deterministic ones such as "
                "euler or dpmpp_2m leave nothing to steer."
            )
        },
    ),
}
LOSS: dict[str, Any] = {
    "loss": ("GUIDANCE_LOSS", {"tooltip": "What to steer towards: one of the loss nodes."}),
}
RATE: dict[str, Any] = {
    "guidance_rate": (
        "FLOAT",
        {
            "default": 0.2,
            "min": 0.0,
            "max": 1.0,
            "step": 0.01,
            "tooltip": (
                "Strength: how far the noise is turned towards the loss; 0 leaves it. 0.1 to 0.4 suits measured images "
                "(inpainting, super-resolution, deblurring), 0.1 to 0.2 maps and texts, 0.2 to 0.3 styles and faces. "
                "Higher follows the loss more and varies less."
            ),
        },
    ),
}
#: Where and how: the same for all methods.
STEPS: dict[str, Any] = {
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
    "start_percent": percent(
        0.0,
        "Where guidance begins, as part of the model's whole noise schedule: 0 is pure noise. Image-to-image at "
        "denoise 0.4 begins at about 0.6.",
    ),
    "end_percent": percent(
        1.0, "Where guidance ends, as part of the model's whole noise schedule: 1 is the finished image."
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
                "Saves memory in 'full' and 'cond only' for about one more model call a step; images of a batch are "
                "decoded one by one. Turn on if memory runs out."
            ),
        },
    ),
}
VAE: dict[str, Any] = {
    "vae": (
        "VAE",
        {
            "tooltip": (
                "Decodes the estimate, which is the finished picture as the model foresees it at this step, for losses "
                "that look at images: nearly all of them. A TAESD VAE is much faster and often good enough."
            )
        },
    ),
}
DECODE_SIZE: dict[str, Any] = {
    "decode_scale": (
        "FLOAT",
        {
            "default": 1.0,
            "min": 0.1,
            "max": 1.0,
            "step": 0.05,
            "tooltip": (
                "Decodes a smaller latent for the loss, and enlarges the image again: 0.5 takes a quarter of the time "
                "and memory of decoding, and the loss sees less detail."
            ),
        },
    ),
}
RECURRENCE: dict[str, Any] = {
    "recurrence": (
        "INT",
        {
            "default": 0,
            "min": 0,
            "max": 20,
            "tooltip": (
                "Time travel: how often each step is guided, undone by fresh noise and done again, so that the model "
                "can fit together what guidance asks for. Each costs a step's time. Pays with many steps and strong "
                "guidance; 0 is off."
            ),
        },
    ),
    "recurrence_start": percent(0.0, "Where repeating begins, counted like start_percent."),
    "recurrence_end": percent(
        1.0, "Where repeating ends. The middle of the schedule, such as 0.3 to 0.7, gives most for its time."
    ),
}
RATE_STEPS: dict[str, Any] = {
    "rate_steps": (
        "INT",
        {
            "default": 50,
            "min": 0,
            "max": 10000,
            "tooltip": (
                "The number of steps that guidance_rate is meant for. With more or fewer steps the rate is scaled, so "
                "that the same number means the same strength. 0: the rate of each step, as in the paper."
            ),
        },
    ),
}
AUTO_STRENGTH: dict[str, Any] = {
    "auto_strength": (
        "FLOAT",
        {
            "default": 0.0,
            "min": 0.0,
            "max": 10.0,
            "step": 0.05,
            "tooltip": (
                "How much, where the strength is found for you, for each step and each image, from how far the run is "
                "and how the gradient of the loss turns. 1 follows the loss closely, whatever it is; 0.3 leaves the "
                "image more of its own, and suits ten steps and fewer. guidance_rate and rate_steps do not count then. "
                "0 is off: guidance_rate counts."
            ),
        },
    ),
}
#: The page draws the loss on the node while it samples.
HIDDEN = {"unique_id": "UNIQUE_ID"}
#: Optional, so that workflows from before they existed still run; their widgets come last for the same reason.
DSG_OPTIONS = VAE | RATE_STEPS | RECURRENCE | DECODE_SIZE | AUTO_STRENGTH


def dsg(loss: Loss, vae: Any, decode_scale: float = 1.0, rate_steps: int = 50, **settings: Any) -> Guidance:
    """Raises ValueError, for the page, for settings that guide nothing."""
    start, end = (settings.get(name, default) for name, default in (("recurrence_start", 0.0), ("recurrence_end", 1.0)))
    if settings.get("recurrence") and start >= end:
        raise ValueError(
            f"{Guidance.METHOD}: recurrence_start ({start}) is not before recurrence_end ({end}), so no step would be "
            "repeated. Set recurrence to 0, or lower the one or raise the other."
        )
    return objective(Guidance, loss, vae, decode_scale, rate_steps=rate_steps, **settings)


def objective(kind: type[Any], loss: Loss, vae: Any, decode_scale: float, **settings: Any) -> Any:
    if loss.space == "image" and vae is None:
        raise ValueError(
            f"{kind.METHOD}: this loss looks at images, and there is no VAE to decode them. Connect the VAE of the "
            "model, or a TAESD VAE, to the vae input."
        )
    if loss.space == "image" and getattr(vae, "first_stage_model", None) is None:
        raise ValueError(
            f"{kind.METHOD}: the checkpoint that this VAE comes from holds none. Connect Load VAE, with one for this "
            "kind of model."
        )
    check_range(kind.METHOD, settings["start_percent"], settings["end_percent"], "no step would be guided")
    return kind(loss=loss, decode=Decoder(vae, decode_scale) if loss.space == "image" else None, **settings)


def checked(sampler: Any, method: type[Objective]) -> comfy.samplers.KSAMPLER:
    """`sampler`, if it adds noise that can be steered. Raises ValueError, for the page, for any other."""
    if not hasattr(sampler, "sampler_function"):
        why = f"({type(sampler).__name__}) does not show how it does that"
        raise ValueError(deterministic_sampler_message(method.METHOD, why))
    if host.adds_noise(sampler) is False:
        name = getattr(sampler.sampler_function, "__name__", "").removeprefix("sample_")
        raise ValueError(deterministic_sampler_message(method.METHOD, f"({name}) adds none that can be reached"))
    return sampler


class GuidanceNode:
    """A node that guides a sampler: the method's objective, and what makes a guided sampler of it."""

    CATEGORY = "SphereGuide/guidance"
    FUNCTION = "guide"
    RETURN_TYPES = ("SAMPLER", "GUIDANCE_TRACE")
    RETURN_NAMES = ("sampler", "trace")
    OUTPUT_TOOLTIPS = ("The guided sampler, for SamplerCustom or SamplerCustomAdvanced.", TRACE_TOOLTIP)

    KIND: type[Objective]

    def guided(self, sampler: comfy.samplers.KSAMPLER, objective: Any, trace: GuidanceTrace) -> comfy.samplers.KSAMPLER:
        raise NotImplementedError

    def objective(self, loss: Loss, vae: Any, decode_scale: float, **settings: Any) -> Any:
        """Raises ValueError, for the page, for settings that guide nothing."""
        return objective(self.KIND, loss, vae, decode_scale, **settings)

    def guide(
        self,
        sampler: comfy.samplers.KSAMPLER,
        loss: Loss,
        vae: Any = None,
        decode_scale: float = 1.0,
        unique_id: str | None = None,
        **settings: Any,
    ) -> tuple[comfy.samplers.KSAMPLER, GuidanceTrace]:
        checked(sampler, self.KIND)
        trace = GuidanceTrace(unique_id)
        return self.guided(sampler, self.objective(loss, vae, decode_scale, **settings), trace), trace


class DSGGuidance(GuidanceNode):
    DESCRIPTION = (
        "Steers a sampler towards whatever the loss asks for, with any model and without training. It turns the noise "
        "that the sampler adds at each step, and keeps its length, so that images stay in the range that the model "
        "knows. For samplers that add noise, such as euler_ancestral, ddpm or dpmpp_2m_sde. "
        "DSG, Yang et al., ICML 2024, arXiv 2402.03201."
    )
    SEARCH_ALIASES = ["dsg", "loss guidance", "training-free guidance", "steer", "universal guidance", "freedom", "dps"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": SAMPLER | LOSS | RATE | STEPS, "optional": DSG_OPTIONS, "hidden": HIDDEN}

    KIND = Guidance

    def guided(self, sampler: comfy.samplers.KSAMPLER, objective: Any, trace: GuidanceTrace) -> comfy.samplers.KSAMPLER:
        return guided(sampler, objective, trace)

    def objective(self, loss: Loss, vae: Any, decode_scale: float, **settings: Any) -> Guidance:
        return dsg(loss, vae, decode_scale, **settings)


class DSGGuidanceModel:
    DESCRIPTION = (
        "Steers whatever samples from this model, the plain KSampler included: put it between the model and the "
        "sampler of a workflow that you have. The sampler must be one that adds noise. Otherwise the same as DSG "
        "Guidance. Needs ComfyUI 0.3.8 (December 2024) or newer. DSG, Yang et al., ICML 2024, arXiv 2402.03201."
    )
    CATEGORY = "SphereGuide/guidance"
    FUNCTION = "guide"
    RETURN_TYPES = ("MODEL", "GUIDANCE_TRACE")
    RETURN_NAMES = ("model", "trace")
    OUTPUT_TOOLTIPS = ("The model, whose samplers are guided.", TRACE_TOOLTIP)
    SEARCH_ALIASES = ["dsg", "loss guidance", "training-free guidance", "ksampler guidance", "patch model", "steer"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        model = {"model": ("MODEL", {"tooltip": "The model, after its LoRAs and other patches."})}
        return {"required": model | LOSS | RATE | STEPS, "optional": DSG_OPTIONS, "hidden": HIDDEN}

    def guide(
        self, model: Any, loss: Loss, vae: Any = None, unique_id: str | None = None, **settings: Any
    ) -> tuple[Any, GuidanceTrace]:
        guidance, trace = dsg(loss, vae, **settings), GuidanceTrace(unique_id)

        def change(sampler: comfy.samplers.KSAMPLER) -> comfy.samplers.KSAMPLER:
            return guided(checked(sampler, Guidance), guidance, trace)

        return host.wrap_samplers(model, change, "DSG Guidance (Model)"), trace


class DSGKSampler:
    DESCRIPTION = (
        "KSampler with guidance built in: samples, and steers towards whatever the loss asks for. Offers the samplers "
        "that add noise, since the others leave nothing to steer. DSG, Yang et al., ICML 2024, arXiv 2402.03201."
    )
    CATEGORY = "SphereGuide/guidance"
    FUNCTION = "sample"
    RETURN_TYPES = ("LATENT", "GUIDANCE_TRACE")
    RETURN_NAMES = ("latent", "trace")
    OUTPUT_TOOLTIPS = ("The guided latent.", TRACE_TOOLTIP)
    SEARCH_ALIASES = ["dsg", "guided sampler", "loss guidance", "training-free guidance", "steer"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        ksampler = {
            "model": ("MODEL", {"tooltip": "The model that removes the noise."}),
            "positive": ("CONDITIONING", {"tooltip": "What to include. An empty prompt leaves it all to the loss."}),
            "negative": ("CONDITIONING", {"tooltip": "What to avoid. Without effect at cfg 1."}),
            "latent_image": ("LATENT", {"tooltip": "The latent to begin with, empty or of an image."}),
        }
        run = {
            "seed": (
                "INT",
                {
                    "default": 0,
                    "min": 0,
                    "max": 2**64 - 1,
                    "control_after_generate": True,
                    "tooltip": "Decides the noise: the same seed gives the same image.",
                },
            ),
            "steps": ("INT", {"default": 30, "min": 1, "max": 10000, "tooltip": "More steps follow the loss further."}),
            "cfg": (
                "FLOAT",
                {
                    "default": 5.0,
                    "min": 0.0,
                    "max": 100.0,
                    "step": 0.1,
                    "round": 0.01,
                    "tooltip": "How much the prompt counts. 1 leaves the negative prompt out, and halves the time.",
                },
            ),
            "sampler_name": (
                list(host.stochastic_samplers()),
                {"default": "euler_ancestral", "tooltip": "The samplers of this ComfyUI that add noise."},
            ),
            "scheduler": (
                comfy.samplers.KSampler.SCHEDULERS,
                {"tooltip": "How the noise falls from step to step."},
            ),
            "denoise": (
                "FLOAT",
                {
                    "default": 1.0,
                    "min": 0.0,
                    "max": 1.0,
                    "step": 0.01,
                    "tooltip": "1 starts from noise alone. The lower, the more of the latent's image stays.",
                },
            ),
        }
        return {"required": ksampler | LOSS | run | RATE | STEPS, "optional": DSG_OPTIONS, "hidden": HIDDEN}

    def sample(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        loss: Loss,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        vae: Any = None,
        unique_id: str | None = None,
        **settings: Any,
    ) -> tuple[dict[str, Any], GuidanceTrace]:
        sampler = checked(comfy.samplers.sampler_object(sampler_name), Guidance)
        trace = GuidanceTrace(unique_id)
        sampler = guided(sampler, dsg(loss, vae, **settings), trace)
        sigmas = comfy.samplers.KSampler(
            model, steps, model.load_device, sampler_name, scheduler, denoise, model.model_options
        ).sigmas
        return host.sample_latent(model, latent_image, seed, cfg, sampler, sigmas, positive, negative), trace


class DPSGuidance(GuidanceNode):
    DESCRIPTION = (
        "Steers a sampler by plain gradient steps, as the method that DSG grew from: for comparison. The step size "
        "suits one loss, model and number of steps at a time; too large, and the image breaks. For samplers that add "
        "noise. DPS, Chung et al., ICLR 2023, arXiv 2209.14687."
    )
    SEARCH_ALIASES = ["dps", "posterior sampling", "inverse problem", "loss guidance", "baseline"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {
            "step_size": (
                "FLOAT",
                {
                    "default": 1.0,
                    "min": 0.0,
                    "max": 1000.0,
                    "step": 0.01,
                    "tooltip": (
                        "ζ: how far each step moves along the gradient of the loss, which it is multiplied by. Find it "
                        "by doubling until the image breaks. 0 is off."
                    ),
                },
            )
        }
        return {"required": SAMPLER | LOSS | size | STEPS, "optional": VAE | DECODE_SIZE, "hidden": HIDDEN}

    KIND = Posterior

    def guided(self, sampler: comfy.samplers.KSAMPLER, objective: Any, trace: GuidanceTrace) -> comfy.samplers.KSAMPLER:
        return posterior_guided(sampler, objective, trace)


NODES = {
    "SphereGuideDSG": (DSGGuidance, "DSG Guidance"),
    "SphereGuideDSGModel": (DSGGuidanceModel, "DSG Guidance (Model)"),
    "SphereGuideKSampler": (DSGKSampler, "KSampler (DSG Guided)"),
    "SphereGuideDPS": (DPSGuidance, "DPS Guidance"),
}
