"""router=torch: softmax over the experts, then the k largest."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.routers.softmax_topk import SoftmaxTopK
from moe_lab.runs.build import build_router
from tests import tiny
from tests.routers.cases import make, ready
from tests.routers.peers import dense, peer_router

RENORMALIZE = pytest.mark.parametrize(
    "renormalize", [pytest.param(True, id="renormalised"), pytest.param(False, id="plain")]
)
SIZES = pytest.mark.parametrize(
    ("T", "E", "K"),
    [
        pytest.param(1, 7, 2, id="T=1"),
        pytest.param(37, 5, 5, id="k=E"),
        pytest.param(199, 12, 3, id="T=199"),
        pytest.param(199, 65, 8, id="E=65"),
    ],
)


def random_logits(T: int, E: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded logits without ties."""
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T + E), dtype=torch.float64).to(dtype) * 3


def published(logits_TE: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """As OLMoE and Mixtral write it, in float64: softmax, then topk of the probabilities, then their share."""
    weights_TK, ids_TK = logits_TE.double().softmax(-1).topk(k, dim=-1)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return ids_TK.to(torch.int32), weights_TK


@SIZES
@RENORMALIZE
def test_the_route_is_that_of_olmoe_and_mixtral(T: int, E: int, K: int, renormalize: bool) -> None:
    """Plain it is OLMoE's router, renormalised Mixtral's, up to float32 rounding."""
    logits_TE = random_logits(T, E)
    routing = make("mixtral", E, K, renormalize=renormalize).select(logits_TE)
    ids_TK, weights_TK = published(logits_TE, K, renormalize)
    assert torch.equal(routing.expert_ids_TK, ids_TK)
    torch.testing.assert_close(routing.weights_TK.double(), weights_TK, rtol=1e-5, atol=1e-7)


@RENORMALIZE
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")])
def test_weights_of_narrow_logits_are_float32(renormalize: bool, dtype: torch.dtype) -> None:
    """The softmax of fp16 and bf16 logits is computed in float32, not in their dtype."""
    logits_TE = random_logits(199, 12, dtype)
    routing = make("mixtral", 12, 3, renormalize=renormalize).select(logits_TE)
    p_TE = logits_TE.double().softmax(-1)
    chosen_TK = p_TE.gather(1, routing.expert_ids_TK.long())
    expected_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True) if renormalize else chosen_TK
    torch.testing.assert_close(routing.weights_TK.double(), expected_TK, rtol=1e-5, atol=1e-7)


@settings(max_examples=40, deadline=None, database=None)
@given(row=st.lists(st.integers(-60, 60), min_size=1, max_size=12), data=st.data())
def test_every_chosen_logit_is_at_least_every_other(row: list[int], data: st.DataObject) -> None:
    """No expert outside the set has a larger logit, nor an equal one with a lower id."""
    k = data.draw(st.integers(1, len(row)))
    routing = make("mixtral", len(row), k).select(torch.tensor([row], dtype=torch.float32))
    assert routing.expert_ids_TK[0].tolist() == sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:k]


def test_experts_that_underflow_are_still_ranked_by_their_logits() -> None:
    """Probabilities that are all 0 in float32 would tie; the logits do not."""
    routing = make("mixtral", 4, 3, renormalize=False).select(torch.tensor([[-400.0, 0.0, -200.0, -300.0]]))
    assert routing.expert_ids_TK.tolist() == [[1, 2, 3]]
    assert routing.weights_TK.tolist() == [[1.0, 0.0, 0.0]]


@RENORMALIZE
def test_a_masked_expert_is_chosen_last_and_weighs_nothing(renormalize: bool) -> None:
    """-inf is a legal logit: the expert is taken only when no other is left, and then with weight 0."""
    logits_TE = torch.tensor([[-math.inf, 1.0, -math.inf, 0.0, -math.inf], [0.0, 1.0, 2.0, 3.0, -math.inf]])
    routing = make("mixtral", 5, 3, renormalize=renormalize).select(logits_TE)
    assert routing.expert_ids_TK.tolist() == [[1, 3, 0], [3, 2, 1]]
    assert float(routing.weights_TK[0, 2]) == 0.0
    torch.testing.assert_close(routing.weights_TK[0].sum(), torch.tensor(1.0))


@RENORMALIZE
@pytest.mark.parametrize("size", [pytest.param(3e4, id="3e4"), pytest.param(3e38, id="3e38")])
def test_huge_logits_give_a_one_hot_route(renormalize: bool, size: float) -> None:
    """A logit far above the rest has weight 1, the rest 0, and nothing overflows."""
    logits_TE = torch.tensor([[-size, 0.0, size, -size, 1.0]])
    routing = make("mixtral", 5, 5, renormalize=renormalize).select(logits_TE)
    assert routing.expert_ids_TK.tolist() == [[2, 4, 1, 0, 3]]
    assert routing.weights_TK.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]


def test_renormalised_weights_are_the_plain_ones_divided_by_their_sum() -> None:
    """Both variants choose the same experts, and one's weights are the other's share."""
    logits_TE = random_logits(199, 12)
    plain = make("mixtral", 12, 3, renormalize=False).select(logits_TE)
    shared = make("mixtral", 12, 3).select(logits_TE)
    assert torch.equal(plain.expert_ids_TK, shared.expert_ids_TK)
    torch.testing.assert_close(plain.weights_TK / plain.weights_TK.sum(-1, keepdim=True), shared.weights_TK)


def test_an_implementation_that_is_not_there_is_unavailable() -> None:
    """No silent fallback: the error names what was asked for."""
    with pytest.raises(
        UnavailableError, match=r"router\.impl=x.*torch, triton, cuda_ext, vllm, sglang, transformers only"
    ):
        make("mixtral", 7, 2, impl="x")


def test_the_kernel_needs_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA and the interpreter it is unavailable, and `auto` means torch."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    assert make("mixtral", 7, 2).compute_on(cpu).impl == "torch"
    with pytest.raises(UnavailableError, match="needs device=cuda"):
        make("mixtral", 7, 2, impl="triton").compute_on(cpu)


PEERS = [
    pytest.param("mixtral", "mixtral", "MixtralTopKRouter", {}, id="mixtral"),
    pytest.param("olmoe", "olmoe", "OlmoeTopKRouter", {"norm_topk_prob": False}, id="olmoe"),
    pytest.param("qwen3_moe", "qwen3_moe", "Qwen3MoeTopKRouter", {}, id="qwen3"),
    pytest.param("granite", "granitemoe", "GraniteMoeTopKRouter", {}, id="granite"),
]


@SIZES
@pytest.mark.parametrize(("option", "kind", "name", "settings"), PEERS)
def test_the_route_is_that_of_transformers(
    option: str, kind: str, name: str, settings: dict[str, bool], T: int, E: int, K: int
) -> None:
    """Its modules on the same logits, and the router that the option makes: exact sets, weights to 1e-5."""
    logits_TE = random_logits(T, E)
    _, weights_TK, ids_TK = peer_router(kind, name, E, K, **settings)(logits_TE)
    routing = build_router(tiny.decoder_moe(f"router={option}"), E, K).select(logits_TE)
    torch.testing.assert_close(
        dense(routing.expert_ids_TK, routing.weights_TK, E), dense(ids_TK, weights_TK, E), rtol=1e-5, atol=1e-7
    )


def test_the_route_of_granite_is_that_of_jetmoe() -> None:
    """Whose module sorts the slots by expert, and tells neither ids nor weights but for that."""
    gating = pytest.importorskip("transformers.models.jetmoe.modeling_jetmoe").JetMoeTopKGating(12, 12, 3)
    gating.layer.weight.data.copy_(torch.eye(12))
    logits_TE = random_logits(199, 12)
    _, token_N, weight_N, counts, _ = gating.requires_grad_(False)(logits_TE)
    ids_N = torch.arange(12).repeat_interleave(torch.tensor(counts))
    weights_TE = torch.zeros(199, 12, dtype=torch.float64)
    weights_TE[token_N, ids_N] = weight_N.double()
    routing = build_router(tiny.decoder_moe("router=granite"), 12, 3).select(logits_TE)
    torch.testing.assert_close(dense(routing.expert_ids_TK, routing.weights_TK, 12), weights_TE, rtol=1e-5, atol=1e-7)


def test_the_gate_bias_is_that_of_gpt_oss() -> None:
    """Added to the logits, it chooses and weighs."""
    E, K, logits_TE = 12, 3, random_logits(199, 12)
    router, peer = ready(partial(make, "gpt_oss"), E, K), peer_router("gpt_oss", "GptOssTopKRouter", E, K)
    assert isinstance(router, SoftmaxTopK) and router.bias_E is not None
    peer.bias.copy_(router.bias_E)
    _, weights_TK, ids_TK = peer(logits_TE)
    routing = router.select(logits_TE)
    torch.testing.assert_close(
        dense(routing.expert_ids_TK, routing.weights_TK, E), dense(ids_TK, weights_TK, E), rtol=1e-5, atol=1e-7
    )
    assert not torch.equal(routing.expert_ids_TK, make("mixtral", E, K).select(logits_TE).expert_ids_TK)


def test_one_expert_not_renormalised_is_the_switch_router() -> None:
    """The most likely expert, with its probability."""
    logits_TE = random_logits(199, 12)
    routing = make("mixtral", 12, 1, renormalize=False).select(logits_TE)
    best_T1, id_T1 = logits_TE.double().softmax(-1).max(-1, keepdim=True)
    assert torch.equal(routing.expert_ids_TK, id_T1.int())
    torch.testing.assert_close(routing.weights_TK.double(), best_T1, rtol=1e-5, atol=1e-7)
