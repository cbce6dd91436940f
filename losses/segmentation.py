"""Segmentation loss: where on the image a segmentation network shall see what.

    L(x̂₀) = Σ_p w_p · CE(f(x̂₀)_p, y_p) / Σ_p w_p        per sample, over the pixels p that have a class

with f the network's logits, as in Universal Guidance (Bansal et al., 2023, arXiv 2302.07121) and DSG after
it (arXiv 2402.03201). Target y and weight w meet the logits on the grid of the network's input: that is as fine as the
network sees, and as it was trained, and 150 classes at the size of the image could fill the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Loss, Step, repeat

__all__ = ["UNLABELLED", "Segmentation", "from_colors", "layered"]

#: The class of pixels that have none: they don't count.
UNLABELLED = -1


class Segmentation(Loss):
    """Cross-entropy to a map of classes, mean over the labelled pixels; sample i is held against map i mod R.

    network  images `[B, 3, H, W]` to logits `[B, C, h, w]`
    target   `[R, H, W]`, integers: a class or `UNLABELLED`; brought to the logits' grid by its nearest pixels
    region   `[M, 1, h, w]`, ≥ 0, how much a place counts; brought there bilinearly, antialiased; None is 1 everywhere

    Raises ValueError if no pixel of a map counts; in `forward`, if none is left on that grid.
    """

    def __init__(
        self, network: nn.Module, target: Tensor, region: Tensor | None = None, patchers: Sequence[object] = ()
    ) -> None:
        super().__init__()
        counted = _weight(target, region, max(len(target), 0 if region is None else len(region)))
        for number, weight in enumerate(counted):
            if not (weight > 0).any():
                raise ValueError(
                    f"Segmentation Loss: no pixel of target {number + 1} of {len(counted)} has a class and counts. The "
                    "masks are empty, or the region leaves out all that has a class. Paint a mask, or set unlabelled "
                    "to a class."
                )
        self.network = network
        self.patchers = tuple(patchers)
        self.register_buffer("target", target, persistent=False)
        self.register_buffer("region", region, persistent=False)

    def forward(self, images: Tensor, step: Step | None = None) -> Tensor:
        logits = self.network(images).float()
        size, batch = logits.shape[-2:], len(logits)
        target = F.interpolate(self.target.to(logits.device)[:, None].float(), size=size, mode="nearest-exact")
        target = target[:, 0].long()
        weight = _weight(target, self.region, batch)
        entropy = F.cross_entropy(logits, repeat(target, batch), ignore_index=UNLABELLED, reduction="none")
        total = weight.flatten(1).sum(1)
        if not (total > 0).all():
            height, width = size
            raise ValueError(
                f"Segmentation Loss: on the {width}×{height} pixels that the network sees, no pixel of the target is "
                "left that has a class and counts. Make its areas larger."
            )
        return ((entropy * weight).flatten(1).sum(1) / total).to(images.device)


def _weight(target: Tensor, region: Tensor | None, batch: int) -> Tensor:
    """How much each pixel counts, `[batch, H, W]` on the grid of `target` `[R, H, W]`."""
    weight = repeat((target != UNLABELLED).float(), batch)
    if region is None:
        return weight
    region = region.to(weight)
    region = F.interpolate(region, size=target.shape[-2:], mode="bilinear", antialias=True, align_corners=False)
    return weight * repeat(region[:, 0], batch)


def from_colors(images: Tensor, colors: Iterable[tuple[int, str]], tolerance: int) -> Tensor:
    """A colour-coded map `[R, 3, H, W]` in 0..1 to classes `[R, H, W]`.

    A pixel gets the class of the nearest colour of `colors`, (class, "#rrggbb") pairs, if no channel is further from it
    than `tolerance` of 255; else it is `UNLABELLED`.
    """
    images = images * 255
    target = torch.full(images[:, 0].shape, UNLABELLED, dtype=torch.long, device=images.device)
    nearest = torch.full_like(images[:, 0], torch.inf)
    for index, color in colors:
        rgb = torch.tensor(list(bytes.fromhex(color[1:]))).to(images).reshape(1, 3, 1, 1)
        difference = (images - rgb).abs()
        distance = difference.square().sum(1)
        hit = (difference.amax(1) <= tolerance + 0.5) & (distance < nearest)
        target = torch.where(hit, index, target)
        nearest = torch.where(hit, distance, nearest)
    return target


def layered(maps: Sequence[Tensor]) -> Tensor:
    """Maps `[R_i, H_i, W_i]`, each painted over those before it where it has a class; at the largest of their sizes."""
    size = max((layer.shape[-2:] for layer in maps), key=lambda size: size[0] * size[1])
    batch = max(map(len, maps))
    result = torch.full((batch, *size), UNLABELLED, dtype=torch.long, device=maps[0].device)
    for layer in maps:
        layer = F.interpolate(layer[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()
        layer = repeat(layer.to(result.device), batch)
        result = torch.where(layer == UNLABELLED, result, layer)
    return result
