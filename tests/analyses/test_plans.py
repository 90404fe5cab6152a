"""analyses/plans.py: plans by hand, and what every plan is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.analyses.placement import PLANS
from moe_lab.analyses.plans import COPYING, contiguous, loads, make, packed, round_robin
from moe_lab.measure import placement as in_hindsight


def ranks_of(share_ER: np.ndarray) -> list[list[int]]:
    """The experts of each rank."""
    return [np.flatnonzero(column).tolist() for column in share_ER.T]


def test_places_without_a_load() -> None:
    """As measure/placement.py puts them."""
    assert ranks_of(contiguous(5, 2)) == [[0, 1, 2], [3, 4]] and ranks_of(round_robin(5, 2)) == [[0, 2, 4], [1, 3]]
    counts = np.arange(10)
    for make_plan, judge in ((contiguous, in_hindsight.contiguous), (round_robin, in_hindsight.round_robin)):
        assert (counts @ make_plan(10, 4)).tolist() == judge(counts, 4).tolist()


def test_packing_by_hand() -> None:
    """Loads 6 5 4 3 on two ranks: 6 and 3, 5 and 4. With two copies 6 and 5 are halved: 3 + 2.5 + 4, 3 + 2.5 + 3."""
    assert ranks_of(packed(np.array([6.0, 5, 4, 3]), 2, 0)) == [[0, 3], [1, 2]]
    share_ER = packed(np.array([6.0, 5, 4, 3]), 2, 2)
    assert share_ER.tolist() == [[0.5, 0.5], [0.5, 0.5], [1, 0], [0, 1]]


def test_one_copy_takes_all_by_hand() -> None:
    """Expert 0 has copies on both ranks, 1 and 2 are alone on 0 and 1: it goes where fewer are in use."""
    share_ER = np.array([[0.5, 0.5], [1, 0], [0, 1]])
    counts_HE = np.array([[4, 1, 0], [4, 0, 1], [0, 2, 2]])
    load_HR, unique_HR = loads("unique", share_ER, counts_HE)
    assert load_HR.tolist() == [[1, 4], [4, 1], [2, 2]] and unique_HR.tolist() == [[1, 1], [1, 1], [1, 1]]
    load_HR, unique_HR = loads("eplb", share_ER, counts_HE)
    assert load_HR.tolist() == [[3, 2], [2, 3], [2, 2]] and unique_HR.tolist() == [[2, 1], [1, 2], [1, 1]]


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 8),
)
def test_what_every_plan_is(counts: list[list[int]], n_ranks: int, n_copies: int) -> None:
    """Every slot goes somewhere, no rank has more than its room, and no load is lost."""
    counts_HE = np.array(counts)
    for plan in PLANS:
        share_ER = make(plan, counts_HE, n_ranks, n_copies)
        assert share_ER.shape == (6, n_ranks) and np.allclose(share_ER.sum(axis=1), 1)
        if plan in COPYING:
            assert (share_ER > 0).sum(axis=0).max() <= -(-(6 + n_copies) // n_ranks)
        load_HR, unique_HR = loads(plan, share_ER, counts_HE)
        assert np.allclose(load_HR.sum(axis=1), counts_HE.sum(axis=1))
        assert (unique_HR.sum(axis=1) >= (counts_HE > 0).sum(axis=1)).all()
        if plan == "unique":
            assert np.array_equal(unique_HR.sum(axis=1), (counts_HE > 0).sum(axis=1))


_LOADS = [  # of 12 experts in two layers: the example in the README of deepseek-ai/EPLB
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
_PUBLISHED = [  # its plan, two copies for each of eight GPUs; the first four are one node, which has whole groups
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


@pytest.mark.parametrize("layer", [pytest.param(layer, id=f"layer{layer}") for layer in (0, 1)])
def test_the_published_plan_of_eplb(layer: int) -> None:
    """Of the experts of a node our plan is the published one; without nodes it is the better balanced."""
    load_E, on_GPU = np.array(_LOADS[layer], float), np.array(_PUBLISHED[layer]).reshape(8, 2)
    published_R = (load_E / np.bincount(on_GPU.reshape(-1)))[on_GPU].sum(axis=1)
    for node in (slice(4), slice(4, 8)):
        experts = np.unique(on_GPU[node])
        share_ER = packed(load_E[experts], 4, 8 - len(experts))
        assert ranks_of(share_ER) == [sorted(experts.searchsorted(pair)) for pair in on_GPU[node].tolist()]
        assert load_E[experts] @ share_ER == pytest.approx(published_R[node])
    ours_R = load_E @ packed(load_E, 8, 4)
    assert ours_R.sum() == published_R.sum() and ours_R.max() < published_R.max()


@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"seed{seed}") for seed in range(5)])
def test_greedy_is_near_the_best_of_all(seed: int) -> None:
    """Of all ways to put six experts on two ranks of three; the bound of the longest-processing-time rule is 7 / 6."""
    load_E = np.random.default_rng(seed).integers(1, 20, 6).astype(float)
    halves = [load_E[list(half)].sum() for half in itertools.combinations(range(6), 3)]
    best = min(max(half, load_E.sum() - half) for half in halves)
    assert best <= (load_E @ packed(load_E, 2, 0)).max() <= 7 / 6 * best * 1.1
