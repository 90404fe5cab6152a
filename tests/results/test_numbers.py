"""results/numbers.py: how numbers are written for people."""

from __future__ import annotations

import pytest

from moe_lab.results import numbers


@pytest.mark.parametrize(
    ("value", "short", "four"),
    [
        pytest.param(0.0, "0", "0.000", id="zero"),
        pytest.param(0.12345, "0.123", "0.1235", id="below_1"),
        pytest.param(1.2, "1.2", "1.200", id="trailing_zeros"),
        pytest.param(-12.345, "-12.3", "-12.35", id="negative"),
        pytest.param(999.7, "1,000", "999.7", id="rounds_up"),
        pytest.param(999.96, "1,000", "1,000", id="rounds_up_in_both"),
        pytest.param(1234567.8, "1,234,568", "1,234,568", id="large"),
        pytest.param(3e-7, "3e-07", "3.000e-07", id="tiny"),
    ],
)
def test_digits(value: float, short: str, four: str) -> None:
    """Never an exponent for what is large."""
    assert (numbers.short(value), numbers.four(value)) == (short, four)


def test_what_is_not_known() -> None:
    """A dash on the terminal, nothing on the page."""
    assert (numbers.short(None), numbers.short(None, missing="")) == ("-", "")
    assert numbers.error(None) == "-" and numbers.bits_per_byte(None, 0.1, None, None) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param(1.2345, "1.23", id="three"),
        pytest.param(1.0004, "1.0004", id="as_many_as_needed"),
        pytest.param(0.9996, "0.9996", id="below"),
        pytest.param(1.000001, "1", id="as_good_as_1"),
    ],
)
def test_a_ratio_that_is_not_1_does_not_read_as_1(value: float, text: str) -> None:
    """Up to five digits."""
    assert numbers.ratio(value) == text


def test_intervals_stand_in_brackets() -> None:
    """Where both ends are known."""
    assert numbers.with_interval(1.234, 1.2, 1.3, " ms") == "1.23 ms [1.2, 1.3]"
    assert numbers.with_interval(1.234, None, 1.3) == "1.23"
    assert numbers.bits_per_byte(1.75, 0.25, 0.2, 0.3) == "1.750 (+0.250) [+0.200, +0.300]"
    assert numbers.bits_per_byte(1.75, -0.25, None, None) == "1.750 (-0.250)"
    assert numbers.bits_per_byte(1.75, None, None, None) == "1.750"
    assert numbers.error(1.26e-7) == "1.3e-07" and numbers.error(1.26e-7, digits=0) == "1e-07"
