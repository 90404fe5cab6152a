"""Small folders with a search: records and `search.json`, written as plain files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from moe_lab.records.schema import Ratio, Record
from moe_lab.records.search import RATIO, Constraint, Objective, Search, Trial
from moe_lab.results import search
from moe_lab.results.aggregate import aggregate
from moe_lab.results.search import Found
from tests.results import compared

BITS = "quality.bits_per_byte"
BOTH = (Objective(RATIO, "minimize"), Objective(BITS, "minimize"))


def cell(temperature: float, **fields: Any) -> Record:
    """A cell of its own."""
    config = copy.deepcopy(compared.tiny_config())
    config["router"]["temperature"] = temperature
    return compared.record(*fields.pop("medians", (2.0,)), config={"router": config["router"]}, **fields)


def trial(temperature: float, ratio: float, more_bits: float, *, wide: float = 0.01, **fields: Any) -> Record:
    """One that ran: its latency over the default's and its bits over the default's 2, each within `wide`."""
    ends = {"ci95_low": ratio - wide, "ci95_high": ratio + wide}
    quality = {"bits_per_byte": 2 + more_bits, "delta_bits_per_byte": more_bits}
    quality |= {"delta_bits_per_byte_ci95_low": more_bits - wide, "delta_bits_per_byte_ci95_high": more_bits + wide}
    beside = Ratio(anchor=default().cell_id, p50=ratio, rounds=9, **ends)
    return cell(temperature, quality=quality, ratio_to_anchor=beside, medians=(2 * ratio,), **fields)


def default() -> Record:
    """The checkpoint's own router."""
    return cell(1.0, quality={"bits_per_byte": 2.0, "delta_bits_per_byte": 0.0})


def write(
    folder: Path,
    *trials: Record | None,
    objectives: tuple[Objective, ...] = BOTH,
    constraints: tuple[Constraint, ...] = (),
    beside: Record | None = None,
) -> Path:
    """A folder with the default and these trials; None is one that did not run."""
    first = beside or default()
    records = {one.cell_id: one for one in (first, *trials) if one is not None}
    compared.write(folder, *records.values())
    asked = [
        Trial(at, at // 4, {"t": at}, [f"t={at}"], "0" * 12 if one is None else one.cell_id)
        for at, one in enumerate(trials)
    ]
    made = Search([*objectives], [*constraints], ["t=interval(0,9)"], "tpe", 8, 0, first.cell_id, asked)
    made.write(folder)
    return folder


def found(folder: Path) -> Found:
    """The search of a folder."""
    result, error = search.find(folder, aggregate(folder).runs)
    assert result is not None and error is None
    return result
