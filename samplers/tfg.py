"""TFG: unified Training-Free Guidance (Ye et al., NeurIPS 2024, arXiv 2409.15761), for samplers that add noise.

In the step from ᾱ to ᾱ_next, with log f = −L and f̃(x₀) the mean of f(x₀ + σ̄·√(1−ᾱ)·δ) over Gaussian δ (algorithm 1):

    Δ_t = ρ_t·∇ₓ log f̃(x̂₀(x))                                          at x, through the model
    Δ₀ ← Δ₀ + μ_t·∇ log f̃(x̂₀ + Δ₀),   N_iter times, from 0              at x̂₀, without it
    x_next ← x_next + Δ_t/√a + √ᾱ_next·Δ₀,   a = ᾱ/ᾱ_next               and that N_recur times, noised anew in between

for a state of unit variance. A state x = α·x₀ + σ·ε has the variance v² = α² + σ², so ᾱ is α²/v², and in ComfyUI's
parametrisation x_next moves by v·v_next·Δ_t/√a + α_next·Δ₀. What ρ and μ are given as is the mean over the steps of
ρ_t and μ_t, which grow like a; so Δ_t/√a vanishes at pure noise. L is not squared: ‖y − A(x̂₀)‖₂ for a measurement.

Other methods are corners of this space. A preset sets what makes the corner; the rest comes from the settings.

    DPS      μ = 0, σ̄ = 0, N_recur = 1, ρ_t = ρ·√a, so that x_next moves by −ρ·∇ₓL: ρ is the ζ of DPS Guidance.
             (Chung et al., ICLR 2023, arXiv 2209.14687)
    LGD-MC   the same, with σ̄ = 1: δ has the deviation √(1−ᾱ) = r_t. (Song et al., ICML 2023)
    FreeDoM  μ = 0, σ̄ = 0, ρ_t = ρ·√(a·ᾱ): x_next moves by −ρ·√ᾱ·∇ₓL, the rate of its face models; N_recur is its time
             travel. (Yu et al., ICCV 2023, arXiv 2303.09833)
    MPGD     ρ = 0, σ̄ = 0, N_recur = 1, N_iter = 1, μ_t = μ: x̂₀ alone moves, and ε̂ stays. No backward pass through the
             model. (He et al., ICLR 2024, arXiv 2311.16424, without its autoencoders)
    UGD      σ̄ = 0; ε̂ moves by ρ·√(1−ᾱ)·∇ₓL − √(ᾱ/(1−ᾱ))·Δ₀, with N_iter descents of μ_t = μ. In a DDPM step (η = 1)
             ε̂ counts −(1−a)/√(a·(1−ᾱ)), so ρ_t = ρ·(1−a), and Δ₀ counts (1−a)/(1−ᾱ) of what it does in TFG: a part of
             μ_t for N_iter = 1, a factor beside TFG's space for more. (Bansal et al., 2023, arXiv 2302.07121)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ..losses.base import Step
from .kernel import Objective, ShiftedModel, deviation, levels, noise_of, per_sample, steered
from .trace import Evaluation, GuidanceTrace

__all__ = ["PRESETS", "Unified", "unified_guided"]

#: A number for a step from ᾱ to ᾱ_next, given the mean of a = ᾱ/ᾱ_next over the run.
Schedule = Callable[[float, float, float], float]


@dataclass(frozen=True)
class Corner:
    """What a preset sets: `settings` of `Unified`, ρ_t/(ρ·√a), μ_t/μ, and how much Δ₀ counts."""

    settings: dict[str, float] = field(default_factory=dict)
    outer: Schedule = lambda bar, bar_next, mean: math.sqrt(bar / bar_next) / mean
    inner: Schedule = lambda bar, bar_next, mean: bar / bar_next / mean
    share: Schedule = lambda bar, bar_next, mean: 1.0


def _one(bar: float, bar_next: float, mean: float) -> float:
    return 1.0


def _forward(bar: float, bar_next: float, mean: float) -> float:
    a = bar / bar_next
    return max(0.0, 1 - a) / math.sqrt(a) if a > 0 else 0.0  # pure noise: a move of ε̂ there is one of x̂₀ without end


def _backward(bar: float, bar_next: float, mean: float) -> float:
    return max(0.0, 1 - bar / bar_next) / (1 - bar) if bar < 1 else 0.0


PRESETS: dict[str, Corner] = {
    "custom": Corner(),
    "DPS": Corner({"mu": 0.0, "sigma_bar": 0.0, "n_recur": 1}, outer=_one),
    "LGD-MC": Corner({"mu": 0.0, "sigma_bar": 1.0, "n_recur": 1}, outer=_one),
    "FreeDoM": Corner({"mu": 0.0, "sigma_bar": 0.0}, outer=lambda bar, bar_next, mean: math.sqrt(bar)),
    "MPGD": Corner({"rho": 0.0, "sigma_bar": 0.0, "n_recur": 1, "n_iter": 1}, inner=_one),
    "UGD": Corner({"sigma_bar": 0.0}, outer=_forward, inner=_one, share=_backward),
}


@dataclass(frozen=True)
class Unified(Objective):
    """TFG's settings beside those of `Objective`. With rho and mu at 0 it is the unguided sampler, bit for bit.

    preset     one of PRESETS
    rho, mu    ρ and μ ≥ 0
    sigma_bar  σ̄ ≥ 0
    samples    how many δ make the mean; with one, L is that at one x̂₀ + σ̄·√(1−ᾱ)·δ. All samples of a batch share them,
               so that none depends on its neighbours.
    n_iter     N_iter ≥ 0
    n_recur    N_recur ≥ 1; 1 is no recurrence
    """

    METHOD: ClassVar[str] = "TFG Guidance"

    preset: str = "custom"
    rho: float = 1.0
    mu: float = 0.0
    sigma_bar: float = 0.0
    samples: int = 1
    n_iter: int = 4
    n_recur: int = 1

    @property
    def resolved(self) -> Unified:
        """With what the preset sets in its place."""
        filled = dataclasses.replace(self, **PRESETS[self.preset].settings)
        inner = filled.mu > 0 and filled.n_iter > 0 and filled.loss.space != "noisy"
        # Without Δ_t nothing asks for a backward pass through the model.
        return dataclasses.replace(
            filled, n_iter=filled.n_iter if inner else 0, gradient=filled.gradient if filled.rho else "fast"
        )

    @property
    def off(self) -> bool:
        filled = self.resolved
        return filled.rho == 0 and filled.n_iter == 0


def unified_guided(sampler: comfy.samplers.KSAMPLER, unified: Unified, trace: GuidanceTrace) -> comfy.samplers.KSAMPLER:
    """`sampler`, guided by TFG. It keeps its options, and its function's signature stays visible to other packs."""
    return steered(sampler, unified.resolved, trace, _Moved)


@dataclass(frozen=True)
class _Ascended(Evaluation):
    """With Δ₀ `[B, …]` of the same call: not finite for a sample whose gradient was not."""

    delta: Tensor


class _Moved(ShiftedModel):
    """Moves the state that a step led to by Δ_t and Δ₀ of its call."""

    objective: Unified
    differentiations = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.corner = PRESETS[self.objective.preset]
        bars = [self._bar(torch.tensor(sigma)) for sigma in self.schedule]
        mean = sum(bar / bar_next for bar, bar_next in itertools.pairwise(bars)) / (len(bars) - 1)
        self.mean = mean or 1.0  # 0 where the only step is one of a flow model from pure noise, and a with it

    def _bar(self, sigma: Tensor) -> float:
        alpha, noise = levels(self.model.model_sampling, sigma)
        return alpha**2 / (alpha**2 + noise**2)

    def _first(self, at: Evaluation) -> Tensor:
        return at.sigma.new_tensor(self.schedule[at.step])

    def arrived(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> None:
        super().arrived(x, sigma, **extra_args)
        self.repeat(x, sigma, self.objective.n_recur - 1, self._guided, **extra_args)

    def _guided(self, noise: Tensor, sigma_next: Tensor, at: _Ascended) -> tuple[Tensor, Tensor]:
        return noise, self.usable_shift(at, sigma_next, noise)

    def shift(self, at: _Ascended, sigma_next: Tensor) -> Tensor:
        sampling, sigma = self.model.model_sampling, at.sigma.max()
        # Where the step began: a second call of it may lie below where it ends (dpm_2_ancestral).
        step = self._bar(self._first(at)), self._bar(sigma_next), self.mean
        outer = self.objective.rho * at.weight * self.corner.outer(*step)
        outer *= deviation(sampling, sigma) * deviation(sampling, sigma_next)
        inner = self.corner.share(*step) * levels(sampling, sigma_next)[0]
        return inner * at.delta - (outer * at.gradient if outer else 0)

    def differentiated(self, x: Tensor, sigma: Tensor, weight: float, **extra_args: Any) -> tuple[Tensor, _Ascended]:
        self.differentiations += 1
        self.deviation = self.objective.sigma_bar * math.sqrt(1 - self._bar(sigma.max()))
        denoised, at = super().differentiated(x, sigma, weight, **extra_args)
        ascended = self._ascended(denoised, at)
        values = {entry.name: getattr(at, entry.name) for entry in dataclasses.fields(at)}
        return denoised, _Ascended(**values, delta=ascended)

    def _ascended(self, denoised: Tensor, at: Evaluation) -> Tensor:
        """Δ₀."""
        bar_next = self._bar(at.sigma.new_tensor(self.schedule[self.step + 1]))
        mu = self.objective.mu * at.weight * self.corner.inner(self._bar(self._first(at)), bar_next, self.mean)
        delta, good = torch.zeros_like(denoised), torch.ones(len(denoised), dtype=torch.bool, device=denoised.device)
        for i in range(self.objective.n_iter):
            if i:  # the first is that of the model call
                comfy.model_management.throw_exception_if_processing_interrupted()
                with self.recording(self.lenient):
                    self._loss(denoised + delta, self._loss_step(at.sigma))
            gradient = self.slope if at.free is None else self.slope * at.free
            good &= gradient.flatten(1).isfinite().all(1)
            delta = delta - mu * torch.where(per_sample(good, gradient) > 0, gradient, 0)
        return torch.where(per_sample(good, delta) > 0, delta, torch.nan)

    def _loss(self, denoised: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """−log f̃ `[B]` and its gradient, which stays in `slope`."""
        found = [super(_Moved, self)._loss(denoised + delta, step) for delta in self._smoothing(denoised)]
        losses, gradients = (torch.stack(values) for values in zip(*found, strict=True))
        shares = torch.softmax(-losses, 0)  # of the gradients in that of the log of the mean of exp(−L)
        shares = shares.reshape(*shares.shape, *[1] * (denoised.ndim - 1)).to(gradients)
        self.slope = (shares * gradients).sum(0)
        return math.log(len(losses)) - torch.logsumexp(-losses, 0), self.slope

    def _smoothing(self, denoised: Tensor) -> Tensor:
        """σ̄·√(1−ᾱ)·δ `[samples, 1, …]`, the same for all losses of a model call."""
        if self.deviation == 0:
            return denoised.new_zeros(1)
        shape = (self.objective.samples, 1, *denoised.shape[1:])
        return self.deviation * noise_of(shape, self.seed, self.differentiations, 1, 1).to(denoised)
