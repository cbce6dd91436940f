"""What a loss is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Loss"]


class Loss(nn.Module):
    """One number a sample, lower is better, differentiable with respect to what it judges.

    Called with images `[B, 3, H, W]`, nominally in 0..1 but not clamped, or, where `space` is "latent", with latents
    `[B, C, h, w]` as the model sees them. Returns `[B]`. Sample i of the batch decides loss i alone.

    What a loss compares with is encoded when it is made and kept in buffers. One object serves many runs, so a call
    leaves nothing behind. Networks that a loss looks through stay in ComfyUI's model management: their patchers are
    listed in `patchers`, for the sampler to load before it starts.
    """

    space = "image"
    patchers: tuple[Any, ...] = ()

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError
