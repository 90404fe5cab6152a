"""Expert parallelism on paper: how many slots each rank would get if the experts lay on several devices.

`contiguous` and `round_robin` are where experts are put without knowing their load; `eplb` knows it: the greedy
replication and packing of DeepSeek's expert-parallel load balancer (DeepSeek-V3, 2412.19437, section 3.4), without its
limits by group and node. It is fitted to the very load that it is judged by, so tokens to come will do worse; being
greedy it may, on few experts, do a few per cent worse than no plan at all.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heapreplace

import numpy as np

from moe_lab.records import fields


def contiguous(counts_E: np.ndarray, n_ranks: int) -> np.ndarray:
    """[R] slots of each rank: neighbouring experts together, the first ranks one more where E is no multiple of R."""
    return np.array([part.sum() for part in np.array_split(counts_E, n_ranks)])


def round_robin(counts_E: np.ndarray, n_ranks: int) -> np.ndarray:
    """[R] slots of each rank: expert e on rank e mod R."""
    return np.array([counts_E[rank::n_ranks].sum() for rank in range(n_ranks)])


def eplb(counts_E: np.ndarray, n_ranks: int) -> np.ndarray:
    """[R] slots of each rank, which has room for E / R experts, rounded up, and one more: replicas fill what is left.

    A replica goes to the expert with the most slots a copy, which its copies share evenly; then the copies go, the
    heaviest first, to the rank with the fewest slots that has room.
    """
    room = -(-len(counts_E) // n_ranks) + 1
    copies = [(-count, 1, count) for count in counts_E.tolist()]  # (-slots a copy, copies, slots)
    heapify(copies)
    for _ in range(n_ranks * room - len(counts_E)):
        _, n, count = copies[0]
        heapreplace(copies, (-count / (n + 1), n + 1, count))
    ranks = [(0.0, rank, 0) for rank in range(n_ranks)]  # (slots, rank, copies held) of those with room
    load_R = np.zeros(n_ranks)
    for share in sorted((count / n for _, n, count in copies for _ in range(n)), reverse=True):
        load, rank, held = ranks[0]
        load_R[rank] = load + share
        if held + 1 < room:
            heapreplace(ranks, (load + share, rank, held + 1))
        else:
            heappop(ranks)
    return load_R


PLACEMENTS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    place.__name__: place for place in (contiguous, round_robin, eplb)
}
assert tuple(PLACEMENTS) == tuple(fields.PLACEMENTS), "PLACEMENTS must match records.fields.PLACEMENTS"
NAMES = fields.names(fields.RANK_LOADS)
"""One per placement and degree."""


def fullest_ranks(counts_E: np.ndarray) -> np.ndarray:
    """The slots of the fullest rank, as `NAMES`; NaN where there are more ranks than experts."""
    return np.array(
        [
            place(counts_E, degree).max() if degree <= len(counts_E) else np.nan
            for place in PLACEMENTS.values()
            for degree in fields.DEGREES
        ]
    )
