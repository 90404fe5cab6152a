"""routers/expert_choice.py: every expert takes its best tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.routers.cases import make
from tests.routers.peers import dense


def random_logits(T: int, E: int) -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T + E)) * 2


@pytest.mark.parametrize(
    ("T", "E", "K"),
    [
        pytest.param(0, 7, 2, id="T=0"),
        pytest.param(1, 7, 2, id="T=1"),
        pytest.param(3, 7, 2, id="experts>tokens"),
        pytest.param(37, 5, 5, id="k=E"),
        pytest.param(199, 12, 3, id="T=199"),
    ],
)
@pytest.mark.parametrize("factor", [pytest.param(f, id=f"cf={f}") for f in (0.3, 1.0, 2.0)])
def test_every_expert_takes_its_best_tokens(T: int, E: int, K: int, factor: float) -> None:
    """Column by column in float64: the C tokens with the largest probability, which is their weight."""
    logits_TE = random_logits(T, E)
    routing = make("expert_choice", E, K, factor=factor).select(logits_TE)
    p_TE = logits_TE.double().softmax(-1)
    expected_TE = torch.zeros(T, E, dtype=torch.float64)
    capacity = min(T, math.ceil(factor * T * K / E))
    for e in range(E):
        for t in sorted(range(T), key=lambda t: -float(p_TE[t, e]))[:capacity]:
            expected_TE[t, e] = p_TE[t, e]
    torch.testing.assert_close(dense(routing.expert_ids_TK, routing.weights_TK, E), expected_TE, rtol=1e-5, atol=1e-7)
    assert (expected_TE > 0).sum(0).tolist() == [capacity] * E


def test_a_token_may_have_no_expert() -> None:
    """Its slots are unused; the routing is as wide as its fullest row."""
    logits_TE = torch.tensor([[9.0, 9.0, 0.0], [8.0, 8.0, 0.0], [0.0, 0.0, 0.0]])
    routing = make("expert_choice", 3, 1).select(logits_TE)
    assert routing.expert_ids_TK.tolist() == [[0, 1], [-1, -1], [2, -1]]
    assert routing.weights_TK[1].tolist() == [0.0, 0.0]


def test_equal_tokens_go_to_the_first() -> None:
    """A tie of all tokens is broken by their order."""
    routing = make("expert_choice", 4, 1).select(torch.zeros(8, 4))
    assert (routing.expert_ids_TK >= 0).sum(-1).tolist() == [4, 4, 0, 0, 0, 0, 0, 0]


def test_one_token_is_said() -> None:
    """Every expert takes it."""
    router = make("expert_choice", 5, 2)
    assert router.select(random_logits(1, 5)).expert_ids_TK.shape == (1, 5)
    assert "one token" in router.warnings(1)[0]
    assert router.warnings(2) == []


def test_no_expert_takes_more_tokens_than_there_are() -> None:
    """A factor of 9 asks for 18 of 3 tokens."""
    ids_TK = make("expert_choice", 4, 2, factor=9.0).select(torch.randn(3, 4)).expert_ids_TK
    assert [sorted(row) for row in ids_TK.tolist()] == [[0, 1, 2, 3]] * 3


def test_without_a_token_there_is_nothing_to_say() -> None:
    """Only one token is taken by every expert."""
    assert make("expert_choice", 4, 2).warnings(0) == []
