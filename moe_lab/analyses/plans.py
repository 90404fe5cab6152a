"""Where experts and their copies lie on ranks: plans, made from what was seen of the load.

A plan is a matrix share_ER: the part of expert e's slots that rank r gets. Rows sum to 1.

    contiguous    neighbouring experts together, the first ranks one more where E is not a multiple of R
    round_robin   expert e on rank e mod R
    greedy        no copies: the heaviest expert first, to the rank with the fewest slots that has room
    eplb          copies to the expert with the most slots a copy, then as greedy, a copy sharing its expert's slots
                  evenly: DeepSeek's balancer (DeepSeek-V3, 2412.19437, section 3.4) without its limits by group
    unique        as eplb, with the steps that need an expert in place of its slots, and in each step one copy of an
                  expert takes all of its slots: that on the rank with the fewest experts so far (METRO, 2512.09277)
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

COPYING = ("eplb", "unique")


def contiguous(E: int, n_ranks: int) -> np.ndarray:
    """share_ER; the load does not matter."""
    sizes = [len(part) for part in np.array_split(np.arange(E), n_ranks)]
    return _of_ranks(np.repeat(np.arange(n_ranks), sizes), n_ranks)


def round_robin(E: int, n_ranks: int) -> np.ndarray:
    """share_ER; the load does not matter."""
    return _of_ranks(np.arange(E) % n_ranks, n_ranks)


def _of_ranks(rank_E: np.ndarray, n_ranks: int) -> np.ndarray:
    return np.asarray(rank_E[:, None] == np.arange(n_ranks), float)


def packed(load_E: np.ndarray, n_ranks: int, n_copies: int) -> np.ndarray:
    """share_ER of greedy, or with `n_copies` copies beyond one of each expert, of eplb.

    A rank has room for (E + copies) / R of them, rounded up, and does not get two of one expert while another rank has
    room.
    """
    E = len(load_E)
    heap = [(-load, expert, 1) for expert, load in enumerate(load_E.tolist())]  # (-load a copy, expert, copies)
    heapq.heapify(heap)
    for _ in range(n_copies):
        _, expert, n = heap[0]
        heapq.heapreplace(heap, (-load_E[expert] / (n + 1), expert, n + 1))
    room, held_R = -(-(E + n_copies) // n_ranks), [0] * n_ranks
    ranks = [(0.0, rank) for rank in range(n_ranks)]  # (slots, rank) of those with room
    share_ER = np.zeros((E, n_ranks))
    for minus_load, expert, n in sorted(heap):
        taken: list[tuple[float, int]] = []  # ranks that got one of this expert
        for _ in range(n):
            if not ranks:  # every rank with room has one already
                ranks, taken = taken, []
                heapq.heapify(ranks)
            load, rank = heapq.heappop(ranks)
            held_R[rank] += 1
            share_ER[expert, rank] += 1 / n
            if held_R[rank] < room:
                taken.append((load - minus_load, rank))
        for entry in taken:
            heapq.heappush(ranks, entry)
    return share_ER


def make(plan: str, counts_HE: np.ndarray, n_ranks: int, n_copies: int) -> np.ndarray:
    """share_ER of a plan, from the slots of each step that was seen and expert."""
    E = counts_HE.shape[1]
    if plan in ("contiguous", "round_robin"):
        return {"contiguous": contiguous, "round_robin": round_robin}[plan](E, n_ranks)
    load_E = (counts_HE > 0).sum(axis=0) if plan == "unique" else counts_HE.sum(axis=0)
    return packed(load_E.astype(float), n_ranks, n_copies if plan in COPYING else 0)


def loads(plan: str, share_ER: np.ndarray, counts_HE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(slots, different experts) of each rank in each step, [H, R]."""
    judge: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    judge = _one_copy if plan == "unique" else _all_copies
    return judge(share_ER, counts_HE)


def _all_copies(share_ER: np.ndarray, counts_HE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return counts_HE @ share_ER, (counts_HE > 0).astype(float) @ (share_ER > 0)


def _one_copy(share_ER: np.ndarray, counts_HE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The experts with one copy first; then, step by step, each on the rank of its copies that has the fewest."""
    is_single_E = (share_ER > 0).sum(axis=1) == 1
    load_HR, unique_HR = _all_copies(share_ER * is_single_E[:, None], counts_HE)
    steps = np.arange(len(counts_HE))
    for expert in np.flatnonzero(~is_single_E):
        ranks = np.flatnonzero(share_ER[expert])
        rank_H = ranks[unique_HR[:, ranks].argmin(axis=1)]
        unique_HR[steps, rank_H] += counts_HE[:, expert] > 0
        load_HR[steps, rank_H] += counts_HE[:, expert]
    return load_HR, unique_HR
