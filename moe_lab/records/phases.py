"""When the phases of a run are shown as milliseconds, and when as shares of the pass that measured them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AGREES = 0.2
"""How far the pass that measured the phases may be from the median latency, as a share of it."""
OF_THE_PASS = ("execution", "sum_ms", "launch_gap_ms", "matched")
"""What a record's `phases_ms` says of the whole pass; everything else there is a phase."""


def split(phases_ms: Mapping[str, Any], p50_ms: float) -> tuple[dict[str, Any], dict[str, float | None]]:
    """`phases_ms`, with phases only where they agree with the latency, and `phases_share`, which sum up to 1."""
    total = phases_ms["sum_ms"]
    phases = {name: ms for name, ms in phases_ms.items() if name not in OF_THE_PASS}
    shares = {name: None if ms is None or not total else ms / total for name, ms in phases.items()}
    if abs(total / p50_ms - 1) <= AGREES:
        return dict(phases_ms), shares
    return {**phases_ms, **dict.fromkeys(phases)}, shares
