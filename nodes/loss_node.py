"""What the nodes that make a loss have in common."""

from __future__ import annotations

__all__ = ["LossNode"]


class LossNode:
    CATEGORY = "SphereGuide/losses"
    FUNCTION = "make"
    RETURN_TYPES = ("GUIDANCE_LOSS",)
    RETURN_NAMES = ("loss",)
    OUTPUT_TOOLTIPS = ("For the loss input of a guidance node. That node needs the VAE too.",)
