"""routers/batch_aware.py: fewer different experts in a batch."""

from __future__ import annotations

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
    ],
)
def test_keys_that_cannot_be_are_named(option: str, keys: dict[str, Any], message: str) -> None:
    """A ValueError with the key."""
    with pytest.raises(ValueError, match=message):
        make(option, 8, 2, **keys)
