"""DPS: Diffusion Posterior Sampling (Chung et al., ICLR 2023, arXiv 2209.14687), for samplers that add noise.

    x_next ← x_next − ζ·∇ₓL(x̂₀(x))         algorithm 1, line 7

for a state of unit variance. A state x = α·x₀ + σ·ε has the variance α² + σ², so with v = √(α² + σ²) that is
x_next − ζ·v·v_next·∇ₓL in ComfyUI's parametrisation. L is not squared: for a measurement it is ‖y − A(x̂₀)‖₂, and ζ is
the paper's ζ' (0.3 to 1 there).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import comfy.samplers
from torch import Tensor

from .kernel import Objective, ShiftedModel, deviation, steered
from .trace import Evaluation, GuidanceTrace

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
    return steered(sampler, posterior, trace, _Descending)


class _Descending(ShiftedModel):
    """Moves the state that a step led to against the gradient at which it began."""

    objective: Posterior

    def shift(self, at: Evaluation, sigma_next: Tensor) -> Tensor:
        v, v_next = (deviation(self.model.model_sampling, sigma) for sigma in (at.sigma.max(), sigma_next))
        return -self.objective.step_size * at.weight * v * v_next * at.gradient
