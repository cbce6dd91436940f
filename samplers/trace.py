"""What guidance did, step by step: the content of a GUIDANCE_TRACE socket."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import host

__all__ = ["Evaluation", "GuidanceTrace", "GuidedStep"]

log = logging.getLogger("sphereguide")


@dataclass(frozen=True)
class Evaluation:
    """A guided model call: what the noise that is drawn after it, or the next step, needs to know.

    step, sigma     index in the schedule, and `[B]`
    loss, gradient  `[B]` and `[B, …]`: ∇ₓL, for "fast" with respect to x̂₀
    free            where the denoise mask leaves a choice, `[B, …]` of bool; None without a mask
    weight          the loss's own weight at this step
    """

    step: int
    sigma: Tensor
    loss: Tensor
    gradient: Tensor
    free: Tensor | None
    weight: float

    @functools.cached_property
    def norm(self) -> Tensor:
        """‖∇L‖ `[B]`."""
        return torch.linalg.vector_norm(self.gradient.flatten(1), dim=1)


@dataclass
class GuidedStep:
    """What followed a guided model call. Lists have one entry a sample of the batch.

    step            index in the schedule, 0 the noisiest
    sigma           noise level of the model call
    sigma_next      noise level that the draw leads to
    loss            L(x̂₀)
    gradient_norm   ‖∇L‖₂
    radius          ‖ε'‖/√n: 1 on the sphere; NaN in a step that draws no noise
    rate            how far the noise was turned, DSG's guidance_rate of this step; NaN for other methods
    skipped         the gradient was zero or not finite, and the step was left alone
    """

    step: int
    sigma: float
    sigma_next: float
    loss: list[float]
    gradient_norm: list[float]
    radius: list[float]
    rate: list[float]
    skipped: list[bool]


@dataclass
class GuidanceTrace:
    """Emptied when a run begins, filled while it samples, read by the nodes behind the sampler.

    A run that is cancelled or fails leaves what it had until then, and `finished` false.

    node    the id of its node in the prompt. The page that runs it gets an event `sphereguide.trace` when a run begins,
            `{node, steps, workflow}`, and at each guided step, with `step` and `loss`: one a sample, None where not
            finite.
    """

    node: str | None = None
    method: str = ""
    scheduled: int = 0
    finished: bool = False
    _records: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether any step was guided."""
        return bool(self._records)

    @property
    def steps(self) -> list[GuidedStep]:
        return [
            GuidedStep(**{name: v.tolist() if isinstance(v, Tensor) else v for name, v in record.items()})
            for record in self._records
        ]

    def begin(self, method: str, scheduled: int) -> None:
        """scheduled: the number of steps in the schedule."""
        self.method, self.scheduled, self.finished = method, scheduled, False
        self._records.clear()
        self._tell()

    def record(
        self, at: Evaluation, sigma_next: Tensor, noise: Tensor | None, usable: Tensor, rate: Tensor | None = None
    ) -> None:
        """Tensors stay on their device until `steps` is read.

        `noise` `[B, …]`: ε', None in a step without. `usable` `[B]`: where the gradient was. `rate` `[B]`: DSG's.
        """
        radius = torch.full_like(at.loss, torch.nan)
        if noise is not None:
            guided = torch.ones_like(noise, dtype=torch.bool) if at.free is None else at.free
            radius = (noise * guided).flatten(1).square().sum(1).div(guided.flatten(1).sum(1)).sqrt()
        values = {"sigma": at.sigma.max(), "sigma_next": sigma_next, "loss": at.loss, "gradient_norm": at.norm}
        rate = torch.full_like(at.loss, torch.nan) if rate is None else rate
        self._records.append({"step": at.step, **values, "radius": radius, "rate": rate, "skipped": ~usable})
        self._tell(at)

    def _tell(self, at: Evaluation | None = None) -> None:
        if self.node is None:
            return
        data: dict[str, Any] = {"node": self.node, "steps": self.scheduled}
        if at is None:
            data["workflow"] = host.running_workflow()
        else:  # JSON, as pages read it, has no NaN
            loss = [value if math.isfinite(value) else None for value in at.loss.tolist()]
            data |= {"step": at.step, "loss": loss}
        host.tell("sphereguide.trace", data)

    def warn_of_skipped_steps(self) -> None:
        """One warning a run, if any draw was left alone."""
        steps = self.steps
        skipped = sum(any(step.skipped) for step in steps)
        if skipped:
            log.warning(
                "%s: in %d of %d guided steps the gradient of the loss was zero or not finite, and the step was left "
                "as it was. The loss may not depend on the image, be already fulfilled, or have given NaN.",
                self.method,
                skipped,
                len(steps),
            )

    def summary(self) -> str:
        """What happened, in words and numbers: a line for the run, and one for each sample."""
        steps = self.steps
        if not steps:
            return "No run yet." if not self.method else f"{self.method}: no step was guided."
        state = "" if self.finished else f", cancelled or failed after sigma {steps[-1].sigma:.3g}"
        guided = len({step.step for step in steps})
        lines = [
            f"{self.method}: {guided} step{'' if guided == 1 else 's'} guided, sigma {steps[0].sigma:.3g} to "
            f"{steps[-1].sigma:.3g}{state}"
        ]
        for i in range(len(steps[0].loss)):
            skipped = sum(step.skipped[i] for step in steps)
            radii = [abs(step.radius[i] - 1) for step in steps if not math.isnan(step.radius[i])]
            rates = [step.rate[i] for step in steps]
            turned = f", guidance_rate {min(rates):.2g} to {max(rates):.2g}" if min(rates) < max(rates) else ""
            lines.append(
                f"sample {i + 1}: loss {steps[0].loss[i]:.4g} to {steps[-1].loss[i]:.4g}, gradient norm "
                f"{steps[0].gradient_norm[i]:.3g} to {steps[-1].gradient_norm[i]:.3g}, radius error at most "
                f"{max(radii, default=math.nan):.1g}{turned}, {skipped or 'no'} step{'' if skipped == 1 else 's'} "
                "skipped"
            )
        return "\n".join(lines)
