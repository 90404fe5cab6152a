"""What dominates what: no better in quality, time and bytes of experts, and surely worse in one of them.

The rest is the Pareto front, from which one takes what one can pay. The intervals decide, as in `contest`: worse
quality is an interval of bits per byte above the other's, more time an interval of the ratio of latencies above 1.
Where they leave it open, a variant that only looks better, by more than `SAME_BITS` or `SAME`, is not dominated. Bytes
that differ by no more than `SAME` are the same: other tokens need others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from moe_lab.results.contest import SAME_BITS, Cell, Setting
from moe_lab.results.regions import regions
from moe_lab.results.verdicts import SAME, listed


class Dominance(NamedTuple):
    """`no better quality at more time` than the variant `by`."""

    by: str
    why: str


def dominated(setting: Setting) -> dict[str, Dominance]:
    """Of each variant that is not on the front, another that dominates it: one of the front, if there is one."""
    found: dict[str, dict[str, str]] = {}
    for cell in setting.cells:
        whys = {other.variant: why for other in setting.cells if (why := _why(cell, other)) is not None}
        if whys:
            found[cell.variant] = whys
    often = {by: sum(by in whys for whys in found.values()) for whys in found.values() for by in whys}
    best = {variant: max(whys, key=lambda by: (by not in found, often[by])) for variant, whys in found.items()}
    return {variant: Dominance(by, found[variant][by]) for variant, by in best.items()}


def _why(cell: Cell, other: Cell) -> str | None:
    """Why `other` dominates `cell`; None if it does not, or if that cannot be told."""
    mine, theirs = cell.quality, other.quality
    if mine is None or theirs is None or mine.kind != theirs.kind or mine.kind == "error":
        return None
    if not (mine.is_sure and theirs.is_sure) or cell.choice == other.choice:
        return None
    if other.is_causal is False and cell.is_causal is not False:  # it sees the text that it predicts
        return None
    is_timed = cell.is_timed and other.is_timed
    has_bytes = not math.isnan(cell.expert_mb) and not math.isnan(other.expert_mb)
    looks_better = (
        mine.value < theirs.value - SAME_BITS
        or (is_timed and (cell.ratio[0] * (1 + SAME) < other.ratio[0] or other.is_slower_than(cell)))
        or (has_bytes and cell.expert_mb * (1 + SAME) < other.expert_mb)
    )
    if looks_better or not (is_timed or has_bytes):
        return None
    more = ["time"] if is_timed and cell.is_slower_than(other) else []
    more += ["bytes"] if has_bytes and cell.expert_mb > other.expert_mb * (1 + SAME) else []
    if mine.is_worse_than(theirs):
        cost = f"at more {listed(more)}" if more else f"and no {'less time' if is_timed else 'fewer bytes'} seen"
        return f"worse quality {cost}"
    return f"no better quality at more {listed(more)}" if more else None


def sentences(settings: Sequence[Setting]) -> list[str]:
    """One for the variants that one other dominates for one reason, and where."""
    found = [dominated(setting) for setting in settings]
    alike: dict[tuple[Dominance, str], list[str]] = {}
    for variant in dict.fromkeys(cell.variant for setting in settings for cell in setting.cells):
        there = [n for n, setting in enumerate(settings) if any(cell.variant == variant for cell in setting.cells)]
        for region in regions([found[n].get(variant) for n in there], [settings[n].place for n in there]):
            if region.answer is not None:
                alike.setdefault((region.answer, region.at), []).append(variant)
    return [
        f"{listed(names)} {'is' if len(names) == 1 else 'are'} dominated by {by}{at}: {why}"
        for ((by, why), at), names in alike.items()
    ]
