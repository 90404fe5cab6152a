"""What the page shows of a search: a table of its trials, and a plot with the front or the best so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from moe_lab.records.search import RATIO
from moe_lab.results import numbers
from moe_lab.results.charts import BITS, LATENCY, Charts
from moe_lab.results.panels import Chart, Panel, Series, Staircase
from moe_lab.results.search import DELTA, ENDS_OF, Found, Row, beats, label

_GROUPS = ("on the front", "other trials", "outside a constraint", "the default")
_NO_LINES = "Latency, throughput and bits over numbers: a sampler chose these; the table of the search has them."
_HEADS = {RATIO: "x default", LATENCY: "median ms"}


# --- the table


class Table(NamedTuple):
    """The trials in their order, the default in front."""

    title: str
    heads: list[str]
    rows: list[tuple[list[str], str, bool]]
    """(trial, variant and values, what became of it, whether it is on the front)."""


def table(found: Found) -> Table:
    """Of a search's page."""
    columns = list(dict.fromkeys(found.search.columns))
    rows = []
    for row in (found.default, *found.trials):
        numbered = [str(row.number) if row.number else "default", row.variant]
        values = [_text(row, column) for column in columns]
        rows.append(([*numbered, *values], _fate(found, row), row.place == "front"))
    search = found.search
    n = len(found.trials)  # `seed` alone is that of the weights and tokens
    title = f"{n:,} trial{'' if n == 1 else 's'}, sampler={search.sampler}, hydra.sweeper.seed={search.seed}"
    return Table(title, ["trial", "variant", *(_HEADS.get(column) or label(column) for column in columns)], rows)


def _text(row: Row, column: str) -> str:
    """The value and its interval, as the page's other tables write it; the default is 1 beside itself."""
    if column == BITS and not math.isnan(row.value(DELTA)):
        return _unbroken(
            numbers.bits_per_byte(row.value(BITS), *(row.value(name) for name in (DELTA, *ENDS_OF[DELTA])))
        )
    value = 1.0 if column == RATIO and not row.number else row.value(column)
    low, high = (row.value(end) for end in ENDS_OF.get(column, ("", "")))
    if math.isnan(value):
        return ""
    return _unbroken(f"{numbers.four(value)} {numbers.interval(low, high, numbers.four)}".rstrip())


def _unbroken(text: str) -> str:
    """A line may break before an interval, and not in it."""
    return text.replace(", ", ",\u00a0")


def _fate(found: Found, row: Row) -> str:
    """What became of a trial, in words."""
    if row.outcome.state != "ok":
        return f"{row.outcome.state}: {row.outcome.reason}" if row.outcome.reason else row.outcome.state
    if row.same_as is not None:
        return f"the cell of {f'trial {row.same_as}' if row.same_as else 'the default'}, not timed again"
    if row.place == "front":
        return "on the front" if len(found.search.objectives) > 1 else "the best"
    by = next((one for one in found.front if beats(one, row, found.search.objectives)), None)
    return f"beaten by {f'trial {by.number}' if by and by.number else 'the default'}"


# --- the plot


def with_chart(charts: Charts, found: Found | None) -> Charts:
    """The charts with that of the search in front: the trials and their front, or the best so far.

    Those over a number that a sampler chose are left out: in them every trial is a line of its own.
    """
    if found is None:
        return charts
    chart = _chart(found)
    kept = [one for one in charts.drawn if "_over_" not in one.name]
    left_out = [*charts.left_out, *([_NO_LINES] if len(kept) < len(charts.drawn) else [])]
    drawn = [chart, *kept] if chart.panels else kept
    return charts._replace(drawn=drawn, left_out=left_out, variants=[*_GROUPS, *charts.variants])


def _chart(found: Found) -> Chart:
    """The first objective over the second, or over the trials if there is no second."""
    first, *second = found.search.objectives
    groups: dict[str, list[Row]] = {name: [] for name in _GROUPS}
    for row in (*found.trials, found.default):
        if row.outcome.values:
            groups[_group(row, is_front=bool(second))].append(row)
    series = [_series(name, rows, first.column, bool(second)) for name, rows in groups.items() if rows]
    panels = [Panel("", series, best=_front(found) if second else _best_so_far(found))] if series else []
    x = label(second[0].column) if second else "trial (0 is the default)"
    title = "Search: the front" if second else "Search: the best so far"
    return Chart("search", "points", title, x, label(first.column), panels, first.column in ENDS_OF)


def _front(found: Found) -> Staircase:
    """From what is best in the second objective on, so that the steps go round what is worse in both."""
    sign = found.search.objectives[1].sign
    pairs = sorted((row.outcome.values for row in found.front), key=lambda values: sign * values[1])
    return Staircase("front", [at for _, at in pairs], [value for value, _ in pairs])


def _best_so_far(found: Found) -> Staircase:
    best: list[float] = []
    at = []
    for row in (row for row in (found.default, *found.trials) if row.outcome.state == "ok"):
        sign = found.search.objectives[0].sign
        best.append(sign * min(sign * value for value in (*best[-1:], row.outcome.values[0])))
        at.append(float(row.number))
    return Staircase("best so far", at, best)


def _group(row: Row, *, is_front: bool) -> str:
    if not row.number:
        return _GROUPS[3]
    if row.outcome.state == "outside":
        return _GROUPS[2]
    return _GROUPS[0] if row.place == "front" and is_front else _GROUPS[1]


def _series(name: str, rows: Sequence[Row], column: str, has_two: bool) -> Series:
    ends = []
    for end in ENDS_OF.get(column, ("", "")):
        values = [None if math.isnan(number := row.value(end)) else number for row in rows]
        is_one = column == RATIO and name == _GROUPS[3]  # the default beside itself
        ends.append([1.0] * len(rows) if is_one else values)
    at = [row.outcome.values[1] if has_two else float(row.number) for row in rows]
    notes = [f"trial {row.number}: {row.variant}" if row.number else row.variant for row in rows]
    return Series(name, at, [row.outcome.values[0] for row in rows], ends[0], ends[1], notes)
