"""The part of the noise schedule in which a node works: its widgets, and what is wrong with an empty one."""

from __future__ import annotations

from typing import Any

__all__ = ["check_range", "percent"]


def percent(default: float, tooltip: str) -> tuple[str, dict[str, Any]]:
    """A widget for a place in the schedule: 0 is pure noise, 1 the finished image."""
    return "FLOAT", {"default": default, "min": 0.0, "max": 1.0, "step": 0.001, "tooltip": tooltip}


def check_range(title: str, start: float, end: float, consequence: str) -> None:
    """Raises ValueError, for the node of that title, if the range is empty."""
    if start >= end:
        raise ValueError(
            f"{title}: start_percent ({start}) is not before end_percent ({end}), so {consequence}. Lower the one or "
            "raise the other."
        )
