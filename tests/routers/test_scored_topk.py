"""routers/scored_topk.py: scores, selection bias, groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lab.routers.base import RouteContext
from moe_lab.routers.scored_topk import SCORES, ScoredTopK, score, within_groups
from tests.routers.cases import SCORED, make, ready
from tests.routers.peers import dense, peer_router

SIZES = pytest.mark.parametrize(
    ("T", "E", "K"),
    [
        pytest.param(0, 8, 2, id="T=0"),
        pytest.param(1, 8, 2, id="T=1"),
        pytest.param(37, 8, None, id="all that may be chosen"),
        pytest.param(199, 24, 3, id="T=199"),
    ],
)


def random_logits(T: int, E: int) -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T + E)) * 3


def router(E: int, K: int, **keys: Any) -> ScoredTopK:
    made = ready(SCORED, E, K, **keys)
    assert isinstance(made, ScoredTopK)
    return made


def by_hand(logits_TE: Tensor, r: ScoredTopK) -> Tensor:
    """The formula for one token after the other, in float64: dense weights."""
    weights_TE = torch.zeros(logits_TE.shape, dtype=torch.float64)
    for t, row_E in enumerate(logits_TE.double()):
        s_E = {
            "softmax": row_E.softmax(0),
            "sigmoid": 1 / (1 + (-row_E).exp()),
            "sqrt_softplus": (1 + row_E.exp()).log().sqrt(),
        }[r.score]
        ranked_E = s_E if r.bias_E is None else s_E + r.bias_E.double()
        size = r.n_experts // r.n_groups
        groups = [ranked_E[g * size : (g + 1) * size] for g in range(r.n_groups)]
        n_best = min(2, size) if r.group_score == "top2" else 1
        best = sorted(range(r.n_groups), key=lambda g: -float(groups[g].sort(descending=True).values[:n_best].sum()))
        allowed = [g * size + e for g in best[: r.top_groups] for e in range(size)]
        chosen = sorted(allowed, key=lambda e: -float(ranked_E[e]))[: r.top_k]
        share = s_E[chosen].sum() if r.renormalize else 1.0
        for e in chosen:
            weights_TE[t, e] = r.scale * s_E[e] / share
    return weights_TE


@pytest.mark.thinned(2, empty=("T=0",))
@SIZES
@pytest.mark.parametrize("bias", [pytest.param(True, id="bias"), pytest.param(False, id="no-bias")])
@pytest.mark.parametrize("groups", [pytest.param((1, 1), id="all"), pytest.param((4, 2), id="2-of-4-groups")])
@pytest.mark.parametrize("group_score", [pytest.param(name, id=name) for name in ("max", "top2")])
@pytest.mark.parametrize("kind", [pytest.param(name, id=name) for name in SCORES])
@pytest.mark.parametrize("renormalize", [pytest.param(True, id="renormalised"), pytest.param(False, id="plain")])
def test_the_route_is_that_of_the_formula(
    T: int, E: int, K: int | None, bias: bool, groups: tuple[int, int], group_score: str, kind: str, renormalize: bool
) -> None:
    """Exact sets, weights to 1e-5."""
    K = K or E // groups[0] * groups[1]
    keys = {"score": kind, "bias": bias, "renormalize": renormalize, "scale": 2.5, "group_score": group_score}
    r, logits_TE = router(E, K, n_groups=groups[0], top_groups=groups[1], **keys), random_logits(T, E)
    routing = r.select(logits_TE)
    torch.testing.assert_close(
        dense(routing.expert_ids_TK, routing.weights_TK, E), by_hand(logits_TE, r), rtol=1e-5, atol=1e-7
    )


V3 = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
V2 = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy"}
PEERS = [
    pytest.param("deepseek_v3", "DeepseekV3TopkRouter", V3, {"bias": True, "scale": 2.5}, (4, 2, "top2"), id="v3"),
    pytest.param(
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        V2,
        {"score": "softmax", "renormalize": False, "scale": 16.0},
        (4, 2, "max"),
        id="v2",
    ),
    pytest.param(
        "deepseek_v4",
        "DeepseekV4TopKRouter",
        {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5},
        {"score": "sqrt_softplus", "bias": True, "scale": 1.5},
        (1, 1, "max"),
        id="v4",
    ),
]


@pytest.mark.parametrize(("kind", "name", "settings", "keys", "groups"), PEERS)
def test_the_route_is_that_of_transformers(
    kind: str, name: str, settings: dict[str, Any], keys: dict[str, Any], groups: tuple[int, int, str]
) -> None:
    """Its modules with the same bias, on the same logits: exact sets, weights to 1e-5."""
    E, K = 24, 3
    peer = peer_router(kind, name, E, K, **settings)
    r, logits_TE = (
        router(E, K, n_groups=groups[0], top_groups=groups[1], group_score=groups[2], **keys),
        random_logits(199, E),
    )
    if r.bias_E is not None:
        peer.e_score_correction_bias.copy_(r.bias_E)
    _, weights_TK, ids_TK = peer(logits_TE)
    routing = r.select(logits_TE)
    torch.testing.assert_close(
        dense(routing.expert_ids_TK, routing.weights_TK, E), dense(ids_TK, weights_TK, E), rtol=1e-5, atol=1e-7
    )


def test_the_route_is_that_of_minimax_ernie_and_llama_4() -> None:
    """MiniMax-M2 takes the bias as an argument, Ernie adds it in a module, Llama 4 returns a dense table."""
    E, K, logits_TE = 24, 3, random_logits(199, 24)
    r = router(E, K, bias=True)
    assert r.bias_E is not None
    _, weights_TK, ids_TK = peer_router("minimax_m2", "MiniMaxM2TopKRouter", E, K)(logits_TE, r.bias_E)
    routing = r.select(logits_TE)
    torch.testing.assert_close(
        dense(routing.expert_ids_TK, routing.weights_TK, E), dense(ids_TK, weights_TK, E), rtol=1e-5, atol=1e-7
    )
    r = router(E, K, score="softmax", bias=True)
    ernie = peer_router("ernie4_5_moe", "Ernie4_5_MoeTopKRouter", E, K, moe_num_experts=E, moe_norm_min=1e-12)
    ernie.moe_statics.e_score_correction_bias.copy_(r.bias_E.view_as(ernie.moe_statics.e_score_correction_bias))
    _, weights_TK, ids_TK = ernie(logits_TE)
    routing = r.select(logits_TE)
    torch.testing.assert_close(
        dense(routing.expert_ids_TK, routing.weights_TK, E), dense(ids_TK, weights_TK, E), rtol=1e-5, atol=1e-7
    )
    llama_TE, _ = peer_router("llama4", "Llama4Router", E, K)(logits_TE)
    routing = router(E, K, renormalize=False, scales_input=True).select(logits_TE)
    torch.testing.assert_close(
        dense(routing.expert_ids_TK, routing.weights_TK, E), llama_TE.double(), rtol=1e-5, atol=1e-7
    )


def test_the_tables_of_the_first_layers_route_as_in_transformers() -> None:
    """Its module with the table that ours stands for; the layers behind choose by the logits."""
    E, K, logits_TE, ids_T = 24, 3, random_logits(199, 24), torch.arange(199) * 7 % 101
    r = make("deepseek_v4", E, K, hash_layers=2)
    torch.nn.init.normal_(r.bias_E)
    peer = peer_router(
        "deepseek_v4",
        "DeepseekV4HashRouter",
        E,
        K,
        scoring_func="sqrtsoftplus",
        routed_scaling_factor=1.5,
        vocab_size=101,
    )
    for layer in range(2):
        ctx = RouteContext(token_ids_T=ids_T, layer=layer)
        peer.tid2eid.copy_(
            make("hash", E, K).select(random_logits(101, E), ctx._replace(token_ids_T=torch.arange(101)))[0]
        )
        _, weights_TK, ids_TK = peer(logits_TE, ids_T)
        routing = r.select(logits_TE, ctx)
        torch.testing.assert_close(
            dense(routing.expert_ids_TK, routing.weights_TK, E), dense(ids_TK, weights_TK, E), rtol=1e-5, atol=1e-7
        )
        routing_of_gate = r(logits_TE, torch.eye(E), ctx)
        assert torch.equal(routing_of_gate.expert_ids_TK, routing.expert_ids_TK)
    plain = make("deepseek_v4", E, K)
    plain.bias_E.copy_(r.bias_E)
    behind, without = (each.select(logits_TE, ctx._replace(layer=2)) for each in (r, plain))
    assert torch.equal(behind.expert_ids_TK, without.expert_ids_TK) and torch.equal(
        behind.weights_TK, without.weights_TK
    )
    assert r.at_layer(2).bias_E is not None and r.at_layer(1).bias_E is None  # a table has no use for it
    assert r.needs_token_ids and not plain.needs_token_ids
    with pytest.raises(ValueError, match=r"router\.hash_layers=2: needs token ids"):
        r.select(logits_TE)


def test_the_bias_chooses_and_never_weighs() -> None:
    """A large bias brings in the least likely expert, which weighs what its score says."""
    r = router(4, 2, bias=True, renormalize=False)
    assert r.bias_E is not None
    r.bias_E.copy_(torch.tensor([0.0, 0.0, 0.0, 9.0]))
    routing = r.select(torch.tensor([[3.0, 2.0, 1.0, -4.0]]))
    assert routing.expert_ids_TK.tolist() == [[3, 0]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[-4.0, 3.0]]).sigmoid())


def test_a_group_that_is_out_stays_out_where_scores_are_negative() -> None:
    """Masked with 0 its experts would go before those of the groups that are in."""
    scores_TE = torch.tensor([[-1.0, -2.0, -5.0, -6.0]])
    assert within_groups(scores_TE, 2, 1, "max").tolist() == [[-1.0, -2.0, -torch.inf, -torch.inf]]
    r = router(4, 2, bias=True, n_groups=2, top_groups=1)
    assert r.bias_E is not None
    r.bias_E.fill_(-3.0)
    assert r.select(torch.tensor([[2.0, 1.0, 0.0, -1.0]])).expert_ids_TK.tolist() == [[0, 1]]


@pytest.mark.parametrize("kind", [pytest.param(name, id=name) for name in SCORES])
def test_scores_of_extreme_logits_are_finite(kind: str) -> None:
    """And weights too, also where every score underflows."""
    logits_TE = torch.tensor([[3e4, -3e4, 0.0], [-3e4, -3e4, -3e4]])
    assert bool(score(logits_TE, kind).isfinite().all())
    assert bool(router(3, 2, score=kind).select(logits_TE).weights_TK.isfinite().all())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        pytest.param({"score": "relu"}, r"router\.score=relu.*softmax", id="score"),
        pytest.param({"group_score": "mean"}, r"router\.group_score=mean.*max", id="group-score"),
        pytest.param({"n_groups": 3}, r"router\.n_groups=3.*n_experts=8", id="groups-do-not-divide"),
        pytest.param({"n_groups": 8, "top_groups": 1}, r"router\.top_groups=1.*top_k=2", id="too-few"),
        pytest.param({"n_groups": 2, "top_groups": 3}, r"router\.top_groups=3", id="too-many"),
    ],
)
def test_keys_that_cannot_be_are_named(keys: dict[str, Any], message: str) -> None:
    """A ValueError with the key, the value and what it must be."""
    with pytest.raises(ValueError, match=message):
        SCORED(8, 2, **keys)


def test_scores_are_those_that_were_ranked() -> None:
    """With groups, -inf outside of them."""
    r = router(8, 2, bias=True, n_groups=4, top_groups=2)
    scores_TE = r.select(random_logits(37, 8), RouteContext(want_scores=True)).scores_TE
    assert scores_TE is not None
    assert scores_TE.isinf().sum(-1).tolist() == [4] * 37


def test_unlikely_experts_share_their_weight_as_likely_ones_do() -> None:
    """Sigmoids of -12 are small, and sum to the scale all the same."""
    router = SCORED(4, 2, scale=3.0)
    weights_TK = router.select(torch.tensor([[-12.0, -12.0, -30.0, -30.0]])).weights_TK
    assert weights_TK[0].tolist() == pytest.approx([1.5, 1.5])


@pytest.mark.parametrize("group_score", [pytest.param(name, id=name) for name in ("max", "top2")])
def test_a_group_of_one_expert_is_that_expert(group_score: str) -> None:
    """The two best groups are the two best experts."""
    router = SCORED(5, 2, n_groups=5, top_groups=2, group_score=group_score)
    assert router.select(torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]])).expert_ids_TK.tolist() == [[1, 3]]


def test_as_many_groups_as_the_k_experts_need_are_enough() -> None:
    """Two groups of two for k = 4, and all groups."""
    for top_groups in (2, 3):
        router = SCORED(6, 4, n_groups=3, top_groups=top_groups)
        assert (router.select(torch.zeros(1, 6)).expert_ids_TK >= 0).all()
