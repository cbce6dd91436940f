"""Latents to images with a gradient, through a loaded VAE."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from comfy.taesd.taesd import TAESD
from torch import Tensor, nn

__all__ = ["Decoder"]

_KEPT, _KEPT_OF_TAESD = 2.7, 0.25
"""Of what the host reserves for decoding one sample, the same for both: measured on the VAE of SD1.5, and its TAESD."""


class Decoder:
    """Decodes `[B, C, h, w]` latents, as they lie between sampler and VAE node, to images `[B, 3, H, W]`.

    `vae.decode` is no way for a gradient: it tiles when memory runs out, writes into a preallocated output and clamps.
    This is the network itself and the affine part of the VAE's output map, so values may leave 0..1. Latents of one
    frame `[B, C, 1, h, w]` are images too. Raises ValueError for several frames.

    size  in (0, 1]: latents are shrunk by it before they are decoded, and the images enlarged again
    """

    def __init__(self, vae: Any, size: float = 1.0) -> None:
        self.vae = vae
        self.size = size
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
        """Bytes that autograd keeps of latents of this shape, decoded at once."""
        one = torch.Size((1, *shape[1:-2], *self._small(shape)))
        kept = _KEPT_OF_TAESD if isinstance(self.module, TAESD) else _KEPT
        return shape[0] * kept * self.vae.memory_used_decode(one, self.vae.vae_dtype)

    def _small(self, shape: torch.Size) -> list[int]:
        return [max(1, round(side * self.size)) for side in shape[-2:]]

    def __call__(self, latents: Tensor) -> Tensor:
        if latents.ndim == 5 and getattr(self.vae, "latent_dim", 2) == 2:
            latents = _only_frame(latents)
        whole, small = latents.shape[-2:], self._small(latents.shape)
        if self.size < 1:
            frames = _only_frame(latents) if latents.ndim == 5 else latents
            frames = F.interpolate(frames, size=small, mode="bicubic", antialias=True)
            latents = frames[:, :, None] if latents.ndim == 5 else frames
        images = self._decoded(latents.to(device=self.patcher.load_device, dtype=self.vae.vae_dtype))
        images = images.to(latents) * self.scale + self.shift
        images = _only_frame(images) if images.ndim == 5 else images
        if self.size < 1:
            size = [side * full // part for side, full, part in zip(images.shape[-2:], whole, small, strict=True)]
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        return images

    def _decoded(self, latents: Tensor) -> Tensor:
        try:
            return self.module.decode(latents)
        except RuntimeError as error:
            if "channels" not in str(error):
                raise
            raise ValueError(
                f"This VAE does not decode latents of {latents.shape[1]} channels. Connect the VAE of the model that "
                "samples, or its TAESD VAE."
            ) from error


def _only_frame(video: Tensor) -> Tensor:
    if video.shape[2] != 1:
        raise ValueError(
            f"This loss looks at single images, and the latent is a video of {video.shape[2]} frames. Guide a latent "
            "of one frame."
        )
    return video[:, :, 0]
