"""A search in a folder of results: its trials, which of them are best, and how much better than the default.

A trial is on the front if no other one, and not the default, is at least as good in every objective and better in one,
by the values measured; a front has no trial beyond a constraint. How sure a difference from the default is says its
interval: that of the ratio of latencies timed in the same rounds, or of the difference in bits per byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from moe_lab.records import search as searches
from moe_lab.records.schema import Record, fields_of
from moe_lab.records.search import RATIO, Objective, Outcome, Search
from moe_lab.results import numbers
from moe_lab.results.charts import BITS, LATENCY
from moe_lab.results.load import UNREADABLE_BECAUSE, one_line
from moe_lab.results.verdicts import every, judged, listed

DELTA = "quality.delta_bits_per_byte"
ENDS_OF = {
    RATIO: ("ratio_to_anchor.ci95_low", "ratio_to_anchor.ci95_high"),
    LATENCY: ("latency_ms.ci95_low", "latency_ms.ci95_high"),
    BITS: (f"{BITS}_ci95_low", f"{BITS}_ci95_high"),
    DELTA: (f"{DELTA}_ci95_low", f"{DELTA}_ci95_high"),
}
_WORDS = {RATIO: "latency", LATENCY: "latency"}
_LABELS = {RATIO: "latency / that of the default", LATENCY: "latency (ms)", BITS: "bits per byte"}
_MOST_NAMES = 4

Place = Literal["front", "beaten", ""]
Kind = Literal["better", "worse", "unsure"]


class Row(NamedTuple):
    """A trial, or the default."""

    number: int
    """From 1; 0 is the default."""
    variant: str
    """As the page calls the cell; what was chosen, where that does not tell the trials apart."""
    outcome: Outcome
    place: Place
    """On the front or beaten; nothing if it has no values, or is outside."""
    record: Mapping[str, Any]
    """Its row of `runs`; empty if there is none."""
    same_as: int | None
    """The trial, or the default, that had this cell before: it was not timed again."""

    def value(self, column: str) -> float:
        """What its record has in a column; NaN where there is nothing."""
        value = self.record.get(column)
        return math.nan if value is None else float(value)

    @property
    def name(self) -> str:
        """As it is called in sentences."""
        return f"trial {self.number} ({self.variant})" if self.number else f"the default ({self.variant})"


class Found(NamedTuple):
    """The search of a folder."""

    search: Search
    default: Row
    trials: list[Row]

    @property
    def front(self) -> list[Row]:
        """Those that no other beats, the best in the first objective first."""
        first = self.search.objectives[0]
        rows = [row for row in (self.default, *self.trials) if row.place == "front"]
        return sorted(rows, key=lambda row: first.sign * row.outcome.values[0])


def find(directory: Path, runs: pd.DataFrame) -> tuple[Found | None, str | None]:
    """The search in a folder whose table is `runs`, None if there is none; and a sentence if it cannot be read."""
    try:
        search = searches.read(directory)
    except UNREADABLE_BECAUSE as error:
        return None, f"Search: {searches.FILE} cannot be read: {one_line(error)}."
    if search is None:
        return None, None
    wanted = {search.default, *(trial.cell_id for trial in search.trials)}
    ordered = runs[runs["cell_id"].isin(wanted)].sort_values("status", ascending=True, kind="stable")
    by_cell = {row["cell_id"]: row for row in reversed(_plain(ordered))}
    known = [row for row in by_cell.values() if row.get("variant") is not None]
    is_told = len({row["variant"] for row in known}) == len(known)  # not where settings were searched
    found: list[Row] = []
    asked = [(search.default, ["as configured"]), *((trial.cell_id, trial.overrides) for trial in search.trials)]
    for number, (cell_id, overrides) in enumerate(asked):
        row = by_cell.get(cell_id)
        earlier = next((one.number for one in found if row is not None and one.record == row), None)
        variant = str(row["variant"]) if row is not None and row in known and is_told else ", ".join(overrides)
        found.append(Row(number, variant, search.outcome(row), "", row or {}, earlier))
    default, *trials = _placed(search, found)
    return Found(search, default, trials), None


def _plain(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Of each record a dict with None for what is missing; a copy of an ok one comes behind it."""
    rows = runs.astype(object).to_dict("records")
    return [
        {str(key): None if not isinstance(value, list) and pd.isna(value) else value for key, value in row.items()}
        for row in rows
    ]


def _placed(search: Search, rows: Sequence[Row]) -> list[Row]:
    """With what is on the front: a cell that two trials have is there once."""
    sound = [row for row in rows if row.outcome.state == "ok" and row.same_as is None]

    def place(row: Row) -> Place:
        if row not in sound:
            return ""
        return "beaten" if any(beats(other, row, search.objectives) for other in sound) else "front"

    return [row._replace(place=place(row)) for row in rows]


def beats(one: Row, other: Row, objectives: Sequence[Objective]) -> bool:
    """Whether a trial is at least as good as another in all objectives, and better in one, by the values measured."""
    pairs = [
        (objective.sign * mine, objective.sign * theirs)
        for objective, mine, theirs in zip(objectives, one.outcome.values, other.outcome.values, strict=True)
    ]
    return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)


# --- sentences


def sentences(found: Found) -> list[str]:
    """What the search found: the best, how much better than the default, and what became of the other trials."""
    have = [row for row in found.trials if row.outcome.state == "ok"]
    if not found.trials:
        return ["The search has no trials yet"]
    if not have:
        return [f"The search has no result: {_left(found)}"]
    several = len(found.search.objectives) > 1
    texts = [_front(found), _of_default(found)] if several else [_best(found)]
    if several and found.front == [found.default]:
        first, second = map(_word, found.search.objectives)
        texts = [f"No trial is better than {found.default.name} in {first} or in {second}, by what was measured"]
    elif several:
        texts += [_end(found, place) for place in range(len(found.search.objectives))]
    return [text for text in (*texts, _capital(_left(found))) if text]


def _front(found: Found) -> str:
    front = found.front
    columns = listed([_word(one) for one in found.search.objectives])
    is_one = len(front) == 1
    return (
        f"{_names(front)} {'is' if is_one else 'are'} the front of {columns}, by what was measured: no trial "
        f"is better than {'it' if is_one else 'any of them'} in both"
    )


def _names(rows: Sequence[Row]) -> str:
    names = [row.name for row in rows]
    text = listed(names[:_MOST_NAMES]) if len(names) <= _MOST_NAMES else ", ".join(names[:_MOST_NAMES])
    text += f" and {len(names) - _MOST_NAMES} others" if len(names) > _MOST_NAMES else ""
    return _capital(text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _of_default(found: Found) -> str:
    """What beats the default in all objectives."""
    default = found.default
    if default.outcome.state != "ok":
        return f"Nothing is compared with {default.name}: {default.outcome.reason or default.outcome.state}"
    better = [row for row in found.trials if row.place and beats(row, default, found.search.objectives)]
    if not better:
        return f"No trial is better than {default.name} in both"
    surely = [row for row in better if any(kind == "better" for _, kind in _beside(found, row))]
    row = max(surely or better, key=lambda one: _gain(found, one))
    said = "; ".join(text for text, _ in _beside(found, row))
    others = f"; so {'is' if len(better) == 2 else 'are'} {len(better) - 1} more" if len(better) > 1 else ""
    doubt = "" if surely else "; no interval shows that it is"
    return f"{_names([row])} is better than {default.name} in both: {said}{doubt}{others}"


def _gain(found: Found, row: Row) -> float:
    """By how many percent it is better than the default, over all objectives."""
    pairs = zip(found.search.objectives, row.outcome.values, found.default.outcome.values, strict=True)
    return sum(one.sign * (theirs - mine) / abs(theirs) for one, mine, theirs in pairs if theirs)


def _end(found: Found, place: int) -> str:
    """The trial that is best in one objective, and its price."""
    objective = found.search.objectives[place]
    row = min(found.front, key=lambda one: objective.sign * one.outcome.values[place])
    if not row.number or found.default.outcome.state != "ok":
        return ""
    said = [text for text, _ in _beside(found, row)]
    own = said.pop(place)
    return f"{_names([row])} is the best in {_word(objective)}: {'; '.join([own, *said])}"


def _best(found: Found) -> str:
    (objective,) = found.search.objectives
    row = found.front[0]
    value = f"{label(objective.column)} {numbers.short(row.outcome.values[0])}"
    n = len(found.trials)
    if not row.number:
        return f"{'The one trial is not' if n == 1 else f'None of {n:,} trials is'} better than {row.name}: {value}"
    best = f"{_names([row])} is the {'only trial' if n == 1 else f'best of {n:,} trials'}"
    if found.default.outcome.state != "ok":
        return f"{best}: {value}"
    ((text, kind),) = _beside(found, row)
    if objective.column not in ENDS_OF:
        return f"{best}: {text}"
    doubt = "" if kind == "better" else "; no interval shows that it is better"
    return f"{best}: {value}; {text}{doubt}"


def _beside(found: Found, row: Row) -> list[tuple[str, Kind]]:
    """Of each objective how a trial differs from the default, and whether that is sure."""
    return [
        _difference(objective, row, found.default, mine, theirs)
        for objective, mine, theirs in zip(
            found.search.objectives, row.outcome.values, found.default.outcome.values, strict=True
        )
    ]


def _difference(objective: Objective, row: Row, default: Row, mine: float, theirs: float) -> tuple[str, Kind]:
    less: Kind = "better" if objective.sign > 0 else "worse"
    more: Kind = "worse" if objective.sign > 0 else "better"
    if objective.column in (RATIO, LATENCY) and row.record.get("ratio_to_anchor.anchor") == default.record["cell_id"]:
        middle, low, high = (row.value(name) for name in (RATIO, *ENDS_OF[RATIO]))
        kind = judged(low, high)
        if kind == "faster":
            bracket = numbers.interval(1 / high, 1 / low, numbers.ratio)
            return f"{numbers.ratio(1 / middle)}x faster {bracket}", less
        bracket = numbers.interval(low, high, numbers.ratio) or "without an interval"
        if kind == "slower":
            return f"{numbers.ratio(middle)}x slower {bracket}", more
        return f"{numbers.ratio(middle)}x the default's latency {bracket}, not surely another", "unsure"
    if objective.column == BITS and default.value(DELTA) == 0:  # the default is the checkpoint's own router
        delta, low, high = (row.value(name) for name in (DELTA, *ENDS_OF[DELTA]))
        write = numbers.bits(delta)
        text = f"{write(delta)} bits per byte {numbers.interval(low, high, write)}".rstrip()
        return text, more if low > 0 else less if high < 0 else "unsure"
    text = f"{label(objective.column)} {numbers.short(mine)} beside {numbers.short(theirs)}, without an interval"
    return text, "unsure"


def _left(found: Found) -> str:
    """What became of the trials that have no place: failed, pruned, outside, not run. Nothing if each has one."""
    states, n = [row.outcome.state for row in found.trials], len(found.trials)
    n_outside, n_repeats = states.count("outside"), sum(row.same_as is not None for row in found.trials)
    limits = ", ".join(_limits(one) for one in found.search.constraints)
    fates = [
        (states.count("failed"), "failed"),
        (states.count("pruned"), "cannot run (pruned)"),
        (states.count("not run"), "did not run yet"),
        (n_outside, f"{'is' if n_outside == 1 else 'are'} outside a constraint ({limits})"),
        (n_repeats, f"had the cell of another and {'was' if n_repeats == 1 else 'were'} not timed again"),
    ]
    fates = [(count, fate) for count, fate in fates if count]
    if states.count("not run") == n:
        return "no trial has run yet"
    if len(fates) == 1 and fates[0][0] == n:
        return f"{every(n, 'trial', 'trials')} {fates[0][1]}"
    return f"of {n:,} trials {listed([f'{count:,} {fate}' for count, fate in fates])}" if fates else ""


def _limits(constraint: searches.Constraint) -> str:
    ends = {"at least": constraint.min, "at most": constraint.max}
    said = [f"{word} {numbers.short(end)}" for word, end in ends.items() if end is not None]
    return f"{constraint.column} {' and '.join(said)}"


def _word(objective: Objective) -> str:
    return _WORDS.get(objective.column) or label(objective.column)


def label(column: str) -> str:
    """A column for people."""
    unit = next((one.unit for one in fields_of(Record) if one.name == column), "")
    return _LABELS.get(column, f"{column} ({unit})" if unit and unit != "1" else column)
