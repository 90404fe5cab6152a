"""results/numbers.py: how numbers are written for people."""

from __future__ import annotations

import math

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


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        pytest.param(0.00204, 328367.4, "[0.00204, 328367]", id="thousands"),
        pytest.param(-1234.5, 1234567.8, "[-1234, 1234568]", id="negative"),
        pytest.param(1e-12, 1e20, "[1e-12, 1e+20]", id="very_small_and_very_large"),
        pytest.param(-math.inf, math.inf, "[-inf, inf]", id="infinite"),
        pytest.param(0.0, 999.6, "[0, 1000]", id="rounded_up"),
    ],
)
def test_the_only_comma_in_an_interval_is_between_its_ends(low: float, high: float, text: str) -> None:
    """Else `[0.00204, 328,367]` reads as three numbers, on the terminal and on the page."""
    assert numbers.interval(low, high) == text
    assert numbers.with_interval(5.0, low, high, " ms") == f"5 ms {text}"
    for written in (numbers.short, numbers.four, numbers.ratio):
        assert numbers.interval(low, high, written).count(",") == 1


@pytest.mark.parametrize(
    ("value", "short", "four", "ratio"),
    [
        pytest.param(math.nan, "-", "-", "-", id="nan"),
        pytest.param(None, "-", "-", "-", id="none"),
        pytest.param(math.inf, "inf", "inf", "inf", id="inf"),
        pytest.param(-math.inf, "-inf", "-inf", "-inf", id="minus_inf"),
        pytest.param(-1234.4, "-1,234", "-1,234", "-1,234", id="negative"),
        pytest.param(2e15, "2e+15", "2.000e+15", "2e+15", id="beyond_what_is_read_at_a_glance"),
        pytest.param(1234.4, "1,234", "1,234", "1,234", id="a_large_ratio"),
    ],
)
def test_odd_values(value: float | None, short: str, four: str, ratio: str) -> None:
    """NaN is what pandas makes of null."""
    assert (numbers.short(value), numbers.four(value), numbers.ratio(value)) == (short, four, ratio)


def test_an_interval_of_nan_is_none() -> None:
    """It is left out with its brackets."""
    assert numbers.with_interval(1.0, math.nan, 2.0) == "1"
    assert numbers.with_interval(math.nan, math.nan, math.nan) == "-"
    assert numbers.bits_per_byte(1.75, 0.25, math.nan, 0.3) == "1.750 (+0.250)"
    assert numbers.bits_per_byte(math.nan, 0.25, 0.2, 0.3) == "" and numbers.error(math.nan) == "-"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        pytest.param(1.6234, "+1.62", id="large"),
        pytest.param(-0.1, "-0.10", id="better"),
        pytest.param(0.0264, "+0.026", id="small"),
        pytest.param(0.0, "+0.00", id="none"),
    ],
)
def test_a_difference_of_bits_has_the_digits_that_say_something(more: float, said: str) -> None:
    """`+0.00` of a router that is not the native one would say that it is."""
    assert numbers.bits(more)(more) == said
