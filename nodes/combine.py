"""Losses made of losses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..losses.base import Loss
from ..losses.combine import CURVES, Combined, Masked, Scheduled
from .images import from_mask
from .loss_node import LossNode
from .schedule_range import percent


class _LossOfLosses(LossNode):
    OUTPUT_TOOLTIPS = ("A loss like any other: for a guidance node, or for another of these nodes.",)


def _weight(of: str) -> tuple[str, dict[str, Any]]:
    return (
        "FLOAT",
        {
            "default": 1.0,
            "min": -10.0,
            "max": 10.0,
            "step": 0.05,
            "tooltip": f"How much of the guidance {of} gets. 0 leaves it out, below 0 it moves away.",
        },
    )


class CombineLosses(_LossOfLosses):
    DESCRIPTION = (
        "Steers towards several things at once: a text and a face, a style and a colour layout. For more than four, "
        "connect one of these to another."
    )
    SEARCH_ALIASES = ["combine", "add losses", "weighted sum", "mix guidance", "multiple losses"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = ("loss_1", "loss_2", "loss_3", "loss_4")
        return {
            "required": {
                "loss_1": ("GUIDANCE_LOSS", {"tooltip": "The first loss."}),
                "loss_2": ("GUIDANCE_LOSS", {"tooltip": "The second loss."}),
                **{f"weight_{name[-1]}": _weight(name) for name in names},
                "normalise": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": (
                            "On: equal weights pull equally, whatever kind of loss it is. Off: the raw numbers are "
                            "added up, so that the loss with the largest ones wins."
                        ),
                    },
                ),
            },
            "optional": {
                "loss_3": ("GUIDANCE_LOSS", {"tooltip": "A third loss."}),
                "loss_4": ("GUIDANCE_LOSS", {"tooltip": "A fourth loss."}),
            },
        }

    def make(
        self,
        loss_1: Loss,
        loss_2: Loss,
        weight_1: float,
        weight_2: float,
        weight_3: float,
        weight_4: float,
        normalise: bool,
        loss_3: Loss | None = None,
        loss_4: Loss | None = None,
    ) -> tuple[Combined]:
        pairs = [(loss_1, weight_1), (loss_2, weight_2), (loss_3, weight_3), (loss_4, weight_4)]
        losses, weights = zip(*((loss, weight) for loss, weight in pairs if loss is not None), strict=True)
        return (Combined(losses, weights, normalise),)


class ScheduleLoss(_LossOfLosses):
    DESCRIPTION = (
        "Lets a loss act more in one part of the sampling than in another: composition is settled early, texture late."
    )
    SEARCH_ALIASES = ["schedule", "ramp", "fade", "weight curve", "timing"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "loss": ("GUIDANCE_LOSS", {"tooltip": "The loss to schedule."}),
                "weight": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 10.0,
                        "step": 0.05,
                        "tooltip": (
                            "The largest weight of the curve. Alone it multiplies the guidance rate, or auto_strength "
                            "where that is set; in Combine Losses the weight there."
                        ),
                    },
                ),
                "curve": (
                    list(CURVES),
                    {
                        "tooltip": (
                            "constant: the same all the way. ramp up: from 0 at start_percent to the weight at "
                            "end_percent. ramp down: the reverse. window: the weight between the two, 0 elsewhere."
                        )
                    },
                ),
                "start_percent": percent(0.0, "Where the curve begins; 0 is pure noise."),
                "end_percent": percent(1.0, "Where the curve ends; 1 is the finished image."),
            }
        }

    def make(self, loss: Loss, weight: float, curve: str, start_percent: float, end_percent: float) -> tuple[Scheduled]:
        return (Scheduled(loss, curve, start_percent, end_percent, weight),)


class MaskLoss(_LossOfLosses):
    DESCRIPTION = "Restricts a loss to a region of the image: a style for the background, a text for the hat."
    SEARCH_ALIASES = ["mask", "region", "regional guidance", "area", "local"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "loss": ("GUIDANCE_LOSS", {"tooltip": "The loss to restrict."}),
                "mask": ("MASK", {"tooltip": "1 (white) where the loss may act. Resized to the image."}),
                "sees": (
                    ["whole image", "region"],
                    {
                        "tooltip": (
                            "whole image: the loss judges all of it and changes the region. region: the loss sees "
                            "only the box around the region, as a picture of its own; good for text and style."
                        )
                    },
                ),
            }
        }

    def make(self, loss: Loss, mask: Tensor, sees: str) -> tuple[Masked]:
        return (Masked(loss, from_mask(mask), crop=sees == "region"),)


NODES = {
    "SphereGuideCombineLosses": (CombineLosses, "Combine Losses"),
    "SphereGuideScheduleLoss": (ScheduleLoss, "Schedule Loss"),
    "SphereGuideMaskLoss": (MaskLoss, "Mask Loss"),
}
