"""DSG: Diffusion with Spherical Gaussian constraint (Yang et al., ICML 2024, arXiv 2402.03201), in noise space.

A stochastic step of any sampler is x_next = μ + c·ε with ε Gaussian, and a Gaussian of n dimensions lies on a sphere of
radius √n. With g = ∇ₓ L(x̂₀(x)), per sample:

    d* = −√n · g/‖g‖            the steepest descent on that sphere, the paper's closed form
    m  = ε + g_r·(d* − ε)       g_r = guidance_rate; the random part keeps variety
    ε' = √n · m/‖m‖             back onto the sphere

c cancels, so a guided sampler is a sampler with a guided `noise_sampler`. The step to sigma 0 draws no noise and is not
guided.

In a run of N steps c ~ 1/√N, so what guidance adds up to grows with √N, while the sum of the noise stays the same.
`rate_steps` undoes that: tan of the angle between ε and m is scaled by √(rate_steps/N).

Auto strength gives a rate for each step and sample, with c the cosine between a sample's successive gradients:

    tan α = κ·½·√(50/N)·exp(5/4·(p − ½))·f              κ = auto_strength, p as start_percent counts
    log f ← log f + γ·(c − clip(c, −0.9, −0.3))         γ = ½, f from 1, within ½ and 3/2

The first line did well on tuning portraits in the tasks of `bench guidance` and `bench inverse`: late steps are worth
more, as x̂₀ is surer. The second corrects it by what a sample's loss is like. A step to the loss's minimum along its
way makes the next gradient orthogonal to this one (c = 0), a longer one opposes it; and steps of up to twice that
length get further in the end than exact ones (Raydan & Svaiter, Comput. Optim. Appl. 21, 2002). So the angle grows,
within a step or two, until gradients clearly oppose each other, and shrinks, in some twenty, where they do nothing
else.

A weight of the loss multiplies κ, or guidance_rate. Repetitions take f as it is.

Recurrence (time travel: FreeDoM, Yu et al., ICCV 2023, arXiv 2303.09833) repeats a step: guide it, go back by noise.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import comfy.samplers
import torch
from torch import Tensor
from torch.nn import functional

from .kernel import GuidedModel, Objective, per_sample, progress, steered
from .trace import Evaluation, GuidanceTrace

__all__ = ["Guidance", "guided", "on_sphere"]

# Of auto strength: tan α halfway through the noise in a run of as many steps, its growth, and f's gain, aim and range.
TANGENT, STEPS, GROWTH = 0.5, 50, 1.25
GAIN, COSINES, FACTORS = 0.5, (-0.9, -0.3), (0.5, 1.5)


@dataclass(frozen=True)
class Guidance(Objective):
    """DSG's settings beside those of `Objective`.

    guidance_rate   g_r in [0, 1]; 0, without auto_strength, is the unguided sampler, bit for bit
    rate_steps      the number of steps that guidance_rate is meant for; with any other it is scaled so that the run's
                    strength stays. Steps are counted as if the schedule were run through from noise to image. 0: as in
                    the paper, the rate of each step, whatever their number.
    auto_strength   κ ≥ 0: the rate is found for each step and sample, and guidance_rate and rate_steps do not count.
                    1 serves most losses, 0.5 is half of it (of the angle's tan). 0: off.
    recurrence      r ≥ 0: how often a step is repeated before the sampler's own. A repetition is a guided DDPM step
                    (η = 1) and its undoing by fresh noise, done to the sampler's state: so it serves every sampler that
                    goes on from it, and a multistep one keeps the history of its own steps alone.
    recurrence_start, recurrence_end   the part of the schedule with repetitions, like start_percent and end_percent
    """

    METHOD: ClassVar[str] = "DSG Guidance"

    guidance_rate: float = 0.2
    rate_steps: int = 0
    auto_strength: float = 0.0
    recurrence: int = 0
    recurrence_start: float = 0.0
    recurrence_end: float = 1.0

    @property
    def off(self) -> bool:
        return self.guidance_rate == 0 and self.auto_strength == 0

    @property
    def moves_state(self) -> bool:
        return self.recurrence > 0


def on_sphere(noise: Tensor, gradient: Tensor, guidance_rate: float | Tensor, free: Tensor | None = None) -> Tensor:
    """ε' from ε and g, both `[B, …]`, per sample; the rate is one for all, or of a shape that broadcasts over them.

    free  `[B, …]` of bool: the coordinates that the sampler is free to choose (a denoise mask). The sphere is then
          theirs, n their number, and the others keep their noise.
    """
    if free is None:
        free = torch.ones_like(noise, dtype=torch.bool)
    n = per_sample(free.flatten(1).sum(1), noise)
    eps, g = noise * free, gradient * free
    radius = n.sqrt()
    direction = -radius * g / _norm(g)
    mix = eps + guidance_rate * (direction - eps)
    return torch.where(free, radius * mix / _norm(mix), noise)


def guided(sampler: comfy.samplers.KSAMPLER, guidance: Guidance, trace: GuidanceTrace) -> comfy.samplers.KSAMPLER:
    """`sampler`, guided by DSG. It keeps its options, and its function's signature stays visible to other packs."""
    return steered(sampler, guidance, trace, _Spherical)


class _Spherical(GuidedModel):
    """Turns the noise that follows a guided call towards the descent of the loss."""

    objective: Guidance
    by_length = False
    # Of auto strength: log f [B], the call that it is of, and each sample's latest gradient that was one.
    correction: Tensor | None = None
    before: Evaluation | None = None
    gradient: Tensor

    def drawn(self, noise: Tensor, sigma_next: Tensor) -> Tensor:
        return self._turned(noise, sigma_next, self.latest)

    def _turned(self, noise: Tensor, sigma_next: Tensor, at: Evaluation, repeats: bool = False) -> Tensor:
        gradient, norm = at.gradient.to(noise), at.norm
        usable = norm.isfinite() & (norm > 0)
        rate = self._rate(at, usable, repeats)
        turned = on_sphere(noise, gradient, per_sample(rate, noise), at.free)
        turned = torch.where(per_sample(usable, noise) > 0, turned, noise)
        self.trace.record(at, sigma_next, turned, usable, rate)
        return turned

    def _rate(self, at: Evaluation, usable: Tensor, repeats: bool) -> Tensor:
        """`[B]`."""
        # tan of the angle is rate/(1 − rate), as ε and d* are orthogonal
        if self.objective.auto_strength:
            middle = self.objective.auto_strength * at.weight * TANGENT * (STEPS / self._steps) ** 0.5
            done = progress(self.model.model_sampling, float(at.sigma.max()))
            tangent = middle * (GROWTH * (done - 0.5) + self._corrected(at, usable, repeats)).exp()
            return tangent / (1 + tangent)
        scale = (self.objective.rate_steps / self._steps) ** 0.5 if self.objective.rate_steps else 1.0
        rate = min(1.0, self.objective.guidance_rate * at.weight)
        return torch.full_like(at.loss, scale * rate / (1 - rate + scale * rate))

    def _corrected(self, at: Evaluation, usable: Tensor, repeats: bool) -> Tensor:
        """log f `[B]`. A repetition goes elsewhere than the sampler's own step, and changes nothing of it."""
        if self.correction is None:
            self.correction, self.gradient = torch.zeros_like(at.loss), torch.zeros_like(at.gradient)
        if repeats or self.before is at:  # some samplers draw twice after a call
            return self.correction
        self.before = at
        cosine = functional.cosine_similarity(at.gradient.flatten(1), self.gradient.flatten(1), eps=0.0)
        # A sample without a usable gradient keeps its f, and so does one that had none before: that is not a number.
        change = GAIN * torch.where(usable, torch.nan_to_num(cosine - cosine.clamp(*COSINES)), 0)
        least, most = (math.log(factor) for factor in FACTORS)
        self.correction = (self.correction + change).clamp(least, most)
        self.gradient = torch.where(per_sample(usable, at.gradient) > 0, at.gradient, self.gradient)
        return self.correction

    @functools.cached_property
    def _steps(self) -> float:
        """How many steps a whole schedule would have that is as fine as this one."""
        start, end = (progress(self.model.model_sampling, sigma) for sigma in (self.schedule[0], self.schedule[-1]))
        steps = len(self.schedule) - 1
        return steps if end - start > 0.995 else steps / max(end - start, 1e-3)

    def arrived(self, x: Tensor, sigma: Tensor, **extra_args: object) -> None:
        start, end = self._repeated_range
        if end <= float(sigma.max()) <= start:
            self.repeat(x, sigma, self.objective.recurrence, self._guided, **extra_args)

    def _guided(self, noise: Tensor, sigma_next: Tensor, at: Evaluation) -> tuple[Tensor, float]:
        return self._turned(noise, sigma_next, at, repeats=True), 0.0

    @functools.cached_property
    def _repeated_range(self) -> tuple[float, float]:
        percents = self.objective.recurrence_start, self.objective.recurrence_end
        start, end = (float(self.model.model_sampling.percent_to_sigma(percent)) for percent in percents)
        return start, end


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample of `[B, …]`, shaped to broadcast over it."""
    return per_sample(torch.linalg.vector_norm(x.flatten(1), dim=1), x)
