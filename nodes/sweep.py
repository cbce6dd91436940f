"""Several values for a setting, one run after the other."""

from __future__ import annotations

import math
from typing import Any

from ..models.network import shortened

MOST = 64


class SweepValues:
    DESCRIPTION = (
        "Several values for a setting of any node, such as guidance_rate. Right-click that node, convert the widget to "
        "an input, and connect value (on newer pages connect it to the widget). What lies behind runs once for each "
        "value, with the same seed, and the pictures lie side by side."
    )
    CATEGORY = "SphereGuide/guidance"
    FUNCTION = "values"
    RETURN_TYPES = ("FLOAT", "INT")
    RETURN_NAMES = ("value", "whole")
    OUTPUT_IS_LIST = (True, True)
    OUTPUT_TOOLTIPS = ("The values, one after the other.", "The same, rounded, for settings in whole numbers: steps …")
    SEARCH_ALIASES = ["sweep", "several values", "list of numbers", "compare strengths", "grid", "xy plot"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        values = {
            "default": "0, 0.05, 0.1, 0.2, 0.4",
            "tooltip": f"Numbers, with commas or spaces between: up to {MOST}. Each costs a run.",
        }
        return {"required": {"values": ("STRING", values)}}

    def values(self, values: str) -> tuple[list[float], list[int]]:
        words = values.replace(",", " ").replace(";", " ").split()
        if not 1 <= len(words) <= MOST:
            raise ValueError(
                f"Sweep Values: there are {len(words)} values, and must be 1 to {MOST}. Write such as 0, 0.1, 0.2."
            )
        numbers = [_number(word) for word in words]
        return numbers, [round(number) for number in numbers]


def _number(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"Sweep Values: '{shortened(word, 200)}' is no number. Write such as 0, 0.1, 0.2, with a point in each."
        )
    return number


NODES = {"SphereGuideSweep": (SweepValues, "Sweep Values")}
