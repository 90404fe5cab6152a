"""The page's section of energy: what a token of each cell took, and at which clocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from moe_lab.results import numbers
from moe_lab.results.settings import describe

PER_TOKEN = "energy.j_per_token"


class Energy(NamedTuple):
    """A row per cell with an energy, those of a setting together, the least first."""

    heads: list[str]
    rows: list[list[str]]
    counters: list[str]
    """Which counters that were, and what they count."""


def energy(runs: pd.DataFrame) -> Energy | None:
    """None where no cell has an energy. A column that no cell has a value for is left out."""
    if PER_TOKEN not in runs or runs[PER_TOKEN].isna().all():
        return None
    known = runs[runs[PER_TOKEN].notna()]
    by_cell = dict(zip(known["cell_id"], known[PER_TOKEN], strict=True))
    known = known.assign(setting=describe(known)).sort_values(["setting", PER_TOKEN], kind="stable")
    rows = [_fields(row, by_cell) for row in known.to_dict("records")]
    heads = [head for head in rows[0] if any(row[head] for row in rows)]
    counters = (known["energy.source"] + " (" + known["energy.counts"] + ")").dropna()
    return Energy(heads, [[row[head] for head in heads] for row in rows], list(dict.fromkeys(counters)))


def _fields(row: Mapping[Any, Any], by_cell: Mapping[str, float]) -> dict[str, str]:
    def number(name: str) -> str:
        value = row.get(name)
        return "" if value is None or pd.isna(value) else numbers.short(float(value))

    anchor, share = by_cell.get(row["ratio_to_anchor.anchor"]), row["energy.resolution_share"]
    return {
        "cell": ", ".join(str(part) for part in (row["variant"], row["setting"]) if part and not pd.isna(part)),
        "J / token": number(PER_TOKEN),
        "energy x anchor": numbers.ratio(row[PER_TOKEN] / anchor) if anchor else "",
        "W": number("energy.mean_power_w"),
        "SM MHz": number("energy.sm_mhz"),
        "memory MHz": number("energy.memory_mhz"),
        "deg C": number("energy.temperature_c"),
        "throttled blocks": number("latency_ms.throttled_blocks"),
        "counter share": "" if pd.isna(share) else f"{share:.0%}",
    }
