"""Losses in the embedding space of a CLIP model (Radford et al., arXiv 2103.00020): agreement with texts or pictures.

With f the embedding of a view of the estimate (the whole image, or a cutout) and t that of a target, both of unit
length:

    spherical   D(f, t) = 2·arcsin²(‖f − t‖/2)        half the squared angle, as in CLIP-guided diffusion
    cosine      D(f, t) = 1 − f·t

    L(x̂₀) = mean over views of  Σ_j w_j·D(f, t_j)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Loss, Step, repeat

__all__ = ["DISTANCES", "CLIPImage", "CLIPText", "Cutouts", "cosine", "spherical"]


def spherical(a: Tensor, b: Tensor) -> Tensor:
    """2·arcsin²(‖a − b‖/2) of unit vectors `[…, D]`, 0..π²/2."""
    # The same angle by Kahan's formula: arcsin and the norm have gradients that are infinite at either end.
    difference, total = torch.linalg.vector_norm(a - b, dim=-1), torch.linalg.vector_norm(a + b, dim=-1)
    return 2 * torch.atan2(difference, total).square()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """1 − a·b of unit vectors `[…, D]`, 0..2."""
    return 1 - (a * b).sum(-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"spherical": spherical, "cosine": cosine}


@dataclass(frozen=True)
class Cutouts:
    """The views of an image that a network is shown.

    count              random squares of the image; 0: one view, the whole image
    smallest, largest  side of a square as a share of the image's shorter side, 0 < smallest ≤ largest ≤ 1, uniform
    augment            turn each by up to 10°, shift it by up to 5 %, mirror one in two, change brightness and contrast
                       by up to 10 %, add noise of std .02

    Seed and index of the step decide the draws, and all samples of a batch share them, so that a sample's loss does
    not depend on its place in the batch.

    Raises ValueError for shares out of range.
    """

    count: int = 0
    smallest: float = 0.5
    largest: float = 1.0
    augment: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.largest <= 1:
            raise ValueError(
                f"the smallest cutout ({self.smallest:g}) must be above 0, and not larger than the largest "
                f"({self.largest:g}), which is 1 at most"
            )

    def __call__(self, images: Tensor, size: tuple[int, int], step: Step) -> Tensor:
        """`[B, 3, H, W]` to `[max(count, 1)·B, 3, …]`, the views of a batch one after the other; cutouts at `size`."""
        if not self.count:
            return images
        generator = torch.Generator().manual_seed((step.seed + (step.index + 1) * 0x9E3779B97F4A7C15) % 2**64)
        height, width = images.shape[-2:]
        shares, tops, lefts = torch.rand(3, self.count, generator=generator).tolist()
        views = []
        for share, top, left in zip(shares, tops, lefts, strict=True):
            side = max(1, round((self.smallest + share * (self.largest - self.smallest)) * min(height, width)))
            top, left = int(top * (height - side + 1)), int(left * (width - side + 1))
            square = images[..., top : top + side, left : left + side].float()
            views.append(F.interpolate(square, size=size, mode="bicubic", antialias=True, align_corners=False))
        return self._augmented(torch.stack(views), generator).flatten(0, 1) if self.augment else torch.cat(views)

    def _augmented(self, views: Tensor, generator: torch.Generator) -> Tensor:
        """`[K, B, 3, h, w]`: view k of each sample is changed in the same way."""
        count, batch = views.shape[:2]
        angle, right, down, brightness, contrast = 2 * torch.rand(5, count, generator=generator) - 1
        mirror = 1 - 2 * torch.randint(2, (count,), generator=generator)
        noise = torch.randn(count, 1, *views.shape[2:], generator=generator)
        cos, sin = (angle * math.radians(10)).cos(), (angle * math.radians(10)).sin()
        # Shifts in the units of `affine_grid`, in which the image is 2 wide.
        theta = torch.stack([mirror * cos, -sin, 0.1 * right, mirror * sin, cos, 0.1 * down], dim=1)
        theta = theta.reshape(count, 1, 2, 3).expand(-1, batch, -1, -1).flatten(0, 1).to(views)
        flat = views.flatten(0, 1)
        grid = F.affine_grid(theta, list(flat.shape), align_corners=False)
        views = F.grid_sample(flat, grid, padding_mode="reflection", align_corners=False).reshape(views.shape)
        brightness, contrast = (0.1 * value.to(views).reshape(-1, 1, 1, 1, 1) for value in (brightness, contrast))
        return (views - 0.5) * (1 + contrast) + 0.5 + brightness + 0.02 * noise.to(views)


class _CLIP(Loss):
    """Distance of an image's views to embeddings.

    tower     images `[N, 3, H, W]` to unit embeddings `[N, D]`, float32; has `image_size` (h, w)
    patcher   of the tower, for the sampler to load
    targets   `[T, D]`, unit length
    """

    def __init__(self, tower: nn.Module, patcher: Any, targets: Tensor, cutouts: Cutouts, distance: str) -> None:
        super().__init__()
        self.tower = tower
        self.patchers = (patcher,)
        self.register_buffer("targets", targets, persistent=False)
        self.cutouts = cutouts
        self.distance = distance

    def distances(self, images: Tensor, targets: Tensor, step: Step | None) -> Tensor:
        """`[B, T]`, averaged over views, of images `[B, 3, H, W]` to targets `[T, D]`, or `[B, T, D]` of their own."""
        views = self.cutouts(images, self.tower.image_size, step or Step())
        embeddings = self.tower(views).unflatten(0, (-1, len(images)))
        distances = DISTANCES[self.distance](embeddings[..., None, :], targets.to(embeddings))
        return distances.mean(0).to(images.device)


class CLIPText(_CLIP):
    """Distance to texts, less that to negative ones.

        L = P − negative_weight·N        P, N: Σ_j w_j·D(f, t_j) / Σ_j |w_j| over the texts and the negative texts

    targets, weights    `[T, D]` and as many numbers, at least one of them not 0; below 0 moves away
    negative, negative_weights   the same of the negative texts; none of them is fine
    negative_weight     in [0, 1]: above 1, getting away would count for more than getting there
    """

    def __init__(
        self,
        tower: nn.Module,
        patcher: Any,
        targets: Tensor,
        weights: list[float],
        cutouts: Cutouts,
        distance: str = "spherical",
        negative: Tensor | None = None,
        negative_weights: list[float] | None = None,
        negative_weight: float = 0.5,
    ) -> None:
        shares = _shares(weights)
        if negative is not None and negative_weights:
            targets = torch.cat([targets, negative])
            shares = [*shares, *(-negative_weight * share for share in _shares(negative_weights))]
        super().__init__(tower, patcher, targets, cutouts, distance)
        self.weights = shares

    def forward(self, images: Tensor, step: Step | None = None) -> Tensor:
        distances = self.distances(images, self.targets, step)
        return distances @ distances.new_tensor(self.weights)


class CLIPImage(_CLIP):
    """Distance to reference pictures, which were embedded whole.

    targets     `[R, D]`
    per_sample  sample i is held against reference i mod R; otherwise each against the average over all, where the
                distances are averaged, not the references
    """

    def __init__(
        self,
        tower: nn.Module,
        patcher: Any,
        targets: Tensor,
        cutouts: Cutouts,
        distance: str = "spherical",
        per_sample: bool = False,
    ) -> None:
        super().__init__(tower, patcher, targets, cutouts, distance)
        self.per_sample = per_sample

    def forward(self, images: Tensor, step: Step | None = None) -> Tensor:
        targets = self.targets
        if self.per_sample:
            targets = repeat(targets, len(images))[:, None]
        return self.distances(images, targets, step).mean(1)


def _shares(weights: list[float]) -> list[float]:
    total = math.fsum(map(abs, weights))
    return [weight / total for weight in weights]
