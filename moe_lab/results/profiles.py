"""The page's section of profiles: the ten longest kernels of each cell that was profiled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd

from moe_lab.records.store import TIMELINE
from moe_lab.results import numbers
from moe_lab.results.settings import describe

_TOP = "profile.top"
HEADS = ["kernel", "phase", "computed by", "calls", "ms", "share"]


class Profile(NamedTuple):
    """One cell; a row per kernel with the fields of `heads`."""

    title: str
    total: str
    heads: list[str]
    rows: list[list[str]]
    note: str
    ncu: str
    timeline: str
    """A link, empty where the file is not there."""


def profiles(directory: Path, runs: pd.DataFrame) -> list[Profile]:
    """Of the cells in `directory` that were profiled, in their order."""
    if _TOP not in runs:
        return []
    what = describe(runs)
    known = runs[runs[_TOP].notna()]
    return [_profile(directory, row, what[index]) for index, row in known.iterrows()]


def _profile(directory: Path, row: Mapping[Any, Any], setting: str) -> Profile:
    title = ", ".join(str(part) for part in (row["variant"], setting) if part and not pd.isna(part))
    kind = "kernels" if row["environment.device"] == "cuda" else "operations"
    launches, total = (numbers.short(float(row[f"profile.{name}"])) for name in ("launches", "kernels_ms"))
    left_out, file = int(row["profile.timeline_left_out"]), directory / row["directory"] / TIMELINE
    note = f"The middle one of {int(row['profile.steps'])} steps. Phases: {row['profile.phases_from']}."
    return Profile(
        title,
        f"{launches} {kind}, {total} ms",
        ["operation", *HEADS[1:]] if kind == "operations" else HEADS,
        [_kernel(kernel) for kernel in _listed(row[_TOP])],
        note + (f" {left_out:,} events are not in the timeline." if left_out else ""),
        "" if pd.isna(row["profile.ncu"]) else str(row["profile.ncu"]),
        quote(f"{row['directory']}/{TIMELINE}") if file.exists() else "",
    )


def _kernel(kernel: Mapping[str, Any]) -> list[str]:
    calls, ms = (numbers.short(float(kernel[name])) for name in ("calls", "ms"))
    return [
        str(kernel["name"]),
        str(kernel["phase"] or "other"),
        str(kernel["implementation"]),
        calls,
        ms,
        f"{float(kernel['share']):.1%}",
    ]


def _listed(text: Any) -> list[Mapping[str, Any]]:
    """The list that a column of a place holds as text; empty if somebody wrote something else there."""
    try:
        found = json.loads(text)
        return [one for one in found if set(one) >= {"name", "phase", "implementation", "calls", "ms", "share"}]
    except (ValueError, TypeError):
        return []
