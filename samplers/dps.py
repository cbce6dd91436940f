"""DPS: Diffusion Posterior Sampling (Chung et al., ICLR 2023, arXiv 2209.14687), for any sampler that adds noise.

    x_next ← x_next − ζ·∇ₓL(x̂₀(x))         algorithm 1, line 7

for a state of unit variance. A state x = α·x₀ + σ·ε has the variance α² + σ², so with v = √(α² + σ²) that is
x_next − ζ·v·v_next·∇ₓL in ComfyUI's parametrisation. L is not squared: for a measurement it is ‖y − A(x̂₀)‖₂, and ζ is
the paper's ζ' (0.3 to 1 there).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import comfy.samplers
import torch
from torch import Tensor

from .kernel import Evaluation, GuidedModel, Objective, levels, per_sample, steered
from .trace import GuidanceTrace

__all__ = ["Posterior", "posterior_guided"]


@dataclass(frozen=True)
class Posterior(Objective):
    """step_size  ζ ≥ 0; 0 is the unguided sampler, bit for bit"""

    METHOD: ClassVar[str] = "DPS Guidance"

    step_size: float = 1.0

    @property
    def off(self) -> bool:
        return self.step_size == 0


def posterior_guided(
    sampler: comfy.samplers.KSAMPLER, posterior: Posterior, trace: GuidanceTrace
) -> comfy.samplers.KSAMPLER:
    """`sampler`, guided by DPS. It keeps its options, and its function's signature stays visible to other packs."""
    return steered(sampler, posterior, trace, _Shifted)


class _Shifted(GuidedModel):
    """Moves the state that a step led to against the gradient at which it began."""

    objective: Posterior
    guides_last_step = True
    pending: Evaluation | None = None  # of the step that the sampler's draw has ended
    noise: Tensor | None = None

    def drawn(self, noise: Tensor, sigma_next: Tensor) -> Tensor:
        self.pending, self.noise = self.latest, noise
        return noise

    def arrived(self, x: Tensor, sigma: Tensor, **extra_args: object) -> None:
        if self.pending is not None:
            x.sub_(self._shift(self.pending, sigma.max()).to(x))
        self.pending = self.noise = None

    def finished(self, x: Tensor) -> Tensor:
        return x if self.latest is None else x - self._shift(self.latest, x.new_tensor(self.schedule[-1])).to(x)

    def _shift(self, at: Evaluation, sigma_next: Tensor) -> Tensor:
        usable = at.norm.isfinite() & (at.norm > 0)
        self.trace.record(at, sigma_next, self.noise, usable)
        gradient = torch.where(per_sample(usable, at.gradient) > 0, at.gradient, 0)
        weight = self.objective.step_size * at.weight
        return weight * self._deviation(at.sigma.max()) * self._deviation(sigma_next) * gradient

    def _deviation(self, sigma: Tensor) -> float:
        """v = √(α² + σ²) at that sigma."""
        return math.hypot(*levels(self.model.model_sampling, sigma))
