"""routers/dynamic_k.py: fewer experts for tokens that need fewer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.routers.base import RouteContext
from tests.routers.cases import make
from tests.routers.peers import dense

P = [0.5, 0.3, 0.15, 0.05]
CASES = [
    pytest.param("top_p", 0.4, [0], id="the-first-is-enough"),
    pytest.param("top_p", 0.5, [0], id="reached-exactly"),
    pytest.param("top_p", 0.6, [0, 1], id="two"),
    pytest.param("top_p", 0.81, [0, 1, 2], id="three"),
    pytest.param("top_p", 1.0, [0, 1, 2, 3], id="all"),
    pytest.param("top_p", 0.0, [0], id="never-none"),
    pytest.param("min_p", 0.0, [0, 1, 2, 3], id="min-0"),
    pytest.param("min_p", 0.25, [0, 1, 2], id="min-quarter"),
    pytest.param("min_p", 1.0, [0], id="min-1"),
]


@pytest.mark.parametrize(("rule", "threshold", "kept"), CASES)
def test_the_table_by_hand(rule: str, threshold: float, kept: list[int]) -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05, in another order; the kept ones' weights sum to 1."""
    logits_TE = torch.tensor([P]).log()[:, [2, 0, 3, 1]]
    place = {0: 1, 1: 3, 2: 0, 3: 2}
    routing = make("top_p", 4, 4, rule=rule, threshold=threshold).select(logits_TE)
    used = routing.expert_ids_TK[0][routing.expert_ids_TK[0] >= 0].tolist()
    assert used == [place[rank] for rank in kept]
    share = sum(P[rank] for rank in kept)
    expected = [P[rank] / share for rank in kept] + [0.0] * (4 - len(kept))
    assert routing.weights_TK[0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("rule", "threshold", "logits", "kept"),
    [
        pytest.param("min_p", 1.0, [2.0, 2.0, 2.0, 1.0], [0, 1, 2], id="min-1-equal"),
        pytest.param("min_p", 1.0, [0.0, 0.0, 0.0, 0.0], [0, 1, 2, 3], id="min-1-all-equal"),
        pytest.param("min_p", 0.5, [0.0, -math.inf, 0.0, -math.inf], [0, 2], id="min-masked"),
        pytest.param("min_p", 0.0, [0.0, -math.inf, 0.0, -math.inf], [0, 1, 2, 3], id="min-0-masked"),
        pytest.param("top_p", 0.25, [0.0, 0.0, 0.0, 0.0], [0], id="top-reached-by-the-first"),
        pytest.param("top_p", 0.5, [0.0, 0.0, 0.0, 0.0], [0, 1], id="top-reached-by-two"),
        pytest.param("top_p", 1.0, [0.0, -math.inf, 0.0, -math.inf], [0, 2], id="top-masked"),
    ],
)
def test_at_the_threshold_itself(rule: str, threshold: float, logits: list[float], kept: list[int]) -> None:
    """min_p keeps who has just that share, top_p stops where the sum is just reached; all sums are exact."""
    routing = make("top_p", 4, 4, rule=rule, threshold=threshold).select(torch.tensor([logits]))
    assert sorted(e for e in routing.expert_ids_TK[0].tolist() if e >= 0) == kept


@settings(max_examples=60, deadline=None, database=None)
@given(
    rows=st.lists(st.lists(st.integers(-6, 6), min_size=5, max_size=5), min_size=1, max_size=4),
    rule=st.sampled_from(["top_p", "min_p"]),
    threshold=st.sampled_from([0.1, 0.37, 0.61, 0.93]),
    k_max=st.integers(1, 5),
)
def test_the_rule_holds_for_any_row(rows: list[list[int]], rule: str, threshold: float, k_max: int) -> None:
    """Against the definition, one row at a time in float64."""
    logits_TE = torch.tensor(rows, dtype=torch.float32)
    routing = make("top_p", 5, 2, rule=rule, threshold=threshold, k_max=k_max).select(logits_TE)
    expected_TE = torch.zeros(len(rows), 5, dtype=torch.float64)
    for t, row_E in enumerate(logits_TE.double()):
        p_E = row_E.softmax(0)
        order = sorted(range(5), key=lambda e: (-row_E[e], e))[:k_max]
        kept, before = [], 0.0
        for e in order:
            wanted = before < threshold if rule == "top_p" else p_E[e] >= threshold * p_E[order[0]]
            if wanted or not kept:
                kept.append(e)
            before += float(p_E[e])
        expected_TE[t, kept] = p_E[kept] / p_E[kept].sum()
    torch.testing.assert_close(dense(routing.expert_ids_TK, routing.weights_TK, 5), expected_TE, rtol=1e-5, atol=1e-6)


def test_expert_skip_fits_the_median_ratio() -> None:
    """p2/p1 of 0.2, 0.5 and 0.9: half of the tokens keep their second expert."""
    logits_TE = torch.tensor([[1.0, 0.2, 0.01], [1.0, 0.5, 0.01], [1.0, 0.9, 0.01]]).log()
    router = make("expert_skip", 3, 2)
    assert router.calibrates
    router.fit(logits_TE)
    assert float(router.threshold) == pytest.approx(0.5)
    assert (router.select(logits_TE).expert_ids_TK >= 0).sum(-1).tolist()[0] == 1
    assert (router.select(logits_TE).expert_ids_TK >= 0).sum(-1).tolist()[2] == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        pytest.param({"rule": "top", "threshold": 0.5}, r"router\.rule=top", id="rule"),
        pytest.param({"rule": "top_p"}, r"router\.threshold=null", id="nothing-to-fit"),
        pytest.param({"rule": "top_p", "threshold": 1.5}, r"router\.threshold=1\.5", id="no-share"),
    ],
)
def test_keys_that_cannot_be_are_named(keys: dict[str, Any], message: str) -> None:
    """A ValueError with the key."""
    with pytest.raises(ValueError, match=message):
        make("top_p", 5, 2, **{"threshold": None, **keys})


def test_at_most_k_max_experts_and_never_more_than_there_are() -> None:
    """k_max replaces the model's k."""
    assert make("top_p", 5, 2, threshold=1.0, k_max=9).select(torch.zeros(3, 5)).expert_ids_TK.shape == (3, 5)
    assert make("top_p", 5, 2, threshold=1.0).select(torch.zeros(3, 5)).expert_ids_TK.shape == (3, 2)


def test_expert_skip_is_fitted_of_two_experts_too_and_of_one_it_need_not_be() -> None:
    """There is a second probability from two on."""
    router = make("expert_skip", 2, 2)
    router.fit(torch.tensor([[0.8, 0.2]]).log())
    assert float(router.threshold) == pytest.approx(0.25)
    router = make("expert_skip", 1, 1)
    router.fit(torch.zeros(3, 1))
    assert float(router.threshold) == 0


def test_scores_are_margins_and_none_beyond_the_k_best() -> None:
    """Above the threshold positive, below negative, -inf for who was not among the k."""
    routing = make("min_p", 4, 3, threshold=0.5).select(torch.tensor([P]).log(), RouteContext(want_scores=True))
    assert routing.scores_TE is not None
    assert routing.scores_TE[0].tolist() == pytest.approx([0.25, 0.05, -0.1, -math.inf], abs=1e-6)
