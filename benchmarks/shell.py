"""Whether a sampler's steps stay on the shell that its noise concentrates on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy.k_diffusion.sampling import get_ancestral_step
from sphereguide.samplers.epsilon import with_post_cfg
from torch import Tensor

__all__ = ["Shell"]


@dataclass(frozen=True)
class _State:
    """Of a step: its level, what the sampler asked about, and the answer."""

    sigma: float
    x: Tensor
    denoised: Tensor


class Shell:
    """Watches a run of euler_ancestral, however it is guided, on a model of noise added to x₀."""

    def __init__(self) -> None:
        self._before: _State | None = None
        self._at: _State | None = None
        self._radii: list[Tensor] = []

    def watched(self, sampler: Any) -> Any:
        def note(args: dict[str, Any], sigmas: list[float]) -> Tensor:
            # The sampler's own call is the last at its noise level; those of a method come before.
            state = _State(
                float(args["sigma"].max()), args["input"].detach().clone(), args["denoised"].detach().clone()
            )
            if self._at is not None and self._at.sigma != state.sigma:
                self._ended()
            self._at = state
            return args["denoised"]

        return with_post_cfg(sampler, note)

    def _ended(self) -> None:
        """The step of the latest state: kept is what its radius needs, as all states would take gigabytes."""
        assert self._at is not None
        if self._before is not None:
            one, other = self._before, self._at
            down, up = get_ancestral_step(one.sigma, other.sigma)
            off = other.x - (one.denoised + down / one.sigma * (one.x - one.denoised))
            self._radii.append(off.flatten(1).square().mean(1).sqrt() / up)
        self._before, self._at = self._at, None

    def radii(self) -> Tensor:
        """‖x_next − μ‖/(c·√n), `[steps − 1, B]`: 1 for Gaussian noise. Once, after the run."""
        self._ended()
        return torch.stack(self._radii)

    @staticmethod
    def off(radii: Tensor, elements: int) -> Tensor:
        """Which of them no Gaussian noise of so many elements has: off by more than three of its deviations, or NaN."""
        return ~((radii - 1).abs() <= 3 / (2 * elements) ** 0.5)
