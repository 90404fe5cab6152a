"""routers/token_rounding.py: whole tiles for every expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_lab.routers.base import RouteContext
from tests.routers.cases import make
from tests.routers.peers import dense


def random_logits(T: int, E: int) -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T + E)) * 2


def by_hand(logits_TE: Tensor, K: int, tile: int) -> list[set[int]]:
    """The tokens of each expert, one expert at a time, in float64."""
    T, E = logits_TE.shape
    p_TE = logits_TE.double().softmax(-1)
    chosen = [set(sorted(range(E), key=lambda e: (-float(p_TE[t, e]), e))[:K]) for t in range(T)]
    tokens = []
    for e in range(E):
        mine = sorted((t for t in range(T) if e in chosen[t]), key=lambda t: -float(p_TE[t, e]))
        others = sorted((t for t in range(T) if e not in chosen[t]), key=lambda t: -float(p_TE[t, e]))
        down = len(mine) // tile * tile
        n = down + tile if len(mine) - down >= tile / 2 else down
        tokens.append(set((mine + others)[: n if n <= T else down]))
    return tokens if tile <= T else [{t for t in range(T) if e in chosen[t]} for e in range(E)]


@pytest.mark.parametrize("renormalize", [pytest.param(True, id="sum-1"), pytest.param(False, id="plain")])
@pytest.mark.parametrize(
    ("T", "E", "K", "tile"),
    [
        pytest.param(*sizes, id="T{}-E{}-K{}-tile{}".format(*sizes))
        for sizes in (
            (0, 7, 2, 4),
            (1, 7, 2, 4),
            (1, 7, 2, 1),
            (37, 5, 2, 8),
            (37, 5, 5, 16),
            (199, 12, 3, 32),
            (8, 6, 2, 8),
        )
    ],
)
def test_every_expert_has_whole_tiles(T: int, E: int, K: int, tile: int, renormalize: bool) -> None:
    """The sets, and the weights of what each token ends with."""
    logits_TE = random_logits(T, E)
    routing = make("token_rounding", E, K, tile=tile, renormalize=renormalize).select(logits_TE)
    expected_TE = torch.zeros(T, E, dtype=torch.float64)
    for e, tokens in enumerate(by_hand(logits_TE, K, tile)):
        assert tile > T or len(tokens) % tile == 0
        for t in tokens:
            expected_TE[t, e] = logits_TE[t].double().softmax(-1)[e]
    if renormalize:
        expected_TE /= expected_TE.sum(-1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(dense(routing.expert_ids_TK, routing.weights_TK, E), expected_TE, rtol=1e-5, atol=1e-7)


def test_border_tokens_are_dropped_and_added() -> None:
    """By hand, tiles of two: three tokens chose expert 0, which takes a fourth; one chose expert 1, which takes two."""
    p_TE = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    routing = make("token_rounding", 2, 1, tile=2).select(p_TE.log())
    assert routing.expert_ids_TK.tolist() == [[0, -1], [0, -1], [0, 1], [1, 0]]
    p_TE = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.3, 0.7]])
    routing = make("token_rounding", 2, 1, tile=3).select(p_TE.log())
    assert routing.expert_ids_TK.tolist() == [[0], [0], [0], [-1], [-1]]


def test_scores_say_what_was_taken() -> None:
    """At least 0 where the expert takes the token, and below elsewhere; an expert without a tile takes none."""
    logits_TE = random_logits(37, 9)
    routing = make("token_rounding", 9, 2, tile=8).select(logits_TE, RouteContext(want_scores=True))
    assert routing.scores_TE is not None
    taken_TE = dense(routing.expert_ids_TK, torch.ones_like(routing.weights_TK), 9) > 0
    assert torch.equal(routing.scores_TE >= 0, taken_TE)
    assert not taken_TE.all() and taken_TE.any()


def test_fewer_tokens_than_a_tile_are_said() -> None:
    """It is top-k then."""
    router, logits_TE = make("token_rounding", 7, 2), random_logits(127, 7)
    assert torch.equal(router.select(logits_TE).expert_ids_TK, make("mixtral", 7, 2).select(logits_TE).expert_ids_TK)
    assert "with 127 tokens there is no whole tile (router.tile=128)" in router.warnings(127)[0]
    assert router.warnings(128) == []
