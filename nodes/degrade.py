"""Makes test inputs for the measurement losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses.measurement import downsample, gaussian_blur, motion_blur
from .images import from_image, to_image
from .measurement import ANGLE, FACTOR, KERNEL_SIZE, LENGTH, SIGMA


class DegradeImage:
    DESCRIPTION = (
        "Degrades a picture in a known way, to try the inpainting, super-resolution and deblurring losses on it: with "
        "the original at hand, you see how well guidance brings it back."
    )
    CATEGORY = "SphereGuide/losses"
    FUNCTION = "degrade"
    RETURN_TYPES = ("IMAGE", "MASK")
    RETURN_NAMES = ("image", "mask")
    OUTPUT_TOOLTIPS = (
        "The degraded picture, smaller by the factor for super-resolution.",
        "1 where pixels are missing; empty for the other operators.",
    )
    SEARCH_ALIASES = ["degrade", "noise", "blur", "downscale", "random mask", "test image"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The picture to degrade."}),
                "operator": (
                    ["inpainting", "super-resolution", "gaussian blur", "motion blur"],
                    {
                        "tooltip": (
                            "inpainting: random pixels go missing. super-resolution: scaled down. gaussian blur: "
                            "out of focus. motion blur: moved while it was taken."
                        )
                    },
                ),
                "mask_fraction": (
                    "FLOAT",
                    {
                        "default": 0.5,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "inpainting: which share of the pixels is missing. The papers use 0.3 to 0.7.",
                    },
                ),
                "factor": FACTOR,
                "kernel_size": KERNEL_SIZE,
                "sigma": SIGMA,
                "noise": (
                    "FLOAT",
                    {
                        "default": 0.025,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.005,
                        "tooltip": (
                            "Standard deviation of the noise added to what is measured, for pixels in 0..1. 0.025 is "
                            "the papers' 0.05 in their range of -1..1."
                        ),
                    },
                ),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 0xFFFFFFFFFFFFFFFF,
                        "tooltip": "Decides which pixels go missing, and the noise.",
                    },
                ),
            },
            "optional": {"length": LENGTH, "angle": ANGLE},
        }

    def degrade(
        self,
        image: Tensor,
        operator: str,
        mask_fraction: float,
        factor: int,
        kernel_size: int,
        sigma: float,
        noise: float,
        seed: int,
        length: float = LENGTH[1]["default"],
        angle: float = ANGLE[1]["default"],
    ) -> tuple[Tensor, Tensor]:
        images = from_image(image)
        generator = torch.Generator().manual_seed(seed)
        missing = torch.zeros(len(images), 1, *images.shape[-2:])
        if operator == "inpainting":
            missing = (torch.rand(missing.shape, generator=generator) < mask_fraction).float()
        elif operator == "super-resolution":
            images = downsample(images, factor)
            missing = torch.zeros(len(images), 1, *images.shape[-2:])
        elif operator == "gaussian blur":
            images = gaussian_blur(images, kernel_size, sigma)
        else:
            images = motion_blur(images, length, angle)
        images = images + noise * torch.randn(images.shape, generator=generator).to(images)
        missing = missing.to(images)
        grey = 0.5  # what a missing pixel shows
        return to_image(images * (1 - missing) + grey * missing), missing[:, 0]


NODES = {"SphereGuideDegradeImage": (DegradeImage, "Degrade Image")}
