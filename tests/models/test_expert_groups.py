"""models/expert_groups.py: who is left, who is merged, and with what weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.models.expert_groups import clusters, grouped, without_lowest


@pytest.mark.parametrize(
    ("scores", "n_removed", "left"),
    [
        pytest.param([3.0, 1.0, 2.0, 0.5], 0, (0, 1, 2, 3), id="none"),
        pytest.param([3.0, 1.0, 2.0, 0.5], 2, (0, 2), id="two_lowest"),
        pytest.param([1.0, 1.0, 1.0, 2.0], 2, (0, 3), id="of_equal_ones_the_first_stays"),
        pytest.param([0.0, 0.0, 0.0, 0.0], 3, (0,), id="all_equal"),
    ],
)
def test_the_lowest_go(scores: list[float], n_removed: int, left: tuple[int, ...]) -> None:
    assert without_lowest(np.array(scores), n_removed) == tuple((expert,) for expert in left)


def test_clusters_by_hand() -> None:
    """On a line at 0, 1, 3 and 10: 0 and 1 first (1), then 3 with both (mean of 3 and 2), then all."""
    places = np.array([[0.0], [10.0], [1.0], [3.0]])
    assert clusters(places, 4) == ((0,), (1,), (2,), (3,))
    assert clusters(places, 3) == ((0, 2), (1,), (3,))
    assert clusters(places, 2) == ((0, 2, 3), (1,))
    assert clusters(places, 1) == ((0, 1, 2, 3),)


def test_linkage_is_the_mean_over_pairs() -> None:
    """0 and 1 at distance 2 are one; 4.4 is nearer to 7 (2.6) than to them on average (3.4), nearest or not (2.4)."""
    assert clusters(np.array([[0.0], [2.0], [4.4], [7.0]]), 2) == ((0, 1), (2, 3))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(2, 9), dim=st.integers(1, 4))
def test_clusters_are_those_of_scipy(seed: int, n: int, dim: int) -> None:
    """`linkage` with the method average, cut at every number of groups."""
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    vectors = np.random.default_rng(seed).normal(size=(n, dim))
    tree = hierarchy.linkage(vectors, method="average")
    for n_groups in range(1, n + 1):
        labels = hierarchy.cut_tree(tree, n_clusters=n_groups)[:, 0]
        wanted = {tuple(np.flatnonzero(labels == label)) for label in set(labels)}
        assert set(clusters(vectors, n_groups)) == wanted


def test_a_group_is_the_mean_by_counts() -> None:
    """3 and 1 slots: 3/4 and 1/4; where none was chosen both alike; one alone to the bit."""
    w = torch.tensor([[4.0, 8.0], [0.0, 4.0], [1.0, 3.0], [3.0, 5.0], [0.1, 0.2]])
    counts = np.array([3.0, 1.0, 0.0, 0.0, 7.0])
    found = grouped(w, ((0, 1), (2, 3), (4,)), counts)
    assert found.tolist() == [[3.0, 7.0], [2.0, 4.0], w[4].tolist()]


def test_vectors_and_half_precision_are_merged_in_float32() -> None:
    """A scale by expert, and bf16 matrices, rounded once."""
    assert grouped(torch.tensor([1.0, 2.0, 4.0]), ((0, 2), (1,)), np.array([1.0, 1, 3])).tolist() == [3.25, 2.0]
    w = torch.randn(3, 4, 5).bfloat16()
    found = grouped(w, ((0, 1, 2),), np.array([2.0, 1, 1]))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[0], (w.float() * torch.tensor([0.5, 0.25, 0.25]).view(3, 1, 1)).sum(0).bfloat16())
