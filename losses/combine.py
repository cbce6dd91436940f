"""Losses made of losses: weighted sums, weights over the schedule, regions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Loss, Step, repeat

__all__ = ["CURVES", "Combined", "Masked", "Scheduled"]


class Combined(Loss):
    """Σᵢ wᵢ·Lᵢ of losses that look at the same thing; they may be combinations themselves.

    losses, weights  as many of the one as of the other; a negative weight moves away
    normalise        take each loss's gradient at the image, per sample, at unit length before it is weighted: weights
                     then say how much of the direction each loss gets, whatever the size of its numbers. A gradient
                     that is zero or not finite counts as zero. The value stays the plain weighted sum.

    Raises ValueError where the losses look at different things, or no weight differs from 0.
    """

    def __init__(self, losses: Sequence[Loss], weights: Sequence[float], normalise: bool = True) -> None:
        super().__init__()
        used = [(loss, weight) for loss, weight in zip(losses, weights, strict=True) if weight != 0]
        if not used:
            raise ValueError("Combine Losses: all weights are 0. Set at least one above 0.")
        spaces = sorted({loss.space for loss, _ in used})
        if len(spaces) > 1:
            raise ValueError(
                f"Combine Losses: these losses look at different things ({' and '.join(spaces)}), which can't be added "
                "up. Combine losses on images with each other."
            )
        self.losses = nn.ModuleList(loss for loss, _ in used)
        self.weights = [float(weight) for _, weight in used]
        self.normalise = normalise
        self.space = used[0][0].space

    @property
    def patchers(self) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(patcher for loss in self.losses for patcher in loss.patchers))

    def weight(self, step: Step) -> float:
        """The strongest of the parts': as long as one of them is at full strength, so is the guidance.

        Among several a weight above 1 says how much of the direction is that loss's, and not how far to go.
        """
        strongest = max(loss.weight(step) for loss in self.losses)
        return min(1.0, strongest) if len(self.losses) > 1 else strongest

    def forward(self, images: Tensor, step: Step | None = None) -> Tensor:
        step = step or Step()
        strongest = self.weight(step)
        total = images.new_zeros(len(images))
        for loss, weight in zip(self.losses, self.weights, strict=True):
            share = weight * loss.weight(step) / strongest if strongest else 0.0
            if share:
                value = loss(images, step)
                total = total + share * (_with_unit_gradient(value, images) if self.normalise else value)
        return total


def _with_unit_gradient(value: Tensor, images: Tensor) -> Tensor:
    """`value` `[B]`, whose gradient with respect to `images` `[B, …]` has length 1 for each sample, or 0."""
    if not value.requires_grad or not images.requires_grad:
        return value
    (gradient,) = torch.autograd.grad(value.sum(), images, allow_unused=True)
    if gradient is None:
        return value.detach()
    norm = torch.linalg.vector_norm(gradient.flatten(1).float(), dim=1).reshape(-1, *[1] * (images.ndim - 1))
    usable = norm.isfinite() & (norm > 0)
    return _WithGradient.apply(images, value.detach(), torch.where(usable, gradient / norm.to(gradient), 0))


class _WithGradient(torch.autograd.Function):
    """`value` `[B]` with a given gradient `[B, …]`."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream.reshape(-1, *[1] * (gradient.ndim - 1)) * gradient, None, None


#: Share of the strength by progress t through the window that start and end make: 0 before it, 1 behind it.
CURVES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "ramp up": lambda t: t,
    "ramp down": lambda t: 1.0 - t,
    "window": lambda t: float(0.0 < t < 1.0),
}


class Scheduled(Loss):
    """A loss with a weight that depends on the progress through the noise schedule.

    curve       of CURVES: "constant"; "ramp up" from 0 at `start` to the weight at `end`; "ramp down", the reverse;
                "window", the weight between `start` and `end`, else 0
    weight      the largest weight, ≥ 0
    start, end  progress in 0..1, as start_percent of a guidance node

    Alone it scales the strength of the guidance, and in a combination the part of this loss.
    """

    def __init__(self, loss: Loss, curve: str, start: float, end: float, weight: float = 1.0) -> None:
        super().__init__()
        if start >= end:
            raise ValueError(
                f"Schedule Loss: start_percent ({start}) is not before end_percent ({end}). Lower the one or raise the "
                "other."
            )
        self.loss = loss
        self.curve = curve
        self.start, self.end = start, end
        self.largest = weight
        self.space = loss.space

    @property
    def patchers(self) -> tuple[Any, ...]:
        return self.loss.patchers

    def weight(self, step: Step) -> float:
        t = (step.progress - self.start) / (self.end - self.start)
        return self.largest * CURVES[self.curve](min(max(t, 0.0), 1.0)) * self.loss.weight(step)

    def forward(self, images: Tensor, step: Step | None = None) -> Tensor:
        return self.loss(images, step)


class Masked(Loss):
    """A loss that changes only a region of the image.

    mask  `[M, 1, h, w]`, 0..1, 1 where the loss may act, resized to the image; sample i has mask i mod M
    crop  False: the loss sees the whole image, and its gradient is multiplied by the mask. True: it sees only the
          smallest box that holds the region (of all masks, where there are several), with the gradient masked as well.

    Raises ValueError for a mask that is empty.
    """

    def __init__(self, loss: Loss, mask: Tensor, crop: bool = False) -> None:
        super().__init__()
        rows, columns = (mask > 0).any(0)[0].any(1).nonzero(), (mask > 0).any(0)[0].any(0).nonzero()
        if not len(rows):
            raise ValueError("Mask Loss: the mask is empty (0 everywhere). Paint what shall be guided.")
        height, width = mask.shape[-2:]
        self.box = (  # top, bottom, left, right, as shares of the image
            float(rows.min()) / height,
            float(rows.max() + 1) / height,
            float(columns.min()) / width,
            float(columns.max() + 1) / width,
        )
        self.loss = loss
        self.crop = crop
        self.space = loss.space
        self.register_buffer("mask", mask)

    @property
    def patchers(self) -> tuple[Any, ...]:
        return self.loss.patchers

    def weight(self, step: Step) -> float:
        return self.loss.weight(step)

    def forward(self, images: Tensor, step: Step | None = None) -> Tensor:
        height, width = images.shape[-2:]
        mask = F.interpolate(self.mask.to(images), size=(height, width), mode="bilinear", antialias=True)
        mask = repeat(mask, len(images))
        images = images * mask + images.detach() * (1 - mask)
        if self.crop:
            top, bottom, left, right = self.box
            rows = slice(int(top * height), max(int(top * height) + 1, round(bottom * height)))
            columns = slice(int(left * width), max(int(left * width) + 1, round(right * width)))
            images = images[..., rows, columns]
            if step is not None:  # a loss may serve several regions, and remembers each by itself
                step = step.within(self)
        return self.loss(images, step)
