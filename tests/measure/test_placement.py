"""measure/placement.py: where experts lie, by hand, and what no placement can beat."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.measure.placement import NAMES, PLACEMENTS, contiguous, eplb, fullest_ranks, round_robin
from moe_lab.records.fields import DEGREES

COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=40).map(np.array)


@pytest.mark.parametrize(
    ("place", "n_ranks", "expected"),
    [
        pytest.param(contiguous, 2, [10 + 4, 3 + 2], id="contiguous-2"),
        pytest.param(contiguous, 3, [10 + 4, 3, 2], id="contiguous-3 of 4: the first has one more"),
        pytest.param(round_robin, 2, [10 + 3, 4 + 2], id="round_robin-2"),
        pytest.param(round_robin, 3, [10 + 2, 4, 3], id="round_robin-3 of 4"),
        # Three places a rank, so two copies more, both of the first: 4, then three of 10 / 3, 3, 2.
        pytest.param(eplb, 2, [4 + 10 / 3 + 2, 10 / 3 + 10 / 3 + 3], id="eplb-2"),
        # Two places a rank, so four copies more: 3, then four of 10 / 4, two of 4 / 2, 2.
        pytest.param(eplb, 4, [3 + 2, 2.5 + 2, 2.5 + 2, 2.5 + 2.5], id="eplb-4"),
    ],
)
def test_ranks_hold_what_they_hold_by_hand(place: object, n_ranks: int, expected: list[float]) -> None:
    """Four experts with 10, 4, 3 and 2 slots."""
    assert sorted(place(np.array([10, 4, 3, 2]), n_ranks)) == pytest.approx(sorted(expected))  # type: ignore[operator]


@settings(max_examples=80, deadline=None)
@given(counts_E=COUNTS, n_ranks=st.integers(1, 40))
@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in PLACEMENTS])
def test_every_slot_is_on_one_rank(name: str, counts_E: np.ndarray, n_ranks: int) -> None:
    """Nothing is lost, nothing is invented, and the fullest is no emptier than the mean."""
    load_R = PLACEMENTS[name](counts_E, min(n_ranks, len(counts_E)))
    assert len(load_R) == min(n_ranks, len(counts_E))
    assert load_R.sum() == pytest.approx(counts_E.sum())
    assert load_R.max() >= load_R.mean() - 1e-9


@settings(max_examples=80, deadline=None)
@given(E=st.integers(1, 40), n_ranks=st.integers(1, 16))
def test_one_expert_with_all_slots_is_in_every_copy_there_is_room_for(E: int, n_ranks: int) -> None:
    """All replicas are its own, and no rank holds two copies more than another."""
    n_ranks = min(n_ranks, E)
    counts_E = np.zeros(E)
    counts_E[E // 2] = 120
    copies = n_ranks * (-(-E // n_ranks) + 1) - E + 1
    assert eplb(counts_E, n_ranks).max() == pytest.approx(-(-copies // n_ranks) * 120 / copies)


def test_a_hot_expert_is_spread_by_copies_alone() -> None:
    """Half of all slots on one of 64 experts: 8 ranks without copies have 4 times the mean, with them 4 / 3:
    it is in nine copies then, and the ninth makes one rank fuller."""
    counts_E = np.full(64, 10)
    counts_E[17] = 630
    mean = counts_E.sum() / 8
    assert contiguous(counts_E, 8).max() / mean > 4
    assert eplb(counts_E, 8).max() / mean == pytest.approx(4 / 3)


def test_an_even_load_is_even_everywhere() -> None:
    """64 experts with the same load on every degree and placement without copies."""
    fullest = dict(zip(NAMES, fullest_ranks(np.full(64, 7)), strict=True))
    for degree in DEGREES:
        assert fullest[f"rank_load_contiguous_{degree}"] == fullest[f"rank_load_round_robin_{degree}"] == 448 / degree


def test_more_ranks_than_experts_have_no_load() -> None:
    """A rank without an expert is no placement."""
    fullest = dict(zip(NAMES, fullest_ranks(np.array([3, 1, 2, 4, 5])), strict=True))
    assert [name for name, load in fullest.items() if np.isfinite(load)] == [
        f"rank_load_{placement}_{degree}" for placement in PLACEMENTS for degree in (2, 4)
    ]
