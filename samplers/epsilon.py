"""Epsilon Scaling (Ning et al., ICLR 2024, arXiv 2308.15321), for any sampler and any kind of prediction.

A network never saw its own errors in training, and while sampling predicts noise that is too long. It is divided:

    ε̂ = (x − α·x̂₀)/σ        of the model's x = α·x₀ + σ·ε
    ε̂ ← ε̂/λ(t)              eq. 12; λ(t) = k·t + b, uniform: k = 0, "none": λ = 1
    x̂₀ = (x − σ·ε̂)/α

with t the index of the respaced step: 0 the last, T' − 1 the first. In ComfyUI's scaling of ε-, v- and EDM models α is
1, so that x̂₀ ← x − (x − x̂₀)/λ; a flow model has α = 1 − σ, and the same line would scale its velocity.

x̂₀ is what classifier-free guidance made of it, before a denoise mask: so the correction is a post-CFG function, last of
its list, and each call of a sampler with several a step passes through it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import numpy as np
import torch
from torch import Tensor

from .kernel import levels, with_function

__all__ = [
    "EpsilonScaling",
    "EpsilonSchedule",
    "linear",
    "scaled_model",
    "uniform",
    "with_post_cfg",
]


MOST_NOISE = 200.0
"""Beyond this σ/α x is left as it is. DDPM's own schedule begins at 157; flow models and those with zero terminal SNR
begin with noise alone, whose length is no prediction, and a thousandth of it would outweigh x̂₀."""


@dataclass(frozen=True)
class EpsilonSchedule:
    """λ over the noise level.

    sigmas  rising, each above 0
    scales  λ at these; between them it follows log sigma, beyond the ends it stays

    Raises ValueError where that does not hold, or a λ is not above 0.
    """

    sigmas: tuple[float, ...]
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sigmas or len(self.sigmas) != len(self.scales):
            raise ValueError(
                f"there are {len(self.scales)} scales for {len(self.sigmas)} noise levels, and must be one each"
            )
        if self.sigmas[0] <= 0 or any(b <= a for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ValueError("the noise levels of an epsilon schedule must rise, and be above 0")
        if bad := [scale for scale in self.scales if not 0 < scale < float("inf")]:
            raise ValueError(f"noise can't be divided by {bad[0]:g}: λ must be above 0")

    def __call__(self, sigma: float) -> float:
        return float(np.interp(np.log(sigma), np.log(self.sigmas), self.scales))


def uniform(b: float) -> EpsilonSchedule:
    return EpsilonSchedule((1.0,), (b,))


def linear(k: float, b: float, sigmas: list[float]) -> EpsilonSchedule:
    """λ = k·t + b over the steps of a run along `sigmas`, which counts as the last part of a schedule, if as a part."""
    rising = sorted({sigma for sigma in sigmas[:-1] if sigma > 0})  # the last is where the last step leads to
    return EpsilonSchedule(tuple(rising), tuple(k * t + b for t in range(len(rising))))


@dataclass(frozen=True)
class EpsilonScaling:
    """What to divide the noise by, and where.

    schedule    for the sigmas of a run
    start_percent, end_percent   the part of the noise schedule that is corrected, as in ComfyUI's own nodes
    """

    schedule: Callable[[list[float]], EpsilonSchedule]
    start_percent: float = 0.0
    end_percent: float = 1.0

    def __call__(self, args: dict[str, Any], sigmas: list[float]) -> Tensor:
        """x̂₀ for what ComfyUI hands to a post-CFG function, in a run along `sigmas`."""
        schedule, sampling = self.schedule(sigmas), args["model"].model_sampling
        x, denoised, sigma = args["input"], args["denoised"], args["sigma"]
        if sigma.min() == sigma.max():
            return self._corrected(schedule, sampling, x, denoised, sigma.max())
        each = zip(x.split(1), denoised.split(1), sigma, strict=True)  # AMED's samples have times of their own
        return torch.cat([self._corrected(schedule, sampling, *sample) for sample in each])

    def _corrected(self, schedule: EpsilonSchedule, sampling: Any, x: Tensor, denoised: Tensor, at: Tensor) -> Tensor:
        """x̂₀ of samples that are all at one noise level."""
        sigma = float(at)
        scale = schedule(sigma)
        if scale == 1:  # before anything else is asked of a GPU
            return denoised
        start, end = (float(sampling.percent_to_sigma(p)) for p in (self.start_percent, self.end_percent))
        alpha, noise = levels(sampling, at)
        if not end <= sigma <= start or noise > MOST_NOISE * alpha:
            return denoised
        return corrected(x, denoised, alpha, scale)


def corrected(x: Tensor, denoised: Tensor, alpha: float, scale: float) -> Tensor:
    """x̂₀ with its noise divided by `scale`."""
    return (x - (x - alpha * denoised) / scale) / alpha


def with_post_cfg(
    sampler: comfy.samplers.KSAMPLER, change: Callable[[dict[str, Any], list[float]], Tensor]
) -> comfy.samplers.KSAMPLER:
    """`sampler`, whichever it is, with x̂₀ of each model call made by `change`, an EpsilonScaling or another post-CFG
    function that is told the sigmas of the run. Guided or not, before or after: the sampler keeps what it is and has.
    """
    function = sampler.sampler_function

    def sample(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
        **options: Any,
    ) -> Tensor:
        extra_args = extra_args or {}
        model_options = extra_args.get("model_options", {})
        last = functools.partial(change, sigmas=sigmas.tolist())
        functions = [*model_options.get("sampler_post_cfg_function", []), last]
        extra_args = {**extra_args, "model_options": {**model_options, "sampler_post_cfg_function": functions}}
        return function(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)

    return with_function(sampler, sample)


def scaled_model(model: Any, scaling: EpsilonScaling) -> Any:
    """A clone of the MODEL with the correction.

    Running it raises ValueError where the schedule counts steps and the host does not tell a model which it takes.
    """

    def correct(args: dict[str, Any]) -> Tensor:
        sigmas = args["model_options"].get("transformer_options", {}).get("sample_sigmas")
        return scaling(args, [] if sigmas is None else sigmas.tolist())

    model = model.clone()
    model.set_model_sampler_post_cfg_function(correct)
    return model
