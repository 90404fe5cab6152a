"""routers/token_hash.py: the token's id, or its place, chooses."""

from __future__ import annotations

import pytest
import torch

from moe_lab.routers.base import RouteContext
from tests.routers.cases import make


def logits(T: int, E: int) -> torch.Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T + E))


def test_equal_ids_have_equal_experts_whatever_the_logits() -> None:
    """In one layer; another layer has another table."""
    ids_T = torch.tensor([5, 9, 5, 31999, 9])
    routing = make("hash", 12, 3).select(logits(5, 12), RouteContext(token_ids_T=ids_T))
    chosen = [frozenset(row) for row in routing.expert_ids_TK.tolist()]
    assert chosen[0] == chosen[2] and chosen[1] == chosen[4] and len(set(chosen)) == 3
    again = make("hash", 12, 3).select(-logits(5, 12), RouteContext(token_ids_T=ids_T))
    assert torch.equal(again.expert_ids_TK, routing.expert_ids_TK)
    other = make("hash", 12, 3).select(logits(5, 12), RouteContext(token_ids_T=ids_T, layer=1))
    assert not torch.equal(other.expert_ids_TK, routing.expert_ids_TK)


@pytest.mark.parametrize("E", [pytest.param(E, id=f"E={E}") for E in (5, 64)])
def test_over_many_ids_the_load_is_even(E: int) -> None:
    """Of 20,000 ids every expert has its share within five standard deviations."""
    T, K = 20_000, 2
    for routing in (
        make("hash", E, K).select(logits(T, E), RouteContext(token_ids_T=torch.arange(T))),
        make("random", E, K).select(logits(T, E)),
    ):
        share_E = routing.expert_ids_TK.flatten().bincount(minlength=E) / T
        assert float((share_E - K / E).abs().max()) < 5 * (K / E * (1 - K / E) / T) ** 0.5


def test_weights_are_the_softmax_of_the_chosen_logits() -> None:
    """As if the logits had chosen them."""
    logits_TE = logits(37, 7)
    routing = make("random", 7, 3).select(logits_TE)
    expected_TK = logits_TE.gather(1, routing.expert_ids_TK.long()).softmax(-1)
    torch.testing.assert_close(routing.weights_TK, expected_TK)


def test_seeds_and_layers_draw_anew() -> None:
    """And the same ones draw the same."""
    drawn = [
        make("random", 7, 3, seed=s).select(logits(37, 7), RouteContext(layer=n)) for s, n in ((0, 0), (1, 0), (0, 1))
    ]
    tables = [routing.expert_ids_TK.tolist() for routing in drawn]
    assert tables[0] != tables[1] != tables[2] != tables[0]
    assert make("random", 7, 3).select(logits(37, 7)).expert_ids_TK.tolist() == tables[0]


def test_without_ids_it_is_said() -> None:
    """A ValueError that names what is missing."""
    with pytest.raises(ValueError, match="token_ids_T"):
        make("hash", 7, 2).select(logits(3, 7))
