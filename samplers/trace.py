"""What guidance did, step by step: the content of a GUIDANCE_TRACE socket."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["GuidanceTrace", "GuidedStep"]

log = logging.getLogger("sphereguide")


@dataclass
class GuidedStep:
    """One noise draw that followed a guided model call. Lists have one entry a sample of the batch.

    step            index in the schedule, 0 the noisiest
    sigma           noise level of the model call
    sigma_next      noise level that the draw leads to
    loss            L(x̂₀)
    gradient_norm   ‖∇L‖₂
    radius          ‖ε'‖/√n: 1 on the sphere
    skipped         the gradient was zero or not finite, and the noise was left alone
    """

    step: int
    sigma: float
    sigma_next: float
    loss: list[float]
    gradient_norm: list[float]
    radius: list[float]
    skipped: list[bool]


@dataclass
class GuidanceTrace:
    """Emptied when a run begins, filled while it samples, read by the nodes behind the sampler."""

    _records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> list[GuidedStep]:
        return [
            GuidedStep(**{name: v.tolist() if isinstance(v, Tensor) else v for name, v in record.items()})
            for record in self._records
        ]

    def clear(self) -> None:
        self._records.clear()

    def record(
        self,
        step: int,
        sigma: Tensor,
        sigma_next: Tensor,
        loss: Tensor,
        gradient_norm: Tensor,
        usable: Tensor,
        noise: Tensor,
        free: Tensor | None,
    ) -> None:
        """Tensors stay on their device until `steps` is read.

        `usable` `[B]`: where the gradient was. `noise` `[B, …]`: ε'. `free`: the coordinates that were guided, or None.
        """
        guided = torch.ones_like(noise, dtype=torch.bool) if free is None else free
        radius = (noise * guided).flatten(1).square().sum(1).div(guided.flatten(1).sum(1)).sqrt()
        values = {"sigma": sigma.max(), "sigma_next": sigma_next, "loss": loss, "gradient_norm": gradient_norm}
        self._records.append({"step": step, **values, "radius": radius, "skipped": ~usable})

    def warn_of_skipped_steps(self) -> None:
        """One warning a run, if any draw was left alone."""
        steps = self.steps
        skipped = sum(any(step.skipped) for step in steps)
        if skipped:
            log.warning(
                "DSG Guidance: in %d of %d guided steps the gradient of the loss was zero or not finite, and the noise "
                "was left as it was. The loss may not depend on the image, be already fulfilled, or have given NaN.",
                skipped,
                len(steps),
            )
