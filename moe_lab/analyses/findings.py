"""What an analysis gives: sentences, tables, and lines to plot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd

from moe_lab.intervals import Estimate


class Line(NamedTuple):
    """One line of a plot; `low` and `high` are the ends of intervals, NaN where there is none."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


class Plot(NamedTuple):
    """A plot of lines; the numbers on x are whole, and with `doubles` powers of two."""

    name: str
    title: str
    x: str
    y: str
    lines: list[Line]
    doubles: bool = False


@dataclass
class Findings:
    """Of one analysis.

    Attributes:
        name: its key in the configuration.
        title: its heading.
        about: how the numbers come about, in a paragraph.
        sentences: what they say, the most important first.
        tables: by the name of their files.
        notes: what was left out, and why.
    """

    name: str
    title: str
    about: str
    sentences: list[str] = field(default_factory=list)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def columns(name: str, estimate: Estimate) -> dict[str, float | None]:
    """An estimate as three columns of a table."""
    return {name: estimate.value, f"{name}_ci95_low": estimate.low, f"{name}_ci95_high": estimate.high}


def line(name: str, table: pd.DataFrame, x: str, y: str) -> Line:
    """Two columns of a table, with the interval of the second if it has one."""
    values = [table[column].to_numpy(float) for column in (x, y)]
    ends = [f"{y}_ci95_low", f"{y}_ci95_high"]
    bounds = [table[end].to_numpy(float) for end in ends] if ends[0] in table else [None, None]
    return Line(name, *values, *bounds)


def percent(value: float, low: float | None = None, high: float | None = None) -> str:
    """`71 %`, or with its interval `71 % [69, 73]`; a digit more where that is narrow or the value near an end."""
    digits = 1 if (low is not None and high is not None and high - low < 0.02) or not 0.095 <= value < 0.95 else 0
    if 0 < value < 0.001 or 0.999 < value < 1:  # which is not none, or all
        digits = 2
    text = f"{100 * value:.{digits}f} %"
    return text if low is None or high is None else f"{text} [{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


def times(value: float, low: float | None = None, high: float | None = None) -> str:
    """`2.51`, or with its interval `2.51 [2.48, 2.53]`."""
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"
