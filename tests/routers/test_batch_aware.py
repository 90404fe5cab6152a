"""routers/batch_aware.py: fewer different experts in a batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lab.routers.base import RouteContext, Router
from tests.routers.cases import make


def random_logits(T: int, E: int) -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T + E))


def unique(ids_TK: Tensor) -> set[int]:
    return set(ids_TK[ids_TK >= 0].tolist())


@pytest.mark.parametrize(
    ("T", "E", "K", "k0"), [pytest.param(*s, id=str(s)) for s in ((1, 7, 3, 1), (12, 32, 4, 2), (199, 64, 8, 1))]
)
def test_oea_is_the_walk_of_the_paper(T: int, E: int, K: int, k0: int) -> None:
    """Phase 1: the union of the k0 best; phase 2: down each token's list, those of the union until it has k."""
    logits_TE = random_logits(T, E)
    preference = [sorted(range(E), key=lambda e: -float(row[e])) for row in logits_TE]
    union = {e for row in preference for e in row[:k0]}
    expected = [[e for e in row if e in union][:K] for row in preference]
    routing = make("oea", E, K, k0=k0).select(logits_TE)
    assert [[e for e in row if e >= 0] for row in routing.expert_ids_TK.tolist()] == expected
    for row, weights, logits_E in zip(expected, routing.weights_TK, logits_TE, strict=True):
        torch.testing.assert_close(weights[: len(row)], logits_E[row].softmax(0))
        assert float(weights[len(row) :].abs().sum()) == 0


def test_fewer_experts_are_touched() -> None:
    """The point of it: from top-k to k0 = 2 to k0 = 1, with 12 tokens and 32 experts."""
    logits_TE = random_logits(12, 32)
    counts = [
        len(unique(router.select(logits_TE).expert_ids_TK))
        for router in (
            make("mixtral", 32, 4),
            make("oea", 32, 4, k0=2),
            make("oea", 32, 4, k0=1),
        )
    ]
    assert counts[0] > counts[1] > counts[2]


@pytest.mark.parametrize("budget", [pytest.param(b, id=f"budget={b}") for b in (0.1, 0.5, 1.0)])
def test_xshare_has_everyones_best_and_the_largest_sums(budget: float) -> None:
    """The set is that of the greedy, one expert at a time, in float64."""
    T, E, K = 9, 20, 3
    logits_TE = random_logits(T, E)
    p_TE = logits_TE.double().softmax(-1)
    shared = {int(row.argmax()) for row in logits_TE}
    while len(shared) < round(budget * E):
        shared.add(max((e for e in range(E) if e not in shared), key=lambda e: float(p_TE[:, e].sum())))
    routing = make("xshare", E, K, budget=budget).select(logits_TE)
    expected = [sorted((e for e in shared), key=lambda e: -float(row[e]))[:K] for row in logits_TE]
    assert [[e for e in row if e >= 0] for row in routing.expert_ids_TK.tolist()] == expected


def logits_of(shares: list[list[float]]) -> Tensor:
    return torch.tensor(shares).log()


def test_moe_spec_by_hand() -> None:
    """Two windows of two tokens, two of four experts each: sums (7, 5, 5, 3) and (2, 4, 6, 8) in tenths.

    Of 1 and 2 in the first window, alike, the lower id is kept; the second token's best, expert 2, is not.
    """
    shares = [[0.6, 0.2, 0.1, 0.1], [0.1, 0.3, 0.4, 0.2], [0.1, 0.3, 0.2, 0.4], [0.1, 0.1, 0.4, 0.4]]
    router = make("moe_spec", 4, 2, budget=0.5, window=2)
    routing = router.select(logits_of(shares), RouteContext(seq_start_B1=torch.tensor([0, 4], dtype=torch.int32)))
    assert routing.expert_ids_TK.tolist() == [[0, 1], [1, 0], [3, 2], [2, 3]]
    expected = [[0.75, 0.25], [0.75, 0.25], [2 / 3, 1 / 3], [0.5, 0.5]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor(expected))
    assert make("moe_spec", 4, 2, budget=0.5, window=1).select(logits_of(shares)).expert_ids_TK[1].tolist() == [2, 1]


@pytest.mark.parametrize("window", [pytest.param(w, id=f"window={w}") for w in (1, 3, 8, None)])
@pytest.mark.parametrize("keeps_best", [pytest.param(True, id="keeps-best"), pytest.param(False, id="budget-alone")])
@pytest.mark.parametrize("budget", [pytest.param(b, id=f"budget={b}") for b in (0.1, 0.4, 1.0)])
def test_a_window_has_the_largest_sums(window: int | None, keeps_best: bool, budget: float) -> None:
    """The sets of a greedy in float64, window by window, in sequences of 5, 1 and 11 tokens; top-k within them."""
    E, K, starts = 20, 3, [0, 5, 6, 17]
    logits_TE = random_logits(17, E)
    p_TE = logits_TE.double().softmax(-1)
    windows = [range(17)] if window is None else []
    for a, b in itertools.pairwise(starts):
        windows += [range(t, min(t + window, b)) for t in range(a, b, window)] if window else []
    expected: list[list[int]] = []
    for tokens in windows:
        sums_E = p_TE[list(tokens)].sum(0)
        chosen = {int(p_TE[t].argmax()) for t in tokens} if keeps_best else set()
        while len(chosen) < round(budget * E):
            chosen.add(max((e for e in range(E) if e not in chosen), key=lambda e: float(sums_E[e])))
        expected += [sorted(chosen, key=lambda e: -float(logits_TE[t, e]))[:K] for t in tokens]
    router = make("moe_spec", E, K, budget=budget, window=window, keeps_best=keeps_best)
    ids_TK = router.select(logits_TE, RouteContext(seq_start_B1=torch.tensor(starts, dtype=torch.int32))).expert_ids_TK
    assert [[e for e in row if e >= 0] for row in ids_TK.tolist()] == expected
    assert all(len(row) == min(K, round(budget * E)) for row in expected) or keeps_best


def test_a_budget_of_all_experts_is_top_k_and_of_one_leaves_one() -> None:
    """B = E: router=mixtral; B = 1: every token has the window's expert and nothing else."""
    logits_TE = random_logits(23, 9)
    whole = make("moe_spec", 9, 3, budget=1.0).select(logits_TE)
    top_k = make("mixtral", 9, 3).select(logits_TE)
    assert torch.equal(whole.expert_ids_TK, top_k.expert_ids_TK)
    torch.testing.assert_close(whole.weights_TK, top_k.weights_TK)
    least = make("moe_spec", 9, 3, budget=0.01).select(logits_TE)
    assert bool((least.expert_ids_TK[:, 0] >= 0).all()) and bool((least.expert_ids_TK[:, 1:] < 0).all())
    assert [len(unique(ids)) for ids in least.expert_ids_TK.split(8)] == [1, 1, 1]
    torch.testing.assert_close(least.weights_TK[:, 0], torch.ones(23))


@pytest.mark.parametrize(
    ("budget", "E", "n"),
    [
        pytest.param(0.1, 16, 2, id="1.6-up"),
        pytest.param(0.5, 7, 4, id="3.5-to-even-up"),
        pytest.param(0.5, 5, 2, id="2.5-to-even-down"),
        pytest.param(0.3, 8, 2, id="2.4-down"),
        pytest.param(0.29, 100, 29, id="28.999-up"),
        pytest.param(0.01, 8, 1, id="at-least-one"),
        pytest.param(1.0, 7, 7, id="all"),
    ],
)
def test_a_budget_that_is_no_whole_number_is_rounded(budget: float, E: int, n: int) -> None:
    """The size of the set, where every token wants the same best expert."""
    logits_TE = random_logits(5, E)
    logits_TE[:, 0] = 9.0
    ids_TK = make("xshare", E, E, budget=budget).select(logits_TE).expert_ids_TK
    assert len(unique(ids_TK)) == n


@pytest.mark.parametrize(
    ("option", "keys"), [pytest.param("oea", {"k0": 2}, id="oea"), pytest.param("xshare", {"budget": 0.4}, id="xshare")]
)
@pytest.mark.parametrize(("E", "K"), [pytest.param(10, 3, id="k<E"), pytest.param(4, 4, id="k=E")])
def test_scores_say_by_how_much_an_expert_was_chosen(option: str, keys: dict[str, Any], E: int, K: int) -> None:
    """Above 0 for those chosen, at most 0 for the others, -inf outside of the set; 0 for the first that is left out."""
    logits_TE = random_logits(3, E)
    routing = make(option, E, K, **keys).select(logits_TE, RouteContext(want_scores=True))
    assert routing.scores_TE is not None
    for ids, scores_E in zip(routing.expert_ids_TK.tolist(), routing.scores_TE, strict=True):
        chosen = {e for e in ids if e >= 0}
        assert {e for e in range(E) if scores_E[e] > 0} == chosen
        left_out = [float(scores_E[e]) for e in range(E) if e not in chosen]
        assert not left_out or max(left_out) == (0.0 if len(chosen) == K and max(left_out) > -torch.inf else -torch.inf)


@pytest.mark.parametrize(
    "router",
    [pytest.param(make("oea", 8, 2), id="oea"), pytest.param(make("xshare", 8, 2, budget=0.2), id="xshare")],
)
def test_padding_brings_in_no_expert(router: Router) -> None:
    """Three tokens that want expert 0, and one of padding that wants expert 7."""
    logits_TE = torch.zeros(4, 8)
    logits_TE[:3, 0], logits_TE[3, 7] = 5.0, 5.0
    without = router.select(logits_TE, RouteContext(valid_T=torch.tensor([True, True, True, False])))
    assert 7 not in unique(without.expert_ids_TK[:3])
    assert 7 in unique(router.select(logits_TE).expert_ids_TK)


@pytest.mark.parametrize(
    ("option", "keys", "message"),
    [
        pytest.param("oea", {"k0": 3}, r"router\.k0=3.*top_k=2", id="k0>k"),
        pytest.param("oea", {"k0": 0}, r"router\.k0=0", id="k0=0"),
        pytest.param("xshare", {"budget": 0.0}, r"router\.budget=0", id="no-budget"),
        pytest.param("xshare", {"budget": 1.5}, r"router\.budget=1\.5", id="too-large"),
        pytest.param("moe_spec", {"window": 0}, r"router\.window=0", id="window=0"),
    ],
)
def test_keys_that_cannot_be_are_named(option: str, keys: dict[str, Any], message: str) -> None:
    """A ValueError with the key."""
    with pytest.raises(ValueError, match=message):
        make(option, 8, 2, **keys)
