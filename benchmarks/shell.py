"""Whether a sampler's steps stay on the shell that its noise concentrates on."""

from __future__ import annotations

from typing import Any

import torch
from comfy.k_diffusion.sampling import get_ancestral_step
from sphereguide.samplers.epsilon import with_post_cfg
from torch import Tensor

__all__ = ["Shell"]


class Shell:
    """Watches a run of euler_ancestral, however it is guided, on a model of noise added to x₀."""

    def __init__(self) -> None:
        self._at: dict[float, tuple[Tensor, Tensor]] = {}

    def watched(self, sampler: Any) -> Any:
        def note(args: dict[str, Any], sigmas: list[float]) -> Tensor:
            # The sampler's own call is the last at its noise level; those of a method come before.
            self._at[float(args["sigma"].max())] = args["input"].detach().clone(), args["denoised"].detach().clone()
            return args["denoised"]

        return with_post_cfg(sampler, note)

    def radii(self, sigmas: Tensor) -> Tensor:
        """‖x_next − μ‖/(c·√n), `[steps − 1, B]`: 1 for Gaussian noise."""
        radii, seen = [], list(self._at.values())
        for i in range(len(sigmas) - 2):
            (x, denoised), (reached, _) = seen[i], seen[i + 1]
            down, up = get_ancestral_step(sigmas[i], sigmas[i + 1])
            off = reached - (denoised + down / sigmas[i] * (x - denoised))
            radii.append(off.flatten(1).square().mean(1).sqrt() / up)
        return torch.stack(radii)

    @staticmethod
    def off(radii: Tensor, elements: int) -> Tensor:
        """Which of them no Gaussian noise of so many elements has: off by more than three of its deviations, or NaN."""
        return ~((radii - 1).abs() <= 3 / (2 * elements) ** 0.5)
