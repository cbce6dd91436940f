"""Numbers are held to the limits of their widgets, however they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from sphereguide import NODE_CLASS_MAPPINGS
from sphereguide.nodes.limits import within_limits


class Counting:
    FUNCTION = "count"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        whole = ("INT", {"default": 1, "min": 1, "max": 9})
        return {"required": {"count": whole}, "optional": {"share": ("FLOAT", {"min": 0.0, "max": 1.0})}}

    def count(self, count: int, **others: float) -> int:
        return count


@pytest.fixture(scope="module")
def counting() -> Iterator[Any]:
    yield within_limits(Counting, "Count")()


@pytest.mark.parametrize("count", [0, 10, 10**12, float("nan"), float("inf"), None, "3", [3]])
def test_a_number_beyond_its_limits_stops_the_node(counting: Any, count: Any) -> None:
    words = r"^Count: count is .*, and must be a number from 1 to 9\. Correct it, here or at the node that gives it\.$"
    with pytest.raises(ValueError, match=words):
        counting.count(count)
    with pytest.raises(ValueError, match=words):
        counting.count(count=count)


def test_numbers_of_numpy_are_numbers(counting: Any) -> None:
    found = counting.count(count=np.int64(3), share=np.float32(0.5))
    assert found == 3 and type(found) is int
    with pytest.raises(ValueError, match="count is 10, and must be a number from 1 to 9"):
        counting.count(count=np.int64(10))


def test_numbers_within_their_limits_pass(counting: Any) -> None:
    assert counting.count(9) == counting.count(count=1, share=1.0) + 8
    with pytest.raises(ValueError, match="share is nan"):
        counting.count(1, share=float("nan"))


@pytest.mark.parametrize("value", ["text", 3, 0.5, True, {}, None])
def test_a_text_is_no_wire(value: Any) -> None:
    words = r"^Wired: latent is .*, and must come by a wire\. Connect it\.$"
    with pytest.raises(ValueError, match=words):
        wired().take(value)
    assert wired().take({"samples": 1}) and wired().take(latent={"samples": 1}, rest=None)


def test_texts_and_switches_are_made_what_they_stand_for() -> None:
    """A host of 2024 hands on what the JSON has."""
    assert wired().take(latent={"samples": 1}, switch=2, text=None, rest=None) == (True, "None", ())


def wired() -> Any:
    class Wired:
        FUNCTION = "take"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            widgets = {"switch": ("BOOLEAN", {}), "text": ("STRING", {}), "rest": ("IMAGE", {})}
            return {"required": {"latent": ("LATENT",)}, "optional": widgets}

        def take(self, latent: Any, switch: bool = False, text: str = "", rest: Any = ()) -> tuple[bool, str, Any]:
            return switch, text, rest

    return within_limits(Wired, "Wired")()


def test_every_number_of_every_node_has_limits() -> None:
    for node_id, kind in NODE_CLASS_MAPPINGS.items():
        declared = kind.INPUT_TYPES()
        for name, spec in {**declared.get("required", {}), **declared.get("optional", {})}.items():
            if spec[0] in ("INT", "FLOAT"):
                assert spec[1]["min"] < spec[1]["max"], (node_id, name)
        assert getattr(kind, kind.FUNCTION).__wrapped__, node_id
