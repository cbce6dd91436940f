"""What a node is given, held to what it declares.

ComfyUI looks at the widgets of a prompt, and lets through what comes by wire. The one of 2024 looks at no optional
input, and takes a text for a wire.
"""

from __future__ import annotations

import functools
import inspect
import numbers
from typing import Any

__all__ = ["within_limits"]

NUMBERS = ("INT", "FLOAT")
WIDGETS = (*NUMBERS, "STRING", "BOOLEAN", "COMBO")


def within_limits(node: type[Any], title: str) -> type[Any]:
    """`node`, whose function first holds numbers to their limits, and sockets to what can come by a wire.

    A shared workflow may wire 10¹² to a count, or hold NaN, which is neither above nor below any limit. The function
    raises ValueError, for the page. Of texts and switches it makes what newer hosts make of them.
    """
    function = getattr(node, node.FUNCTION)
    signature = inspect.signature(function)

    required: dict[str, Any] = {}

    @functools.cache
    def declared() -> dict[str, tuple[Any, ...]]:
        inputs = node.INPUT_TYPES()
        required.update(inputs.get("required", {}))
        return {**inputs.get("optional", {}), **required}

    @functools.wraps(function)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**signature.bind_partial(self, *args, **kwargs).arguments, **kwargs}
        for name, (kind, *options) in declared().items():
            if name not in given:
                continue
            value = given[name]
            if kind in NUMBERS:
                least, most = options[0]["min"], options[0]["max"]
                if not (isinstance(value, numbers.Real) and least <= value <= most):
                    raise ValueError(
                        f"{title}: {name} is {str(value)[:60]}, and must be a number from {least:g} to {most:g}. "
                        "Correct it, here or at the node that gives it."
                    )
                if not isinstance(value, int | float) and name in kwargs:  # NumPy's, of another pack's node
                    kwargs |= {name: int(value) if kind == "INT" else float(value)}
            elif kind == "BOOLEAN":
                kwargs |= {name: bool(value)} if name in kwargs else {}
            elif isinstance(kind, list) or kind in WIDGETS:
                kwargs |= {name: str(value)} if name in kwargs else {}
            elif value is None and name not in required:
                kwargs.pop(name, None)
            elif not _comes_by_wire(kind, value):
                raise ValueError(f"{title}: {name} is {str(value)[:60]!r}, and must come by a wire. Connect it.")
        return function(self, *args, **kwargs)

    setattr(node, node.FUNCTION, checked)
    return node


def _comes_by_wire(kind: str, value: Any) -> bool:
    """Whether another node may have given it: the rest is what JSON can hold."""
    if isinstance(value, dict):
        return kind == "LATENT" and "samples" in value
    return not isinstance(value, str | int | float | None)
