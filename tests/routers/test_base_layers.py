"""routers/balanced_assignment.py: the best assignment at even load."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.routers.cases import make

pytest.importorskip("scipy")


def skewed(T: int, E: int) -> Tensor:
    """Seeded logits that favour the first experts."""
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T + E)) - torch.arange(E) / 2


def total(logits_TE: Tensor, ids_TK: Tensor) -> float:
    return float(logits_TE.double().gather(1, ids_TK.long()).sum())


@pytest.mark.parametrize(
    ("T", "E"), [pytest.param(*s, id=f"T={s[0]}-E={s[1]}") for s in ((8, 4), (37 * 3, 3), (60, 12))]
)
def test_for_one_expert_each_it_is_the_assignment_of_scipy(T: int, E: int) -> None:
    """linear_sum_assignment on columns repeated T/E times: the same sum of logits, every expert exactly T/E."""
    from scipy.optimize import linear_sum_assignment

    logits_TE = skewed(T, E)
    ids_TK = make("base", E, 1).select(logits_TE).expert_ids_TK
    rows, columns = linear_sum_assignment(np.repeat(logits_TE.double().numpy(), T // E, axis=1), maximize=True)
    best = float(logits_TE.double().numpy()[rows, columns // (T // E)].sum())
    assert total(logits_TE, ids_TK) == pytest.approx(best, rel=1e-9)
    assert ids_TK.flatten().bincount(minlength=E).tolist() == [T // E] * E


def test_for_two_experts_each_nothing_balanced_is_better() -> None:
    """Against every assignment of 4 tokens to pairs of 4 experts that loads each with two."""
    logits_TE = skewed(4, 4)
    pairs = list(itertools.combinations(range(4), 2))
    best = max(
        sum(float(logits_TE[t, e]) for t, pair in enumerate(choice) for e in pair)
        for choice in itertools.product(pairs, repeat=4)
        if all(sum(e in pair for pair in choice) == 2 for e in range(4))
    )
    assert total(logits_TE, make("base", 4, 2).select(logits_TE).expert_ids_TK) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(
    ("T", "E", "K"),
    [
        pytest.param(1, 7, 2, id="T=1"),
        pytest.param(3, 7, 2, id="experts>tokens"),
        pytest.param(37, 7, 3, id="does-not-divide"),
        pytest.param(64, 16, 4, id="divides"),
        pytest.param(5, 4, 4, id="k=E"),
    ],
)
def test_the_load_is_as_even_as_it_can_be(T: int, E: int, K: int) -> None:
    """Between the whole numbers around T k / E; weights are the sigmoids."""
    logits_TE = skewed(T, E)
    routing = make("base", E, K).select(logits_TE)
    loads = routing.expert_ids_TK.flatten().bincount(minlength=E)
    assert math.floor(T * K / E) <= int(loads.min()) <= int(loads.max()) <= math.ceil(T * K / E)
    torch.testing.assert_close(routing.weights_TK, logits_TE.sigmoid().gather(1, routing.expert_ids_TK.long()))


def test_one_token_has_its_best_experts() -> None:
    """There is nothing to even out between tokens."""
    logits_TE = skewed(1, 7)
    best = make("mixtral", 7, 3).select(logits_TE).expert_ids_TK
    assert torch.equal(make("base", 7, 3).select(logits_TE).expert_ids_TK, best)


def test_huge_logits_are_assigned() -> None:
    """What all entries share does not matter."""
    logits_TE = skewed(12, 4)
    shifted = make("base", 4, 1).select(logits_TE + 3e4)
    assert total(logits_TE, shifted.expert_ids_TK) == pytest.approx(
        total(logits_TE, make("base", 4, 1).select(logits_TE).expert_ids_TK), abs=0.05
    )
