"""Latents to images with a gradient, through a loaded VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Decoder"]


class Decoder:
    """Decodes `[B, C, h, w]` latents, as they lie between sampler and VAE node, to images `[B, 3, H, W]`.

    `vae.decode` is no way for a gradient: it tiles when memory runs out, writes into a preallocated output and clamps.
    This is the network itself and the affine part of the VAE's output map, so values may leave 0..1. Latents of one
    frame `[B, C, 1, h, w]` are images too. Raises ValueError for several frames.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        # `process_output` without its clamp, read off at two values that no clamp touches.
        low, high = (float(vae.process_output(torch.tensor([value]))) for value in (0.25, 0.5))
        self.scale = (high - low) / 0.25
        self.shift = low - self.scale * 0.25

    @property
    def patcher(self) -> Any:
        return self.vae.patcher

    @property
    def module(self) -> nn.Module:
        return self.vae.first_stage_model

    def memory_required(self, shape: torch.Size) -> float:
        """Bytes that the host reserves for decoding latents of this shape."""
        return self.vae.memory_used_decode(shape, self.vae.vae_dtype)

    def __call__(self, latents: Tensor) -> Tensor:
        if latents.ndim == 5 and getattr(self.vae, "latent_dim", 2) == 2:
            latents = _only_frame(latents)
        images = self.module.decode(latents.to(device=self.patcher.load_device, dtype=self.vae.vae_dtype))
        images = images.to(latents) * self.scale + self.shift
        return _only_frame(images) if images.ndim == 5 else images


def _only_frame(video: Tensor) -> Tensor:
    if video.shape[2] != 1:
        raise ValueError(
            f"This loss looks at single images, and the latent is a video of {video.shape[2]} frames. Guide a latent "
            "of one frame."
        )
    return video[:, :, 0]
