"""routers/capacity.py: room for so many tokens at each expert."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.routers.capacity import POLICIES
from tests.routers.cases import make, ready, with_capacity


def random_logits(T: int, E: int, seed: int = 0) -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) - torch.arange(E) / E


def served(policy: str, ids: list[list[int]], weights: list[list[float]], room: int, E: int) -> set[tuple[int, int]]:
    """(token, slot) pairs that find room, served one after the other in the policy's order."""
    slots = [(t, k) for t in range(len(ids)) for k in range(len(ids[0]))]
    best = [max(row) for row in weights]
    orders: dict[str, Any] = {
        "weight": lambda s: (-weights[s[0]][s[1]], s),
        "token": lambda s: s,
        "position": lambda s: (s[1], s[0]),
        "prioritized": lambda s: (s[1], -best[s[0]], s[0]),
    }
    left, kept = [room] * E, set()
    for t, k in sorted(slots, key=orders[policy]):
        if left[ids[t][k]]:
            left[ids[t][k]] -= 1
            kept.add((t, k))
    return kept


SIZES = pytest.mark.parametrize(
    ("T", "E", "K"),
    [
        pytest.param(0, 5, 2, id="T=0"),
        pytest.param(1, 5, 2, id="T=1"),
        pytest.param(3, 7, 2, id="experts>tokens"),
        pytest.param(37, 5, 5, id="k=E"),
        pytest.param(199, 12, 3, id="T=199"),
    ],
)


@SIZES
@pytest.mark.parametrize("factor", [pytest.param(f, id=f"cf={f}") for f in (0.05, 0.5, 1.0, 1.25)])
@pytest.mark.parametrize("policy", [pytest.param(p, id=p) for p in ("weight", "token", "position", "prioritized")])
def test_who_finds_room_is_as_the_policy_says(T: int, E: int, K: int, factor: float, policy: str) -> None:
    """Served one slot after the other by hand; kept weights stay, dropped slots are unused."""
    logits_TE = random_logits(T, E)
    inner, router = make("mixtral", E, K), with_capacity(E, K, policy, factor)
    before, routing = inner.select(logits_TE), router.select(logits_TE)
    room = max(1, math.ceil(factor * T * K / E))
    assert router.capacity(T) == room
    kept = served(policy, before.expert_ids_TK.tolist(), before.weights_TK.tolist(), room, E)
    for t in range(T):
        for k in range(K):
            expected = int(before.expert_ids_TK[t, k]) if (t, k) in kept else -1
            assert int(routing.expert_ids_TK[t, k]) == expected
            assert float(routing.weights_TK[t, k]) == (float(before.weights_TK[t, k]) if expected >= 0 else 0.0)


@settings(max_examples=40, deadline=None, database=None)
@given(T=st.integers(1, 20), E=st.integers(1, 6), data=st.data(), factor=st.sampled_from([0.3, 1.0, 1.5]))
def test_next_best_leaves_no_slot_and_no_room_both_unused(T: int, E: int, data: st.DataObject, factor: float) -> None:
    """A token with an unused slot has every expert that has room already; no expert is over its capacity."""
    K = data.draw(st.integers(1, E))
    logits_TE = random_logits(T, E, data.draw(st.integers(0, 99)))
    router = with_capacity(E, K, "next_best", factor)
    ids_TK = router.select(logits_TE).expert_ids_TK
    load_E = ids_TK[ids_TK >= 0].bincount(minlength=E)
    assert int(load_E.max()) <= router.capacity(T)
    with_room = {e for e in range(E) if int(load_E[e]) < router.capacity(T)}
    for row in ids_TK.tolist():
        used = [e for e in row if e >= 0]
        assert len(set(used)) == len(used)
        assert -1 not in row or with_room <= set(used)
    first = with_capacity(E, K, "position", factor).select(logits_TE).expert_ids_TK
    assert bool((ids_TK[first >= 0] == first[first >= 0]).all())


@pytest.mark.parametrize("option", [pytest.param(name, id=name) for name in ("switch", "llama4")])
@pytest.mark.parametrize("policy", [pytest.param(p, id=p) for p in POLICIES])
def test_the_room_is_that_of_the_inner_routers_own_k(option: str, policy: str) -> None:
    """One expert per token, of a model that has three: C = ceil(1.25 * 37 * 1 / 7) = 7, and not 20."""
    inner = ready(partial(make, option), 7, 1)
    router = make("capacity", 7, 3, inner=inner, factor=1.25, policy=policy)
    assert router.capacity(37) == 7
    logits_TE = torch.zeros(37, 7)
    logits_TE[:, 2] = torch.linspace(1, 2, 37)  # everybody wants expert 2
    ids_TK = router.select(logits_TE).expert_ids_TK
    assert ids_TK.shape == (37, 1)
    used_E = torch.bincount(ids_TK[ids_TK >= 0].long(), minlength=7)
    assert int(used_E[2]) == (37 if policy == "dropless" else 7)
    if policy == "next_best":
        assert used_E.tolist() == [7, 7, 7, 7, 7, 2, 0]


@pytest.mark.parametrize(
    ("T", "E", "K", "factor", "room"),
    [
        pytest.param(0, 7, 2, 1.0, 1, id="no-token"),
        pytest.param(1, 7, 2, 0.1, 1, id="at-least-one"),
        pytest.param(8, 4, 2, 1.0, 4, id="whole"),
        pytest.param(8, 4, 2, 1.01, 5, id="above-a-whole"),
        pytest.param(9, 4, 2, 1.0, 5, id="rounded-up"),
        pytest.param(7, 4, 2, 1.0, 4, id="just-below"),
    ],
)
def test_the_room_is_rounded_up(T: int, E: int, K: int, factor: float, room: int) -> None:
    """C = max(1, ceil(factor T k / E)), by hand."""
    assert make("capacity", E, K, inner=make("mixtral", E, K), factor=factor).capacity(T) == room


def test_dropless_is_the_inner_router_with_its_properties() -> None:
    """Whatever the factor; of Sinkhorn too."""
    logits_TE = random_logits(37, 7)
    for inner in (make("mixtral", 7, 2), make("sinkhorn", 7, 2)):
        router = make("capacity", 7, 2, inner=inner, factor=0.1, policy="dropless")
        routing, expected = router.select(logits_TE), inner.select(logits_TE)
        assert torch.equal(routing.expert_ids_TK, expected.expert_ids_TK)
        assert torch.equal(routing.weights_TK, expected.weights_TK)
        assert (router.causal, router.batch_invariant, router.static_k) == (inner.causal, inner.batch_invariant, True)
    assert not make("capacity", 7, 2, inner=make("mixtral", 7, 2)).causal


def test_the_inner_router_is_fitted_and_warns() -> None:
    """What it declares is passed on."""
    router = make("capacity", 7, 2, inner=make("sinkhorn", 7, 2))
    assert router.warnings(1) == make("sinkhorn", 7, 2).warnings(1)
    assert router.implementation() == "torch"
    assert not router.calibrates


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        pytest.param({"policy": "random"}, r"router\.policy=random.*next_best", id="policy"),
        pytest.param({"factor": 0.0}, r"router\.factor=0", id="zero"),
        pytest.param({"factor": float("inf")}, r"router\.factor=inf", id="infinite"),
        pytest.param({"inner": make("top_p", 7, 2, threshold=0.5)}, r"router\.inner: DynamicK", id="inner"),
    ],
)
def test_keys_that_cannot_be_are_named(keys: dict[str, Any], message: str) -> None:
    """A ValueError with the key."""
    with pytest.raises(ValueError, match=message):
        make("capacity", 7, 2, **{"inner": make("mixtral", 7, 2), **keys})


def test_every_policy_is_tested() -> None:
    """Those above."""
    assert set(POLICIES) == {"weight", "token", "position", "prioritized", "next_best", "dropless"}


def test_an_inner_router_that_calibrates_is_fitted() -> None:
    """By the logits that the outer one is given."""
    inner, logits_TE = make("quantile", 7, 2), random_logits(37, 7)
    router, alone = make("capacity", 7, 2, inner=inner), make("quantile", 7, 2)
    assert router.calibrates
    router.fit(logits_TE)
    alone.fit(logits_TE)
    assert torch.equal(inner.bias_E, alone.bias_E) and float(inner.bias_E.abs().max()) > 0
