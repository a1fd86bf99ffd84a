"""Errors in one line: of whatever a library says, and of numbers that are too small or not finite."""

from __future__ import annotations

import math

import pytest

from dpo_lab.errors import check_at_least, first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  boom \nmore"), "boom"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        ("boom\nmore", "boom"),
        ("", ""),
        (None, ""),
    ],
)
def test_the_first_line_that_says_something(error, line):
    assert first_line(error) == line


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -(10**400), 0.5])
def test_a_number_that_is_too_small_or_not_finite_is_refused_with_what_to_type(value):
    with pytest.raises(ValueError, match=rf"^sft.steps={value}: must be 1 or more; type e.g. sft.steps=256$"):
        check_at_least("sft.steps", value, 1, 256)


@pytest.mark.parametrize("value", [1, 1.0, 10**400])
def test_a_number_that_is_large_enough_is_taken(value):
    check_at_least("sft.steps", value, 1, 256)
