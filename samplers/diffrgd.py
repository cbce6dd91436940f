"""DiffRGD: guidance through Riemannian gradient descent (Liao et al., ECCV 2026, arXiv 2606.28417).

A stochastic step is x_next = μ + c·ε. The length r = ‖x_next − μ‖ that was sampled stays; on the sphere of that radius
around μ, the loss descends K times, per sample (algorithm 1), with u = x − μ:

    g = ∇ₓ L(x̂₀(x))              at x_next: a model call at sigma_next, and its backward pass
    grad = g − ⟨g, u⟩·u/‖u‖²      the projection of g on the tangent space of the sphere
    x ← μ + r·(u − η·grad)/‖u − η·grad‖      the step, and the retraction

for a state of unit variance. A state x = α·x₀ + σ·ε has the variance v² = α² + σ², so in ComfyUI's parametrisation η·v²
is in the place of η. L is not squared: for a measurement it is ‖y − A(x̂₀)‖₂, as in the paper's code.

μ is x − c·ε, and c is found by a run of the sampler on a model that answers zero: so no sampler is copied, and those
are guided whose steps show their mean. The step to sigma 0 draws no noise and is not guided.

A guided step takes K + 1 model calls: one at each of the K states from which the loss descends, and the sampler's own
at the state where that ends. Where nothing moves any more (the gradient is zero, or not finite) it ends at once, at the
state of the latest of those calls, and the sampler is answered from that.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import comfy.samplers
import torch
from torch import Tensor

from .kernel import GuidedModel, Objective, deviation, per_sample, steered
from .trace import GuidanceTrace

__all__ = ["Riemannian", "descended", "riemannian_guided"]


@dataclass(frozen=True)
class Riemannian(Objective):
    """DiffRGD's settings beside those of `Objective`.

    step_size   η ≥ 0; 0 is the unguided sampler, bit for bit
    iterations  K ≥ 1
    """

    METHOD: ClassVar[str] = "DiffRGD Guidance"

    step_size: float = 5.0
    iterations: int = 3

    @property
    def off(self) -> bool:
        return self.step_size == 0 or self.iterations == 0


def descended(u: Tensor, gradient: Tensor, step: float) -> Tensor:
    """u from the sphere's centre to x `[B, …]`, after one step of that size: of the same length, per sample."""
    square, radius = _dot(u, u), _dot(u, u).sqrt()
    tangent = gradient - _dot(gradient, u) / square * u
    moved = u - step * tangent
    return radius * moved / _dot(moved, moved).sqrt()


def riemannian_guided(
    sampler: comfy.samplers.KSAMPLER, riemannian: Riemannian, trace: GuidanceTrace
) -> comfy.samplers.KSAMPLER:
    """`sampler`, guided by DiffRGD. It keeps its options, and its function's signature stays visible to other packs."""
    return steered(sampler, riemannian, trace, _OnSphere)


@dataclass(frozen=True)
class _Guided:
    """A call of the sampler whose step is to be guided."""

    step: int
    weight: float
    extra_args: dict[str, Any]


@dataclass(frozen=True)
class _Drawn:
    """ε and its share c in the state that the sampler makes of it."""

    of: _Guided
    noise: Tensor
    c: float


class _OnSphere(GuidedModel):
    """Moves the state that a step led to on the sphere of its noise, down the loss there."""

    objective: Riemannian
    pending: _Drawn | None = None
    last_drawn = -1  # the latest step whose noise counted
    known: tuple[Tensor, Tensor, Tensor] | None = None  # the latest model call: x, sigma and its answer

    def evaluated(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> tuple[Tensor, _Guided | None]:
        """The sampler's own call. It needs no gradient: that is taken where its step leads to."""
        weight, known, self.known = self.weight(sigma), self.known, None
        if known is not None and torch.equal(known[0], x) and torch.equal(known[1], sigma):
            denoised = known[2]
        else:
            denoised = self.wrapped(x, sigma, **extra_args)
        return denoised, _Guided(self.step, weight, extra_args) if weight else None

    def drawn(self, noise: Tensor, sigma_next: Tensor) -> Tensor:
        c = self.rehearsal.shares.get(self.draws - 1, math.nan)
        # exp_heun_2_x0_sde uses a step's first noise again, beside that of a share of zero.
        if not math.isfinite(c) or (c == 0 and self.last_drawn == self.latest.step):
            raise ValueError(
                f"{self.objective.METHOD}: this sampler adds its noise in a way that does not show the mean of its "
                "step. Take another sampler, or DSG Guidance, which does not ask for it."
            )
        self.pending = _Drawn(self.latest, noise.clone(), c) if c else None
        self.last_drawn = self.latest.step if c else self.last_drawn
        return noise

    def arrived(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            x.copy_(self._moved(pending, x, sigma, **extra_args))

    def finished(self, x: Tensor) -> Tensor:
        if self.pending is None:
            return x
        sigma = x.new_full((len(x),), self.schedule[-1])
        return self._moved(self.pending, x, sigma, **self.pending.of.extra_args)

    def _moved(self, drawn: _Drawn, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        step_size = self.objective.step_size * drawn.of.weight * deviation(self.model.model_sampling, sigma.max()) ** 2
        free = self._free_coordinates(x, sigma, **extra_args)
        free = torch.ones_like(x, dtype=torch.bool) if free is None else free
        u = drawn.c * drawn.noise.to(x)
        mean, radius = x - u, _dot(u * free, u).sqrt()
        unit = radius / _dot(free.to(x), free.to(x)).sqrt()  # the radius of the sphere where ε' has length √n
        for _ in range(self.objective.iterations):
            denoised, at = self.differentiated(x, sigma, drawn.of.weight, **extra_args)
            self.known = x.clone(), sigma, denoised
            usable = at.norm.isfinite() & (at.norm > 0) & (radius.flatten() > 0)
            changed = mean + descended((x - mean) * free, at.gradient.to(x), step_size)
            changed = torch.where(free & (per_sample(usable, x) > 0), changed, x)
            at = dataclasses.replace(at, step=drawn.of.step)
            self.trace.record(at, sigma.max(), (changed - mean) / unit, usable)
            if torch.equal(changed, x):
                break
            x = changed
        return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of each sample of `[B, …]`, shaped to broadcast over it."""
    return per_sample((a * b).flatten(1).sum(1), a)
