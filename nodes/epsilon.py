"""Epsilon Scaling: correcting a model's noise, which is too long while it samples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import comfy.samplers
import comfy.utils
import numpy as np
from torch import Tensor

from ..samplers.calibration import RUNS, Calibration, calibrate, log_power
from ..samplers.epsilon import EpsilonScaling, EpsilonSchedule, linear, scaled_model, uniform, with_post_cfg
from .figure import drawn, new_figure
from .schedule_range import check_range, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEDULES = ("uniform", "linear", "measured")

WIDGETS: dict[str, Any] = {
    "schedule": (
        list(SCHEDULES),
        {
            "tooltip": (
                "What the noise is divided by. uniform: b at each step. linear: k·t + b, with t counted from the last "
                "step (0) to the first, as the paper's tables have it. measured: what Calibrate Epsilon Scaling found."
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
PRECISE = 0.005
"""An error of b that is hard to see."""
OPTIONAL: dict[str, Any] = {
    "epsilon_schedule": ("EPSILON_SCHEDULE", {"tooltip": "For measured: from Calibrate Epsilon Scaling."}),
}


def scaling(
    title: str,
    schedule: str,
    b: float,
    k: float,
    start_percent: float,
    end_percent: float,
    epsilon_schedule: EpsilonSchedule | None = None,
) -> EpsilonScaling:
    """Raises ValueError, for the node of that title, for what can't be meant."""
    check_range(title, start_percent, end_percent, "no step would be corrected")
    if schedule == "measured":
        if epsilon_schedule is None:
            raise ValueError(
                f"{title}: 'measured' takes an epsilon_schedule, and none is connected. Connect that of Calibrate "
                "Epsilon Scaling, or choose uniform or linear."
            )
        return EpsilonScaling(lambda _: epsilon_schedule, start_percent, end_percent)

    def counted(sigmas: list[float]) -> EpsilonSchedule:
        if not sigmas:
            raise ValueError(
                f"{title}: 'linear' counts steps, and this ComfyUI does not tell a model which ones are taken. Use "
                "Epsilon Scaling Sampler with SamplerCustom, or choose uniform."
            )
        try:
            return linear(k, b, sigmas)
        except ValueError as error:
            raise ValueError(
                f"{title}: with k {k:g} and b {b:g} the divisor of the noise falls to 0 or below. Raise k or b. "
                f"({error})"
            ) from None

    return EpsilonScaling(counted if schedule == "linear" else lambda _: uniform(b), start_percent, end_percent)


def check_sampler(title: str, sampler: Any, remedy: str) -> None:
    """Raises ValueError, for the node of that title, for a sampler that nothing can be put around."""
    if not hasattr(sampler, "sampler_function"):
        kind = type(sampler).__name__
        raise ValueError(f"{title}: this sampler ({kind}) does not show how it samples. {remedy}")


class EpsilonScalingSampler:
    DESCRIPTION = (
        "Divides the noise that a model predicts by a number near 1: above 1 gives back detail that long steps lose. "
        "For any sampler, model and number of steps; costs nothing. Calibrate Epsilon Scaling measures by "
        "what. Epsilon Scaling, Ning et al., ICLR 2024, arXiv 2308.15321."
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
        return {"required": sampler | WIDGETS, "optional": OPTIONAL}

    def scale(self, sampler: comfy.samplers.KSAMPLER, **settings: Any) -> tuple[comfy.samplers.KSAMPLER]:
        check_sampler("Epsilon Scaling Sampler", sampler, "Use Epsilon Scaling (Model).")
        return (with_post_cfg(sampler, scaling("Epsilon Scaling Sampler", **settings)),)


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
        return {"required": model | WIDGETS, "optional": OPTIONAL}

    def scale(self, model: Any, **settings: Any) -> tuple[Any]:
        return (scaled_model(model, scaling("Epsilon Scaling (Model)", **settings)),)


class EpsilonScalingCalibrate:
    DESCRIPTION = (
        "Measures which Epsilon Scaling a model needs with this sampler, these steps, this cfg and these prompts, "
        "beside latents of real images, and says so if it needs none. It draws thirteen times as many pictures as it "
        "compares, once for each recipe. After Ning et al., ICLR 2024, arXiv 2308.15321."
    )
    CATEGORY = "SphereGuide/epsilon scaling"
    FUNCTION = "calibrate"
    OUTPUT_NODE = True
    RETURN_TYPES = ("FLOAT", "FLOAT", "EPSILON_SCHEDULE", "IMAGE", "STRING", "EPSILON_SCHEDULE")
    RETURN_NAMES = ("b", "k", "epsilon_schedule", "curves", "verdict", "ratio_schedule")
    OUTPUT_TOOLTIPS = (
        "For schedule linear, with k. 1 where the correction should stay off.",
        "For schedule linear, with b. 0 where uniform is as good.",
        "The best of uniform, linear and measured, or none: for schedule measured.",
        "What was measured before and after.",
        "What the node shows.",
        "The paper's λ, the ratio of the two lengths as it is, whatever the verdict: to compare with.",
    )
    SEARCH_ALIASES = ["calibrate", "exposure bias", "epsilon norm", "measure noise", "auto b"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model of the recipe, with its LoRAs and patches."}),
                "positive": ("CONDITIONING", {"tooltip": "A prompt for pictures like the real ones."}),
                "negative": ("CONDITIONING", {"tooltip": "The negative prompt of the recipe."}),
                "sampler": ("SAMPLER", {"tooltip": "The sampler of the recipe, without Epsilon Scaling."}),
                "sigmas": ("SIGMAS", {"tooltip": "Scheduler and steps of the recipe."}),
                "latents": (
                    "LATENT",
                    {
                        "tooltip": (
                            "VAE Encode of real images, of the kind and size that the model shall draw: at least 8, "
                            "better 32 or more."
                        )
                    },
                ),
                "cfg": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": "Of the recipe."}),
                "samples": (
                    "INT",
                    {
                        "default": 64,
                        "min": 2,
                        "max": 4096,
                        "tooltip": "How many pictures are compared. The verdict says whether they were enough.",
                    },
                ),
                "batch_size": (
                    "INT",
                    {"default": 8, "min": 1, "max": 1024, "tooltip": "How many are drawn at once: more take memory."},
                ),
                "calibration_seed": (  # not `seed`, which the page would change with each run
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 0xFFFFFFFFFFFFFFFF,
                        "tooltip": "Another seed measures with other noise.",
                    },
                ),
                "from_images": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": (
                            "For image-to-image: sampling starts from the real images with noise. Otherwise from noise "
                            "alone, as from an Empty Latent Image."
                        ),
                    },
                ),
            }
        }

    def calibrate(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        sampler: comfy.samplers.KSAMPLER,
        sigmas: Tensor,
        latents: dict[str, Tensor],
        cfg: float,
        samples: int,
        batch_size: int,
        calibration_seed: int,
        from_images: bool,
    ) -> dict[str, Any]:
        title = "Calibrate Epsilon Scaling"
        check_sampler(title, sampler, "Connect one of KSamplerSelect.")
        if "noise_mask" in latents:
            raise ValueError(f"{title}: the latent has a noise mask, and only whole images can be compared. Remove it.")
        figure = new_figure(title, 12, 4)  # before the work of minutes
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        bar = comfy.utils.ProgressBar(RUNS * samples)
        found = calibrate(
            guider,
            sampler,
            sigmas,
            latents["samples"],
            samples,
            batch_size,
            calibration_seed,
            from_images,
            bar.update_absolute,
        )
        verdict, (k, b) = said(found), found.linear
        result = (b, k, found.schedule, curves(found, figure), verdict, found.papers)
        return {"ui": {"text": [verdict]}, "result": result}


def said(found: Calibration) -> str:
    """The verdict in words."""
    off, on, gain, error = found.gain
    count, name = len(found.before.power), found.nearest
    scales, (ratio, ratio_error) = found.scales[name], found.ratio
    if not found.pays:
        lines = [
            f"Leave the correction off. The best that was found, {name}, brings the power of the latents, {off:.3f} "
            f"off the real ones, nearer by {gain:.3f} ± {error:.3f}; uniform would be b "
            f"{found.scales['uniform'][0]:.4f}. That is no evidence."
        ]
    else:
        k, b = found.linear
        by_hand = f"uniform, b {b:.4f}" if k == 0 else f"linear, b {b:.4f}, k {k:.5f}"
        lines = [
            f"Use the schedule ({name}): λ {scales[0]:.4f} at the first step, {scales[-1]:.4f} at the last. The power "
            f"of the latents is {off:.3f} off the real ones without it, and {on:.3f} with it (gain {gain:.3f} ± "
            f"{error:.3f}).",
            f"By hand{', untried' if name == 'measured' else ''}: schedule {by_hand}.",
        ]
    lines.append(
        f"‖ε̂‖ while sampling is {np.nanmin(ratio):.3f} to {np.nanmax(ratio):.3f} times that in training (standard "
        f"error up to {np.nanmax(ratio_error):.3f})."
    )
    for what, number, spread in zip(
        (f"{count} samples", f"{len(found.real)} real images"), (count, len(found.real)), found.b_errors, strict=True
    ):
        needed = math.ceil(number * (spread / PRECISE) ** 2)
        enough = "enough" if needed <= number else f"about {needed} would make it ± {PRECISE}"
        lines.append(f"{what} leave b uncertain by ± {spread:.4f}: {enough}.")
    return "\n".join(lines)


def curves(found: Calibration, figure: Figure) -> Tensor:
    """IMAGE `[1, 400, 1200, 3]`: ‖ε̂‖ in training and sampling, λ, and power beside the real, before and after."""
    lengths, scales, powers = figure.subplots(1, 3)
    after = "with the best"
    lines = {"training": found.training.curve, "sampling": found.before.curve, f"sampling, {after}": found.after.curve}
    for (name, curve), color in zip(lines.items(), ("#222222", "#c4553b", "#2f7fb8"), strict=True):
        lengths.plot(found.sigmas, curve.mean, label=name, color=color, marker=".", markersize=3)
        spread = 2 * curve.error
        lengths.fill_between(found.sigmas, curve.mean - spread, curve.mean + spread, color=color, alpha=0.15)
    lengths.set(title="length of the predicted noise, ‖ε̂‖/√n", xlabel="sigma")
    scales.axhline(1, color="#999999", linewidth=0.8)
    for name, values in found.scales.items():
        scales.plot(found.sigmas, values, label=name, linewidth=2 if name == found.nearest else 1)
    ratio, error = found.ratio
    scales.errorbar(found.sigmas, ratio, 2 * error, fmt=".", color="#c4553b", markersize=4, linewidth=1, label="ratio")
    scales.set(title="λ that brings the power nearest", xlabel="sigma")
    powers.axhline(1, color="#222222", linewidth=0.8, label="real")
    frequency = np.linspace(0, 1, found.real.shape[-1] + 1)[1:]
    for name, run, color in (("sampling", found.before, "#c4553b"), (after, found.after, "#2f7fb8")):
        ratio = np.exp(log_power(run.power, found.real).mean(0))  # over the channels
        powers.plot(frequency, ratio, label=name, color=color, marker=".")
    powers.set(title="power of the latents over the real", xlabel="spatial frequency, 1 the finest")
    for axes in (lengths, scales):
        axes.set_xscale("log")
        axes.invert_xaxis()  # as sampling goes, from noise to image
    for axes in (lengths, scales, powers):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return drawn(figure)


NODES = {
    "SphereGuideEpsilonScaling": (EpsilonScalingSampler, "Epsilon Scaling Sampler"),
    "SphereGuideEpsilonScalingModel": (EpsilonScalingModel, "Epsilon Scaling (Model)"),
    "SphereGuideEpsilonScalingCalibrate": (EpsilonScalingCalibrate, "Calibrate Epsilon Scaling"),
}
