"""Latents to images with a gradient, through a loaded VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Decoder"]


class Decoder:
    """Decodes `[B, C, h, w]` latents, as they lie between sampler and VAE node, to images `[B, 3, H, W]`.

    `vae.decode` is no way for a gradient: it tiles when memory runs out, writes into a preallocated output and clamps.
    This is the network itself and the affine part of the VAE's output map, so values may leave 0..1.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @property
    def patcher(self) -> Any:
        return self.vae.patcher

    @property
    def module(self) -> nn.Module:
        return self.vae.first_stage_model

    def __call__(self, latents: Tensor) -> Tensor:
        images = self.module.decode(latents.to(device=self.patcher.load_device, dtype=self.vae.vae_dtype))
        scale, shift = self._output_map()
        return images.to(latents) * scale + shift

    def _output_map(self) -> tuple[float, float]:
        """`vae.process_output` without its clamp, read off at two values that no clamp touches."""
        low, high = (float(self.vae.process_output(torch.tensor([value]))) for value in (0.25, 0.5))
        scale = (high - low) / 0.25
        return scale, low - scale * 0.25
