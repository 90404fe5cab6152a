"""`search.json` of a sweep's folder: what a search asked for, trial by trial. What came of it stands in the records.

So the two cannot disagree: who continues a search, or shows it, takes every value from the record of the trial's cell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe_lab.errors import nearest
from moe_lab.records import files, store
from moe_lab.records.schema import Record, fields_of

FILE = "search.json"
RATIO, _RATIO_OF = "ratio_to_anchor.p50", "ratio_to_anchor.anchor"
DIRECTIONS = ("minimize", "maximize")

State = Literal["ok", "outside", "failed", "pruned", "not run"]


class Outcome(NamedTuple):
    """What became of a trial.

    `ok`: it has all values. `outside`: it has them, and is beyond a constraint. `failed`: its cell failed, or lacks a
    value. `pruned`: its cell cannot run, so it was not timed. `not run`: nothing is known yet.
    """

    state: State
    values: tuple[float, ...] = ()
    """Of the objectives, in their order."""
    excess: Mapping[str, float] = {}
    """For each limit by how much the trial is beyond it; 0 or less within."""
    reason: str | None = None


@dataclass(frozen=True)
class Objective:
    """A column of `runs.csv`, and where better lies."""

    column: str
    direction: str

    @property
    def sign(self) -> int:
        """1 if less is better, -1 if more is."""
        return 1 if self.direction == DIRECTIONS[0] else -1


@dataclass(frozen=True)
class Constraint:
    """A column, and what its value must not be below or above."""

    column: str
    min: float | None = None
    max: float | None = None

    def excess(self, value: float) -> dict[str, float]:
        """For each of its limits by how much a value is beyond it."""
        limits = {"min": None if self.min is None else self.min - value}
        limits["max"] = None if self.max is None else value - self.max
        return {f"{self.column} {end}": by for end, by in limits.items() if by is not None}


@dataclass(frozen=True)
class Trial:
    """One choice of the sampler."""

    number: int
    batch: int
    """Trials of one batch were asked for at once, and timed together."""
    params: dict[str, float | int | str]
    """What the sampler chose, by the names of its distributions."""
    overrides: list[str]
    """The same as it is typed."""
    cell_id: str | None = None


@dataclass(frozen=True)
class Search:
    """A search; what it asks for follows from what stands here before the trials, and from their outcomes."""

    objectives: list[Objective]
    constraints: list[Constraint]
    space: list[str]
    """The axes as they are typed."""
    sampler: str
    population: int
    seed: int
    default: str | None = None
    """The cell_id of the configuration without what is searched."""
    trials: list[Trial] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """What a trial needs a value of."""
        return [*(one.column for one in self.objectives), *(one.column for one in self.constraints)]

    def outcome(self, row: Mapping[str, Any] | None) -> Outcome:
        """What became of a trial whose cell has this row of `runs`, or `row_of` its record."""
        if row is None:
            return Outcome("not run")
        if row["status"] != "ok":
            state: State = "failed" if row["status"] == "failed" else "pruned"
            return Outcome(state, reason=str(row.get("reason")))
        numbers = {column: self._number(row, column) for column in self.columns}
        if lacking := [column for column, number in numbers.items() if not math.isfinite(number)]:
            return Outcome("failed", reason=f"the record has no {lacking[0]}")
        values = tuple(numbers[one.column] for one in self.objectives)
        excess: dict[str, float] = {}
        for constraint in self.constraints:
            excess |= constraint.excess(numbers[constraint.column])
        if beyond := [name for name, by in excess.items() if by > 0]:
            column = beyond[0].partition(" ")[0]
            return Outcome("outside", values, excess, f"{column} is {numbers[column]:.4g}, beyond its {beyond[0][-3:]}")
        return Outcome("ok", values, excess)

    def _number(self, row: Mapping[str, Any], column: str) -> float:
        """NaN where there is none; a ratio counts only beside the default, which is 1 beside itself."""
        if column == RATIO and row["cell_id"] == self.default:
            return 1.0
        value = row.get(column)
        is_beside = column != RATIO or row.get(_RATIO_OF) == self.default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if value is not None and is_number and is_beside else math.nan

    def write(self, directory: Path) -> None:
        """Write `search.json` into a sweep's folder."""
        store.write_atomic(directory / FILE, json.dumps({"schema": 1, **asdict(self)}, indent=1).encode() + b"\n")


def read(directory: Path) -> Search | None:
    """The search of a sweep's folder; None if it is a sweep of another kind.

    Raises:
        ValueError, KeyError, TypeError, OSError: there is a file that cannot be read.
    """
    try:
        content: Any = files.read_json(directory / FILE)
    except FileNotFoundError:
        return None
    if content.pop("schema") != 1:
        raise ValueError(f"{FILE}: this version of moe-lab reads schema 1.")
    content["objectives"] = [Objective(**one) for one in content["objectives"]]
    content["constraints"] = [Constraint(**one) for one in content["constraints"]]
    content["trials"] = [Trial(**one) for one in content["trials"]]
    return Search(**content)


def row_of(record: Record) -> dict[str, Any]:
    """A record as a row of `runs`: its values by dotted names."""
    row: dict[str, Any] = {}

    def flatten(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                flatten(value, f"{prefix}{key}.")
            else:
                row[f"{prefix}{key}"] = value

    flatten({key: value for key, value in record.to_dict().items() if key != "config"}, "")
    return row


def column(name: str, place: str) -> str:
    """The column of numbers with this name, or with this last part or parts: `latency_ms` is `latency_ms.p50`.

    Raises:
        ValueError: there is none, or there are several; `place` is the key that names it.
    """
    known = [one.name for one in fields_of(Record) if one.kind in (int, float)]
    if name in known or name.startswith("quality.domains."):  # texts have names of their own
        return name
    found = [one for one in known if one == f"{name}.p50"] or [one for one in known if one.endswith(f".{name}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{place}: {name} may be {', '.join(found)}; write one of them.")
    short = [one.removesuffix(".p50") for one in known]
    near = nearest(name, [*(one.rpartition(".")[2] for one in short), *short])
    raise ValueError(f"{place}: {name} is not a column of numbers of runs.csv (docs/results-format.md).{near}")
