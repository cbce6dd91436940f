"""Sweep Values: a list of numbers, for which the host runs what lies behind once each."""

from __future__ import annotations

import pytest
from sphereguide.nodes.sweep import MOST, SweepValues


@pytest.mark.parametrize("text", ["0, 0.1, 2.6", " 0 .1  2.6 ", "0;0.1;2.6", "0,0.1,2.6,"])
def test_values_are_read_however_they_are_separated(text: str) -> None:
    assert SweepValues().values(text) == ([0.0, 0.1, 2.6], [0, 0, 3])


@pytest.mark.parametrize("text", ["", " , ", " ".join(["1"] * (MOST + 1))])
def test_none_and_too_many_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"there are {len(text.replace(',', ' ').split())} values.*1 to {MOST}"):
        SweepValues().values(text)


@pytest.mark.parametrize("word", ["a", "nan", "inf", "1e999", "0.1.2"])
def test_what_is_no_number_is_named(word: str) -> None:
    with pytest.raises(ValueError, match=f"'{word}' is no number"):
        SweepValues().values(f"0 {word}")
