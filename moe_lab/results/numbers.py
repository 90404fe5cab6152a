"""How numbers are written for people: on the terminal, on the report page, in sentences. The tables have all digits."""

from __future__ import annotations


def short(value: float | None, missing: str = "-") -> str:
    """Three digits, from 1000 on all before the point: `0.123`, `12.3`, `1,234`."""
    if value is None:
        return missing
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def four(value: float) -> str:
    """Four digits, trailing zeros too, so that a column of them lines up; from 1000 on all before the point."""
    return f"{value:#.4g}" if abs(value) < 999.95 else f"{value:,.0f}"


def ratio(value: float) -> str:
    """Three digits, up to five where fewer would make a number that is not 1 read as 1."""
    return next((text for text in (f"{value:.{digits}g}" for digits in (3, 4, 5)) if float(text) != 1), "1")


def error(value: float | None, digits: int = 1) -> str:
    """A relative error, with so many digits after the point: `1.2e-07`."""
    return "-" if value is None else f"{value:.{digits}e}"


def with_interval(value: float, low: float | None, high: float | None, unit: str = "") -> str:
    """`1.23 ms [1.21, 1.25]`; without brackets where the interval is not known."""
    text = f"{short(value)}{unit}"
    return text if low is None or high is None else f"{text} [{short(low)}, {short(high)}]"


def bits_per_byte(bits: float | None, more: float | None, low: float | None, high: float | None) -> str:
    """`1.750 (+0.250) [+0.200, +0.300]`: how many more than with the native router, and the interval of that."""
    if bits is None:
        return ""
    if more is None:
        return f"{bits:.3f}"
    text = f"{bits:.3f} ({more:+.3f})"
    return text if low is None or high is None else f"{text} [{low:+.3f}, {high:+.3f}]"
