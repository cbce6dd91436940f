"""ComfyUI's IMAGE and MASK tensors, and the ones that the losses take."""

from __future__ import annotations

from torch import Tensor

__all__ = ["from_image", "from_mask", "to_image"]


def from_image(image: Tensor) -> Tensor:
    """IMAGE `[B, H, W, C]` to `[B, 3, H, W]`; an alpha channel is dropped."""
    return image[..., :3].movedim(-1, 1)


def to_image(images: Tensor) -> Tensor:
    """`[B, 3, H, W]` to IMAGE `[B, H, W, 3]`."""
    return images.movedim(1, -1)


def from_mask(mask: Tensor) -> Tensor:
    """MASK `[B, H, W]`, or `[H, W]` as some nodes give it, to `[B, 1, H, W]`."""
    return mask.reshape(-1, 1, *mask.shape[-2:])
