"""How numbers are written for people: on the terminal, on the report page, in sentences. The tables have all digits."""

from __future__ import annotations

import math
from collections.abc import Callable

_MOST = 1e15  # from here on with an exponent


def short(value: float | None, missing: str = "-") -> str:
    """Three digits, from 1000 on all before the point: `0.123`, `12.3`, `1,234`. NaN is missing too."""
    if value is None or math.isnan(value):
        return missing
    return f"{value:,.0f}" if 999.5 <= abs(value) < _MOST else f"{value:.3g}"


def four(value: float | None) -> str:
    """Four digits, trailing zeros too, so that a column of them lines up; from 1000 on all before the point."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if 999.95 <= abs(value) < _MOST else f"{value:#.4g}"


def ratio(value: float | None) -> str:
    """Three digits, up to five where fewer would make a number that is not 1 read as 1; from 1000 on as `short`."""
    if value is None or math.isnan(value) or abs(value) >= 999.5:
        return short(value)
    return next((text for text in (f"{value:.{digits}g}" for digits in (3, 4, 5)) if float(text) != 1), "1")


def interval(low: float, high: float, text: Callable[[float], str] = short) -> str:
    """`[1.21, 1.25]`, each end written by `text`, without commas between thousands: one comma, two numbers.

    Nothing where an end is NaN.
    """
    if math.isnan(low) or math.isnan(high):
        return ""
    return "[" + ", ".join(text(end).replace(",", "") for end in (low, high)) + "]"


def error(value: float | None, digits: int = 1) -> str:
    """A relative error, with so many digits after the point: `1.2e-07`."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}e}"


def with_interval(value: float, low: float | None, high: float | None, unit: str = "") -> str:
    """`1.23 ms [1.21, 1.25]`; without brackets where the interval is not known."""
    text = f"{short(value)}{unit}"
    return text if low is None or high is None else f"{text} {interval(low, high)}".rstrip()


def bits(more: float, sign: str = "+") -> Callable[[float], str]:
    """How a difference of bits per byte and its interval are written: two digits behind the point where more say
    nothing, `+0.19 [+0.17, +0.21]`, else three, `+0.026 [+0.020, +0.032]`.
    """
    return f"{{:{sign}.{2 if more == 0 or abs(more) >= 0.1 else 3}f}}".format


def bits_per_byte(bits: float | None, more: float | None, low: float | None, high: float | None) -> str:
    """`1.750 (+0.250) [+0.200, +0.300]`: how many more than with the native router, and the interval of that."""
    if bits is None or math.isnan(bits):
        return ""
    if more is None or math.isnan(more):
        return f"{bits:.3f}"
    text = f"{bits:.3f} ({more:+.3f})"
    return text if low is None or high is None else f"{text} {interval(low, high, '{:+.3f}'.format)}".rstrip()
