"""What a chart is: its panels, one for each setting, and in them the numbers of every variant."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

FILE_PANELS = 6
"""As many panels as a file shows; the report has all."""
NO_INTERVAL = "hollow: no interval"
"""What a hollow marker means."""
MARGIN = 1.25
"""A logarithmic axis goes by this factor beyond its values."""


Place = Mapping[str, str]
"""What tells a setting from the others, by key: `{"model": "decoder_moe", "batch": "batch=2"}`."""
NOWHERE: Place = MappingProxyType({})
"""Of a chart with one setting."""


class Series(NamedTuple):
    """What one variant (in a stack: one phase) contributes to a panel."""

    name: str
    at: list[Any]
    """A size, a load, or the name of the row that it lies in."""
    value: list[float]
    low: Sequence[float | None]
    """Of the value's 95 % interval; None where it has none."""
    high: Sequence[float | None]
    size: list[str]
    """The cell's batch and sequence length, in words."""


class Staircase(NamedTuple):
    """The best of a panel, as a line of steps."""

    name: str
    at: list[float]
    value: list[float]


class Panel(NamedTuple):
    """One picture of a chart: a setting."""

    title: str
    series: list[Series]
    place: Place = NOWHERE
    best: Staircase | None = None
    """Of a search, which has its own rule; a `front` has that of its points."""

    @property
    def bars(self) -> list[str]:
        """The names along the axis, where `at` holds names."""
        return list(dict.fromkeys(at for series in self.series for at in series.at if isinstance(at, str)))

    @property
    def crowd(self) -> int:
        """The most series that have a value beside one name."""
        return max(Counter(at for series in self.series for at in series.at if isinstance(at, str)).values(), default=0)

    @property
    def rows(self) -> float:
        """How many rows of the usual height `dots` need: a crowded one is higher."""
        return len(self.bars) * max(1.0, 0.32 * self.crowd)

    def offsets(self) -> list[float]:
        """By how much of a row each series of `dots` is moved, so that they do not cover each other."""
        n = len(self.series)
        return [0.7 * (index - (n - 1) / 2) / n if self.crowd > 1 else 0.0 for index in range(n)]


class Heat(NamedTuple):
    """The used slots of each layer and expert, and all variants of a setting that have just these."""

    title: str
    variants: list[str]
    layers: list[int]
    counts_LE: np.ndarray
    place: Place = NOWHERE


class Pairs(NamedTuple):
    """The tokens that use two experts of a layer, and all variants of a setting that have just these."""

    title: str
    variants: list[str]
    layers: list[int]
    counts_LEE: np.ndarray
    place: Place = NOWHERE


class Texts(NamedTuple):
    """The used slots of each layer, text and expert, and all variants of a setting that have just these."""

    title: str
    variants: list[str]
    layers: list[int]
    counts_LGE: np.ndarray
    texts: list[str]
    place: Place = NOWHERE


Map = Heat | Pairs | Texts
"""What is drawn in colours; the fourth field of each has an array by layer."""


class Chart(NamedTuple):
    """`lines`, `points` and `front` have numbers along both axes; `dots` and `stack` lie along names.

    A `front` has a staircase below its points: those that no other beats in both.
    """

    name: str
    kind: Literal["lines", "points", "front", "dots", "stack", "heat", "pairs", "texts"]
    title: str
    x_label: str
    y_label: str
    panels: Sequence[Panel | Map]
    has_intervals: bool = False
    """Whether its values may have one, so that it is marked where one does not."""

    def lacks(self, panel: Panel) -> bool:
        """Whether a value of the panel should have an interval and has none."""
        return self.has_intervals and any(None in series.low for series in panel.series)


def is_log(values: Sequence[float]) -> bool:
    """Whether an axis with these values is logarithmic: when they span a factor of eight or more."""
    return min(values) > 0 and max(values) >= 8 * min(values)


def relative_load(counts_LE: np.ndarray) -> np.ndarray:
    """Slots of each expert over the mean of its layer; 0 in a layer without slots. 1 everywhere is an even load.

    Of counts [L, G, E] over the mean of its layer and text.
    """
    mean_L1 = counts_LE.mean(axis=-1, keepdims=True)
    load_LE = np.zeros(counts_LE.shape)
    np.divide(counts_LE, mean_L1, out=load_LE, where=mean_L1 > 0)
    return load_LE


def front(panel: Panel) -> tuple[list[float], list[float]]:
    """The points of a panel that none beats in one direction without losing in the other, from left to right."""
    points = sorted((at, value) for series in panel.series for at, value in zip(series.at, series.value, strict=True))
    best: list[tuple[float, float]] = []
    for at, value in points:
        if not best or value < best[-1][1]:
            best.append((at, value))
    return [at for at, _ in best], [value for _, value in best]


def staircase(panel: Panel, kind: str) -> Staircase | None:
    """The line below the points of a panel, in a chart of this kind; None if it has none."""
    return Staircase("Pareto front", *front(panel)) if kind == "front" else panel.best


_STEPS = ((1.2, (1, 2, 3, 5)), (3.5, (1, 2, 5)), (6.5, (1, 3)), (math.inf, (1,)))
"""Of an axis of fewer decades than this, what is labelled in each."""


def log_ticks(low: float, high: float) -> list[float]:
    """Where a logarithmic axis from low to high is labelled, between the powers of ten too."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = math.log10(high / low)
    steps = next(steps for most, steps in _STEPS if decades < most)
    return [tick for power in powers for step in steps if low <= (tick := step * 10.0**power) <= high]
