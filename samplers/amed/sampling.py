"""AMED's sampler."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy.k_diffusion.sampling import trange
from torch import Tensor

from ... import host
from ..kernel import levels, mask_at, per_sample
from .bottleneck import Bottleneck, watched
from .predictor import AMEDPredictor, fingerprint
from .students import Choice, Student, classical

__all__ = [
    "amed_sampler",
    "base_sigmas",
    "expanded_sigmas",
    "intervals",
    "look",
    "mismatches",
    "probed_midpoints",
    "sampled",
]

log = logging.getLogger("sphereguide")


@dataclass(frozen=True)
class Interval:
    """From `t` to `t_next`, and then along the last direction to 0 if `last`. `known`: the predictor learnt it."""

    t: float
    t_next: float
    known: bool
    last: bool


def base_sigmas(predictor: AMEDPredictor) -> Tensor:
    """The predictor's time points as ComfyUI's SIGMAS, `[steps + 1]`: 0 in place of the last."""
    return torch.tensor([*predictor.settings.sigmas[:-1], 0.0])


def expanded_sigmas(predictor: AMEDPredictor, midpoints: tuple[float, ...]) -> Tensor:
    """The base points with `midpoints` between them, `[2·steps + 1]`, for any sampler with one model call a step."""
    pairs = zip(predictor.settings.sigmas[:-1], midpoints, strict=True)
    return torch.tensor([sigma for pair in pairs for sigma in pair] + [0.0])


def intervals(sigmas: list[float], predictor: AMEDPredictor) -> list[Interval]:
    """What is to be done along `sigmas`. 0 is reached from the predictor's last time point, without a model call."""
    points = predictor.settings.sigmas
    found = []
    for t, t_next in itertools.pairwise(sigmas):
        last = t_next == 0
        if last:
            t_next = points[-1] if t > 1.001 * points[-1] else t / 2
        known = any(
            math.isclose(t, a, rel_tol=1e-3) and math.isclose(t_next, b, rel_tol=1e-3)
            for a, b in itertools.pairwise(points)
        )
        found.append(Interval(t, t_next, known, last))
    return found


def mismatches(predictor: AMEDPredictor, patcher: Any, cfg: float | None) -> list[str]:
    """In what a run differs from what the predictor was trained for."""
    settings, found = predictor.settings, []
    if settings.model_hash and fingerprint(patcher) != settings.model_hash:
        found.append("another model, or the same with other LoRAs or in another precision")
    if cfg is not None and not math.isclose(cfg, settings.cfg, rel_tol=1e-3):
        found.append(f"cfg {cfg:g} and not {settings.cfg:g}")
    sampling = patcher.get_model_object("model_sampling")
    ends = [float(sampling.sigma_max), float(sampling.sigma_min)]
    if not all(math.isclose(a, b, rel_tol=1e-2) for a, b in zip(ends, settings.sigmas[:: settings.steps], strict=True)):
        found.append(
            f"sigmas from {ends[0]:.4g} to {ends[1]:.4g} and not from {settings.sigmas[0]:.4g} to "
            f"{settings.sigmas[-1]:.4g}"
        )
    return found


def amed_sampler(predictor: AMEDPredictor) -> comfy.samplers.KSAMPLER:
    """The SAMPLER of a predictor."""

    def sample_amed(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        guider = host.guider(model)
        cfg = getattr(guider, "cfg", None) if {*guider.conds} <= {"positive", "negative"} else None
        _warn(predictor, guider.model_patcher, cfg, sigmas)
        with trange(len(sigmas) - 1, disable=disable) as bar:

            def each(i: int, x: Tensor, denoised: Tensor) -> None:
                bar.update()
                if callback is not None:
                    callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})

            return sampled(predictor, predictor, model, x, sigmas, extra_args or {}, each)

    return comfy.samplers.KSAMPLER(sample_amed)


def _warn(predictor: AMEDPredictor, patcher: Any, cfg: float | None, sigmas: Tensor) -> None:
    if found := mismatches(predictor, patcher, cfg):
        log.warning(
            "AMED Sampler: the predictor was trained for something else: this run has %s. Its choices may not help "
            "here; train one for this.",
            "; ".join(found),
        )
    steps = intervals(sigmas.tolist(), predictor)
    if unknown := [f"{step.t:.4g} to {0 if step.last else step.t_next:.4g}" for step in steps if not step.known]:
        log.warning(
            "AMED Sampler: these steps are not the predictor's, and are made as %s makes them without it: sigma %s. "
            "Connect the SIGMAS of AMED Scheduler (base), or a part of them.",
            predictor.settings.student,
            ", ".join(unknown),
        )


def sampled(
    predictor: AMEDPredictor,
    choose: Callable[[Tensor, Tensor, Tensor], Choice],
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    each: Callable[[int, Tensor, Tensor], None] = lambda i, x, denoised: None,
) -> Tensor:
    """Runs the student of `predictor` with what `choose`(features, t, t_next) chooses in the intervals that it knows.

    `each` is told of every interval: its index, x and denoised at its beginning.
    """
    settings, steps = predictor.settings, intervals(sigmas.tolist(), predictor)
    if not steps:
        return x
    student = Student(settings.student, settings.max_order, len(steps), steps[-1].last)
    base_model, options = host.base_model(model), extra_args.get("model_options", {})
    seen = None if settings.parallel else base_model.diffusion_model
    with watched(seen, options, host.guider(model).conds) as (bottleneck, options):
        ask = functools.partial(model, **{**extra_args, "model_options": options})
        for i, step in enumerate(steps):
            t, t_next = (x.new_full((len(x),), value, dtype=torch.float32) for value in (step.t, step.t_next))
            afs = settings.afs and i == 0 and math.isclose(step.t, settings.sigmas[0], rel_tol=1e-3)
            denoised, features = look(base_model, bottleneck, ask, x, t, afs)
            mask = mask_at(model, t, **extra_args)
            if afs and mask is not None:  # what ComfyUI does to a model's answer
                kept = next(link.latent_image for link in host.chain(model) if "latent_image" in vars(link))
                denoised = denoised * mask + kept * (1 - mask)
            choice = choose(features, t, t_next) if step.known else classical(x, settings.parallel)
            each(i, x, denoised)
            x, d_mid = student.advance(x, t, t_next, choice, denoised, ask, mask)
            if step.last:
                x = x - per_sample(t_next, x) * d_mid
    return x


def probed_midpoints(predictor: AMEDPredictor, guider: Any, latent: Tensor) -> tuple[float, ...]:
    """The mean t_mid of each interval along trajectories of the guider's prompts, one for each of `latent` `[B, …]`."""
    middles = []

    def choose(features: Tensor, t: Tensor, t_next: Tensor) -> Choice:
        choice = predictor(features, t, t_next)
        middles.append(float(choice.middle(t, t_next).mean()))
        return choice

    def probe(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any = None, disable: Any = None
    ) -> Tensor:
        return sampled(predictor, choose, model, x, sigmas, extra_args)

    noise = comfy.sample.prepare_noise(latent, 0)
    guider.sample(noise, torch.zeros_like(latent), host.Probe(probe), base_sigmas(predictor), disable_pbar=True, seed=0)
    return tuple(middles)


def look(
    base_model: Any, bottleneck: Bottleneck, ask: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, afs: bool
) -> tuple[Tensor, Tensor]:
    """denoised `[B, …]` and features `[B, 64]` at the beginning of an interval; with `afs` without a model call.

    AFS (Dockhorn et al., arXiv 2210.05475): at pure noise the direction is nearly x/√(α² + σ²).
    """
    bottleneck.forget(x)
    if afs:
        deviation = math.hypot(*levels(base_model.model_sampling, t.max()))
        return x - per_sample(t, x) * x / deviation, bottleneck.features(x)
    return ask(x, t), bottleneck.features(x)
