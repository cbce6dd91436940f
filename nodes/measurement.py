"""Losses of inverse problems, from a degraded image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..losses.measurement import GaussianDeblur, Inpainting, LowPass, MotionDeblur, SuperResolution
from .images import from_image, from_mask
from .loss_node import LossNode

KERNEL_SIZE = (
    "INT",
    {
        "default": 61,
        "min": 1,
        "max": 255,
        "step": 2,
        "tooltip": "Width of the blur window in pixels, odd. About six times sigma holds all of the blur.",
    },
)
SIGMA = (
    "FLOAT",
    {
        "default": 3.0,
        "min": 0.1,
        "max": 50.0,
        "step": 0.1,
        "tooltip": "Standard deviation of the blur in pixels: how soft the picture is.",
    },
)
FACTOR = (
    "INT",
    {"default": 4, "min": 2, "max": 32, "tooltip": "How many times smaller the low-resolution image is, on each side."},
)

LENGTH = (
    "FLOAT",
    {
        "default": 9.0,
        "min": 1.0,
        "max": 200.0,
        "step": 0.5,
        "tooltip": "How far the picture moved, in pixels.",
    },
)
ANGLE = (
    "FLOAT",
    {
        "default": 0.0,
        "min": -180.0,
        "max": 180.0,
        "step": 1.0,
        "tooltip": "Direction of the movement in degrees: 0 is sideways, 45 up to the right, 90 upright.",
    },
)


class InpaintingLoss(LossNode):
    DESCRIPTION = (
        "Guides the sampler to pictures that agree with the known pixels of this one, and invents the rest. "
        "Works with masks that a latent can't hold: single pixels, thin lines, scratches."
    )
    SEARCH_ALIASES = ["inpaint", "restore", "missing pixels", "repair", "inverse problem"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": (
                    "IMAGE",
                    {
                        "tooltip": (
                            "The picture with missing pixels, as large as the latent decodes to. What lies under the "
                            "mask does not matter."
                        )
                    },
                ),
                "mask": (
                    "MASK",
                    {"tooltip": "1 (white) where pixels are missing. Resized to the image if its size differs."},
                ),
            }
        }

    def make(self, image: Tensor, mask: Tensor) -> tuple[Inpainting]:
        return (Inpainting(from_image(image), from_mask(mask)),)


class SuperResolutionLoss(LossNode):
    DESCRIPTION = (
        "Guides the sampler to pictures that look like this small one when they are scaled down: upscaling that "
        "agrees with its source."
    )
    SEARCH_ALIASES = ["upscale", "super resolution", "enlarge", "inverse problem"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The small picture: 1/factor of the size that the latent decodes to."}),
                "factor": FACTOR,
            }
        }

    def make(self, image: Tensor, factor: int) -> tuple[SuperResolution]:
        return (SuperResolution(from_image(image), factor),)


class GaussianDeblurLoss(LossNode):
    DESCRIPTION = (
        "Guides the sampler to sharp pictures that look like this one when they are blurred: deblurring that agrees "
        "with its source."
    )
    SEARCH_ALIASES = ["deblur", "sharpen", "unblur", "inverse problem"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The blurred picture, as large as the latent decodes to."}),
                "kernel_size": KERNEL_SIZE,
                "sigma": SIGMA,
            }
        }

    def make(self, image: Tensor, kernel_size: int, sigma: float) -> tuple[GaussianDeblur]:
        return (GaussianDeblur(from_image(image), kernel_size, sigma),)


class MotionDeblurLoss(LossNode):
    DESCRIPTION = (
        "Guides the sampler to sharp pictures that look like this one when they are blurred by a straight movement, "
        "as by a shaken camera."
    )
    SEARCH_ALIASES = ["deblur", "motion blur", "camera shake", "sharpen", "inverse problem"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The blurred picture, as large as the latent decodes to."}),
                "length": LENGTH,
                "angle": ANGLE,
            }
        }

    def make(self, image: Tensor, length: float, angle: float) -> tuple[MotionDeblur]:
        return (MotionDeblur(from_image(image), length, angle),)


class LowPassLoss(LossNode):
    DESCRIPTION = (
        "Guides the sampler to pictures whose coarse structure and colours are those of a reference: a sketch, a "
        "photo, a colour layout. The fine parts are free. It is ILVR's condition as a loss."
    )
    SEARCH_ALIASES = ["ilvr", "reference", "colour layout", "low frequency", "composition"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The reference. Of any size: it is resized to the picture."}),
                "factor": (
                    "INT",
                    {
                        "default": 16,
                        "min": 2,
                        "max": 256,
                        "tooltip": (
                            "N: what is finer than about this many pixels is free. 4 keeps much of the reference, 64 "
                            "little more than its colours."
                        ),
                    },
                ),
            }
        }

    def make(self, image: Tensor, factor: int) -> tuple[LowPass]:
        return (LowPass(from_image(image), factor),)


NODES = {
    "SphereGuideInpaintingLoss": (InpaintingLoss, "Inpainting Loss"),
    "SphereGuideSuperResolutionLoss": (SuperResolutionLoss, "Super-Resolution Loss"),
    "SphereGuideGaussianDeblurLoss": (GaussianDeblurLoss, "Gaussian Deblur Loss"),
    "SphereGuideMotionDeblurLoss": (MotionDeblurLoss, "Motion Deblur Loss"),
    "SphereGuideLowPassLoss": (LowPassLoss, "Low-Pass Reference Loss"),
}
