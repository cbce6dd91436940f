"""Losses of inverse problems: the distance between a measurement y and the operator A on the estimate.

    L(x̂₀) = ‖y − A(x̂₀)‖₂        unsquared, per sample

as in DPS (Chung et al., arXiv 2209.14687) and DSG (arXiv 2402.03201, section 5). The operators are functions of their
own: what degrades a picture for a test is what the loss applies to the estimate.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Loss, Step, repeat

__all__ = [
    "GaussianDeblur",
    "Inpainting",
    "LowPass",
    "MotionDeblur",
    "SuperResolution",
    "downsample",
    "gaussian_blur",
    "low_pass",
    "motion_blur",
]


def downsample(images: Tensor, factor: int) -> Tensor:
    """Bicubic, antialiased downsampling by `factor`: `[B, C, H, W]` to `[B, C, H/factor, W/factor]`, rounded."""
    size = [max(1, round(side / factor)) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


def gaussian_blur(images: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Blur with a Gaussian of std `sigma` pixels, cut to `kernel_size` (odd) pixels, borders reflected.

    Raises ValueError where the image is too small for its border to be reflected half a kernel wide.
    """
    half = kernel_size // 2
    if min(images.shape[-2:]) <= half:
        height, width = images.shape[-2:]
        raise ValueError(
            f"A blur of kernel_size {kernel_size} is too wide for an image of {width}×{height} pixels. "
            f"Choose a kernel_size of at most {2 * (min(height, width) - 1) + 1}."
        )
    offsets = torch.arange(-half, half + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    images = F.pad(images, (half, half, half, half), mode="reflect")
    images = F.conv2d(images, kernel, groups=images.shape[1])
    return F.conv2d(images, kernel.mT, groups=images.shape[1])


def motion_blur(images: Tensor, length: float, angle: float) -> Tensor:
    """Blur by a straight movement of `length` ≥ 1 pixels at `angle` degrees, counter-clockwise from the right.

    Borders are reflected. Raises ValueError where the image is too small for that.
    """
    half = math.ceil(length / 2)
    if min(images.shape[-2:]) <= half:
        height, width = images.shape[-2:]
        raise ValueError(
            f"A motion of {length:g} pixels is too long for an image of {width}×{height} pixels. "
            f"Choose a length of at most {2 * (min(height, width) - 1)}."
        )
    offsets = torch.arange(-half, half + 1, device=images.device, dtype=images.dtype)
    right, up = offsets, -offsets[:, None]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    along, across = right * cos + up * sin, up * cos - right * sin
    # A line one pixel wide, antialiased at its sides and ends.
    kernel = (1 - across.abs()).clamp(0, 1) * ((length + 1) / 2 - along.abs()).clamp(0, 1)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(images, (half, half, half, half), mode="reflect"), kernel, groups=images.shape[1])


def low_pass(images: Tensor, factor: int) -> Tensor:
    """φ_N of ILVR (arXiv 2108.02938): down- then upsampling by `factor`, to the size that it had; bicubic."""
    small = downsample(images, factor)
    return F.interpolate(small, size=images.shape[-2:], mode="bicubic", align_corners=False)


class _Measurement(Loss):
    """‖y − A(x̂₀)‖₂ with y `[R, 3, h, w]`; sample i is held against measurement i mod R."""

    title: str

    def __init__(self, measurement: Tensor) -> None:
        super().__init__()
        self.register_buffer("measurement", measurement)

    def operator(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, images: Tensor, step: Step | None = None) -> Tensor:
        estimate = self.operator(images)
        y = self.measurement.to(estimate)
        if estimate.shape[1:] != y.shape[1:]:
            raise ValueError(
                f"{self.title}: the input image has {y.shape[-1]}×{y.shape[-2]} pixels, where this latent calls for "
                f"{estimate.shape[-1]}×{estimate.shape[-2]}. Resize the image, or change the size of the latent. With "
                "Mask Loss, set sees to 'whole image'."
            )
        # The gradient of vector_norm at a residual of zero is zero, not NaN.
        return torch.linalg.vector_norm((repeat(y, len(estimate)) - estimate).flatten(1), dim=1)


class Inpainting(_Measurement):
    """A keeps the known pixels: A(x) = (1 − mask)·x.

    measurement  `[R, 3, H, W]`, 0..1; what lies under the mask does not matter
    mask         `[M, 1, H, W]`, 1 where pixels are missing, ComfyUI's convention; enlarged to the image, bilinear, or
                 reduced to it: what is missing in part is missing
    """

    title = "Inpainting Loss"

    def __init__(self, measurement: Tensor, mask: Tensor) -> None:
        size = measurement.shape[-2:]
        if mask.shape[-2] > size[0] or mask.shape[-1] > size[1]:
            mask = F.adaptive_max_pool2d(mask, [min(a, b) for a, b in zip(mask.shape[-2:], size, strict=True)])
        mask = F.interpolate(mask, size=size, mode="bilinear", align_corners=False)
        batch = max(len(measurement), len(mask))
        known = 1 - repeat(mask, batch)
        super().__init__(repeat(measurement, batch) * known)
        self.register_buffer("known", known)

    def operator(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != self.known.shape[-2:]:
            return images  # refused by size in `forward`
        return images * repeat(self.known.to(images), len(images))


class SuperResolution(_Measurement):
    """A is antialiased downsampling by `factor`; measurement `[R, 3, H/factor, W/factor]`, 0..1."""

    title = "Super-Resolution Loss"

    def __init__(self, measurement: Tensor, factor: int) -> None:
        super().__init__(measurement)
        self.factor = factor

    def operator(self, images: Tensor) -> Tensor:
        return downsample(images, self.factor)


class GaussianDeblur(_Measurement):
    """A blurs with a Gaussian of std `sigma` pixels in a window of `kernel_size`; measurement `[R, 3, H, W]`, 0..1."""

    title = "Gaussian Deblur Loss"

    def __init__(self, measurement: Tensor, kernel_size: int, sigma: float) -> None:
        super().__init__(measurement)
        self.kernel_size = kernel_size
        self.sigma = sigma

    def operator(self, images: Tensor) -> Tensor:
        return gaussian_blur(images, self.kernel_size, self.sigma)


class MotionDeblur(_Measurement):
    """A blurs by a straight movement; measurement `[R, 3, H, W]`, 0..1."""

    title = "Motion Deblur Loss"

    def __init__(self, measurement: Tensor, length: float, angle: float) -> None:
        super().__init__(measurement)
        self.length = length
        self.angle = angle

    def operator(self, images: Tensor) -> Tensor:
        return motion_blur(images, self.length, self.angle)


class LowPass(Loss):
    """‖φ_N(y) − φ_N(x̂₀)‖₂: ILVR's condition (Choi et al., arXiv 2108.02938, eq. 6) as a loss.

    reference  y, `[R, 3, H, W]`, 0..1, resized to the image: only what is coarse counts
    factor     N; the larger, the freer is the image
    """

    def __init__(self, reference: Tensor, factor: int) -> None:
        super().__init__()
        self.register_buffer("reference", reference)
        self.factor = factor

    def forward(self, images: Tensor, step: Step | None = None) -> Tensor:
        reference = self.reference.to(images)
        if reference.shape[-2:] != images.shape[-2:]:
            reference = F.interpolate(reference, size=images.shape[-2:], mode="bicubic", antialias=True)
        difference = low_pass(repeat(reference, len(images)) - images, self.factor)
        return torch.linalg.vector_norm(difference.flatten(1), dim=1)
