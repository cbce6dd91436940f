"""What a loss is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Loss", "Step", "repeat"]


class Step:
    """The sampling step that asks, for the losses that depend on it.

    index     in the sampler's schedule, from 0
    progress  through the model's noise schedule, 0 at pure noise and 1 at the image: what start_percent counts in. May
              be given as a function, which is called when a loss asks.
    seed      of the run
    timestep  `[B]`, what the model is told of the noise level (for losses on noisy latents)
    memory    what losses remember within a run, by loss: empty when a run begins, so that the losses stay stateless
    """

    def __init__(
        self,
        index: int = 0,
        progress: float | Callable[[], float] = 0.0,
        seed: int = 0,
        timestep: Tensor | None = None,
        memory: dict[Any, Any] | None = None,
    ) -> None:
        self.index = index
        self.seed = seed
        self.timestep = timestep
        self.memory: dict[Any, Any] = {} if memory is None else memory
        self._progress = progress

    def within(self, part: Any) -> Step:
        """The same step, with a memory of its own for what `part` shows of the image."""
        memory = self.memory.setdefault(part, {})
        return Step(self.index, lambda: self.progress, self.seed, self.timestep, memory)

    @functools.cached_property
    def progress(self) -> float:
        return self._progress() if callable(self._progress) else self._progress


class Loss(nn.Module):
    """One number a sample, lower is better, differentiable with respect to what it judges.

    Called with what `space` names and, where the step matters, a `Step`. Returns `[B]`. Sample i of the batch decides
    loss i alone.

        "image"   images `[B, 3, H, W]`, nominally in 0..1 but not clamped
        "latent"  latents `[B, C, h, w]` as the model sees them
        "noisy"   the noisy latents `[B, C, h, w]`, scaled as the model's network sees them

    What a loss compares with is encoded when it is made and kept in buffers. One object serves many runs, so a call
    leaves nothing behind but in `step.memory`. Networks that a loss looks through stay in ComfyUI's model management:
    their patchers are listed in `patchers`, for the sampler to load before it starts.
    """

    space: Literal["image", "latent", "noisy"] = "image"
    patchers: tuple[Any, ...] = ()

    def weight(self, step: Step) -> float:
        """How much of the guidance's strength this step gets. `forward` leaves it out. At 0 the loss isn't asked."""
        return 1.0

    def forward(self, images: Tensor, step: Step | None = None) -> Tensor:
        raise NotImplementedError


def repeat(tensor: Tensor, batch: int) -> Tensor:
    """Entry i of the result is entry i mod len(tensor): a batch of references beside a batch of samples."""
    return tensor[torch.arange(batch, device=tensor.device) % len(tensor)] if len(tensor) != batch else tensor
