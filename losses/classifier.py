"""Classifier loss: the image shall be of a class.

    L = −log p(c | ·)

of the estimate x̂₀, for a classifier of clean images, or of the noisy x_t itself, for one that was trained on such and
is told the timestep: classifier guidance as in ADM (Dhariwal & Nichol, 2021, arXiv 2105.05233, section 4), where

    ε̂ = ε_θ(x_t) − √(1 − ᾱ_t) · ∇_{x_t} log p(c | x_t)        (algorithm 2)

Here the gradient alone is the loss's; how far to follow it is for the sampler's guidance to say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Loss, Step

__all__ = ["Classification"]


class Classification(Loss):
    """−log p(c) `[B]` of the class with the number `index`.

    network  images `[B, 3, H, W]` to logits `[B, C]`; or, if its `noise_aware` is set, noisy latents `[B, …]` and
             timesteps `[B]` to logits. p is a softmax, or a sigmoid if its `multi_label` is set.
    """

    def __init__(self, network: nn.Module, index: int, patchers: Sequence[object] = ()) -> None:
        super().__init__()
        self.network = network
        self.index = index
        self.patchers = tuple(patchers)
        self.space = "noisy" if network.noise_aware else "image"

    def forward(self, images: Tensor, step: Step | None = None) -> Tensor:
        if not self.network.noise_aware:
            logits = self.network(images)
        elif step is None or step.timestep is None:
            raise ValueError("a noise-aware classifier must be told the timestep, and none is given")
        else:
            logits = self.network(images, step.timestep)
        log_p = F.logsigmoid(logits) if self.network.multi_label else F.log_softmax(logits, dim=1)
        return -log_p[:, self.index].to(images.device)
