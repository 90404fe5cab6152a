"""workloads/loads.py: the load that was asked for is the load that the experts get."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.config.schemas import FITS, LOADS
from moe_lab.routers.base import Routing
from moe_lab.routers.contract import check_contract
from moe_lab.workloads import loads
from moe_lab.workloads.fits import step_counts

KEYS = {"seed": 0, "zipf_exponent": 1.0, "hot_experts": 2, "hot_share": 0.6}
FORCED = [load for load in LOADS if load not in ("native", "replay", "fitted")]
SIZES = pytest.mark.parametrize(
    ("T", "E", "K"),
    [
        pytest.param(0, 5, 2, id="T=0"),
        pytest.param(1, 7, 3, id="T=1"),
        pytest.param(3, 12, 2, id="experts>tokens"),
        pytest.param(37, 5, 5, id="k=E"),
        pytest.param(37, 1, 1, id="E=1"),
        pytest.param(199, 12, 1, id="k=1"),
        pytest.param(4096, 64, 8, id="olmoe"),
    ],
)


def native(T: int, E: int, K: int) -> Routing:
    """Any routing that uses every slot; weights that tell rows and slots apart."""
    ids_TK = torch.arange(K, dtype=torch.int32).expand(T, K)
    return Routing(ids_TK, torch.arange(T * K, dtype=torch.float32).view(T, K) / max(T * K, 1))


def counts(routing: Routing, E: int) -> np.ndarray:
    return torch.bincount(routing.expert_ids_TK.flatten().long(), minlength=E).numpy()


@SIZES
@pytest.mark.parametrize("load", [pytest.param(load, id=load) for load in FORCED])
def test_every_slot_is_used_once_per_token_and_weights_stay(load: str, T: int, E: int, K: int) -> None:
    """The contract of a routing, with the weights where they were."""
    keys = {**KEYS, "hot_experts": min(2, E)}
    before = native(T, E, K)
    routing = loads.loaded(load, before, E, **keys)
    check_contract(routing, T, E, 0)
    assert bool((routing.expert_ids_TK >= 0).all())
    assert torch.equal(routing.weights_TK, before.weights_TK)
    assert torch.equal(loads.loaded(load, before, E, **keys).expert_ids_TK, routing.expert_ids_TK)


def test_native_is_the_routing_itself() -> None:
    """Nothing is copied."""
    routing = native(3, 5, 2)
    assert loads.loaded("native", routing, 5) is routing


@SIZES
def test_balanced_is_balanced_over_experts(T: int, E: int, K: int) -> None:
    """No expert has more than one slot more than another."""
    assert np.ptp(counts(loads.loaded("balanced", native(T, E, K), E, **KEYS), E)) <= 1


@pytest.mark.parametrize("E", [pytest.param(E, id=f"E={E}") for E in (8, 12, 60, 64, 256)])
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (1, 4, 32)])
def test_balanced_idles_no_rank(E: int, T: int) -> None:
    """Over contiguous and strided ranks of every degree the slots are as even as one rank's rounding allows, nearly."""
    K = 4
    ids_N = loads.loaded("balanced", native(T, E, K), E, **KEYS).expert_ids_TK.flatten().numpy()
    for R in (R for R in range(2, E + 1) if E % R == 0):
        for rank_N in (ids_N // (E // R), ids_N % R):
            per_rank = np.bincount(rank_N, minlength=R)
            assert per_rank.max() <= max(1.0, 1.5 * np.ceil(len(ids_N) / R) + 1), (R, per_rank)
            if R in (2, 4) and len(ids_N) >= 2 * R:
                assert per_rank.min() >= 1, (R, per_rank)


def test_zipf_has_the_shares_of_its_exponent() -> None:
    """1/r over the harmonic number, to whole slots, with 4096 tokens and one slot each."""
    E = 16
    found = np.sort(counts(loads.loaded("zipf", native(4096, E, 1), E, **KEYS), E))[::-1]
    expected = 4096 / np.arange(1, E + 1) / (1 / np.arange(1, E + 1)).sum()
    assert np.abs(found - expected).max() <= 1


def test_hot_experts_have_their_share_and_one_hot_has_every_token() -> None:
    """0.6 of the slots over two experts; one expert with all 199 tokens, the others evenly."""
    found = np.sort(counts(loads.loaded("hot", native(1000, 10, 2), 10, **KEYS), 10))[::-1]
    assert found.tolist() == [600, 600] + [100] * 8
    found = np.sort(counts(loads.loaded("one_hot", native(198, 10, 2), 10, **KEYS), 10))[::-1]
    assert found.tolist() == [198] + [22] * 9


def test_another_seed_loads_other_experts() -> None:
    """The same counts, other experts."""
    found = [counts(loads.loaded("zipf", native(512, 16, 2), 16, **{**KEYS, "seed": seed}), 16) for seed in (0, 1)]
    assert found[0].tolist() != found[1].tolist()
    assert sorted(found[0]) == sorted(found[1])


@settings(max_examples=80, deadline=None, database=None)
@given(T=st.integers(0, 40), E=st.integers(1, 12), data=st.data())
def test_any_shares_become_whole_numbers_that_can_be_dealt(T: int, E: int, data: st.DataObject) -> None:
    """T K in all, at most T each; dealt, every row has K different experts."""
    K = data.draw(st.integers(1, E))
    shares = data.draw(st.lists(st.sampled_from([0.0, 0.1, 1.0, 7.0, 1e3]), min_size=E, max_size=E))
    counts_E = loads.apportion(np.array(shares), T, K)
    assert int(counts_E.sum()) == T * K and counts_E.min() >= 0 and (T == 0 or counts_E.max() <= T)
    ids_TK = loads.deal(counts_E, np.arange(E), T, K)
    assert np.array_equal(np.bincount(ids_TK.flatten(), minlength=E), counts_E)
    assert all(len(set(row)) == K for row in ids_TK.tolist())


@pytest.mark.parametrize("E", [pytest.param(E, id=f"E={E}") for E in (1, 2, 7, 60, 64)])
def test_the_dealing_order_has_every_expert_once(E: int) -> None:
    """A permutation."""
    assert sorted(loads.dealing_order(E).tolist()) == list(range(E))


def test_the_difference_says_how_much_was_not_to_be_had() -> None:
    """A share of 0.6 for one expert cannot be had with two slots a token: at most half of the slots are its."""
    keys = {**KEYS, "hot_experts": 1}
    routing = loads.loaded("hot", native(1000, 10, 2), 10, **keys)
    asked_E = loads.asked_shares("hot", 10, 2, **keys)
    assert asked_E is not None
    assert loads.difference(routing.expert_ids_TK, asked_E) == pytest.approx(0.1)
    routing = loads.loaded("hot", native(1000, 10, 2), 10, **KEYS)
    asked_E = loads.asked_shares("hot", 10, 2, **KEYS)
    assert asked_E is not None
    assert loads.difference(routing.expert_ids_TK, asked_E) == pytest.approx(0.0)
    assert loads.asked_shares("random", 10, 2, **KEYS) is None


def test_more_hot_experts_than_there_are_is_an_error() -> None:
    """The key and the number."""
    with pytest.raises(ValueError, match=r"workload\.hot_experts=9.*between 1 and 5"):
        loads.loaded("hot", native(3, 5, 2), 5, **{**KEYS, "hot_experts": 9})


def recorded(T: int, E: int, K: int) -> np.ndarray:
    """Any routes, with experts that are liked more than others."""
    score_TE = np.random.default_rng(0).gumbel(size=(T, E)) + np.log(loads.zipf_shares(E, 1.0))
    return np.argsort(-score_TE, axis=1)[:, :K].astype(np.int16)


@pytest.mark.parametrize("fit", [pytest.param(fit, id=fit) for fit in FITS])
@SIZES
def test_a_fitted_load_keeps_the_contract(fit: str, T: int, E: int, K: int) -> None:
    """Every slot is used, and the weights stay; another seed gives other ids where there is a choice."""
    before, ids_TK = native(T, E, K), recorded(max(2 * T, 1), E, K)
    if fit == "dirichlet" and T == 0:
        return  # a step of no tokens
    routing = loads.fitted(ids_TK, before, E, 0, fit)
    check_contract(routing, T, E, 0)
    assert bool((routing.expert_ids_TK >= 0).all()) and torch.equal(routing.weights_TK, before.weights_TK)
    if T > 3 and K < E:
        other = loads.fitted(ids_TK, before, E, 1, fit)
        assert not torch.equal(other.expert_ids_TK, routing.expert_ids_TK)


def test_a_fitted_power_law_is_zipf_with_the_exponent_of_the_recording() -> None:
    """Of shares 12, 6, 4, 3 (in any order): exponent 1."""
    ids_TK = np.repeat([2, 0, 3, 1], [12, 6, 4, 3])[:, None].astype(np.int16)
    routing = loads.fitted(ids_TK, native(4096, 4, 1), 4, 0, "power_law")
    zipf = loads.loaded("zipf", native(4096, 4, 1), 4, **KEYS)
    assert counts(routing, 4).tolist() == counts(zipf, 4).tolist()


def test_a_fitted_dirichlet_has_the_mean_of_the_recording() -> None:
    """Over seeds, expert by expert; and the steps differ as much as those recorded do."""
    rng, E, T = np.random.default_rng(0), 5, 200
    shares_SE = rng.dirichlet([6.0, 3.0, 1.0, 1.0, 1.0], 400)
    ids_TK = np.concatenate([rng.choice(E, T, p=shares_E) for shares_E in shares_SE]).astype(np.int16)[:, None]
    drawn_SE = np.stack([counts(loads.fitted(ids_TK, native(T, E, 1), E, s, "dirichlet"), E) for s in range(300)])
    steps_SE = step_counts(ids_TK, E, T)
    assert drawn_SE.mean(axis=0) == pytest.approx(steps_SE.mean(axis=0), rel=0.15)
    assert drawn_SE.std(axis=0) == pytest.approx(steps_SE.std(axis=0), rel=0.25)


def test_consecutive_tokens_are_a_stretch_of_the_recording() -> None:
    """From a place that the seed draws; without it they are drawn one by one."""
    ids_TK = np.arange(100, dtype=np.int16)[:, None]
    starts = set()
    for seed in range(8):
        ids_T = loads.replayed(ids_TK, native(7, 100, 1), 100, seed, consecutive=True).expert_ids_TK[:, 0].tolist()
        assert ids_T == list(range(ids_T[0], ids_T[0] + 7))
        starts.add(ids_T[0])
    assert len(starts) > 4 and max(starts) <= 93
    drawn = loads.replayed(ids_TK, native(7, 100, 1), 100, 0).expert_ids_TK[:, 0].tolist()
    assert drawn != list(range(drawn[0], drawn[0] + 7))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda ids_TK: loads.replayed(ids_TK, native(9, 5, 2), 5, 0, consecutive=True),
            r"workload\.trace_consecutive=true: the recording has 6 tokens, but 9 are needed; lower batch",
            id="too-short",
        ),
        pytest.param(
            lambda ids_TK: loads.fitted(ids_TK, native(4, 5, 2), 5, 0, "dirichlet"),
            r"workload\.fit=dirichlet: the recording has 6 tokens, fewer than two steps of 4; lower batch",
            id="one-step",
        ),
        pytest.param(
            lambda ids_TK: loads.fitted(ids_TK, native(4, 5, 3), 5, 0, "power_law"),
            r"workload\.trace: .* uses 3 of 5; use a recording of the same model",
            id="another-k",
        ),
    ],
)
def test_a_recording_that_does_not_do_is_said(make: Callable[[np.ndarray], Routing], message: str) -> None:
    """The key, the numbers and what to do."""
    with pytest.raises(ValueError, match=message):
        make(recorded(6, 5, 2))
