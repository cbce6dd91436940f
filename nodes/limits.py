"""Numbers within their limits. ComfyUI looks at those of widgets alone, and in 2024 at none of an optional input."""

from __future__ import annotations

import functools
import inspect
from typing import Any

__all__ = ["within_limits"]

NUMBERS = ("INT", "FLOAT")


def within_limits(node: type[Any], title: str) -> type[Any]:
    """`node`, whose function first holds its numbers to the limits that it declares.

    A shared workflow may wire 10¹² to a count, or hold NaN, which is neither above nor below any limit. The function
    raises ValueError, for the page.
    """
    function = getattr(node, node.FUNCTION)
    signature = inspect.signature(function)

    @functools.cache
    def limits() -> dict[str, dict[str, Any]]:
        declared = node.INPUT_TYPES()
        inputs = {**declared.get("required", {}), **declared.get("optional", {})}
        return {name: spec[1] for name, spec in inputs.items() if spec[0] in NUMBERS}

    @functools.wraps(function)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        for name, limit in limits().items():
            value = kwargs.get(name, given.get(name, limit["min"]))
            if not (isinstance(value, int | float) and limit["min"] <= value <= limit["max"]):
                raise ValueError(
                    f"{title}: {name} is {str(value)[:60]}, and must be a number from {limit['min']:g} to "
                    f"{limit['max']:g}. Correct it, here or at the node that gives it."
                )
        return function(self, *args, **kwargs)

    setattr(node, node.FUNCTION, checked)
    return node
