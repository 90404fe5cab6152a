"""router=sinkhorn: top-k of a balanced plan, weights from the original softmax."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.ops import cxx
from moe_lab.routers.base import RouteContext
from tests.routers.cases import make

needs_cxx = pytest.mark.skipif(cxx.find_cxx() is None, reason="no C++ compiler for the extension")
SIZES = pytest.mark.parametrize(
    ("T", "E", "K"),
    [
        pytest.param(2, 5, 2, id="T=2"),
        pytest.param(37, 7, 7, id="k=E"),
        pytest.param(37, 12, 1, id="top 1"),
        pytest.param(199, 33, 4, id="topk path"),
    ],
)


def skewed_logits(T: int, E: int, skew: float = 0.5) -> Tensor:
    """Seeded logits that favour the first experts."""
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T + E)) - torch.arange(E) * skew


def plan64(logits_TE: Tensor, iters: int, temperature: float) -> np.ndarray:
    """Columns scaled to T/E and rows to 1 in turn, on the matrix itself in float64."""
    T, E = logits_TE.shape
    plan_TE = logits_TE.double().div(temperature).softmax(-1).numpy()
    for _ in range(iters):
        plan_TE = plan_TE * (T / E) / plan_TE.sum(0)
        plan_TE = plan_TE / plan_TE.sum(1, keepdims=True)
    return plan_TE


def load_max_over_mean(ids_TK: Tensor, E: int) -> float:
    """Load of the fullest expert over the mean load."""
    return float(ids_TK.reshape(-1).bincount(minlength=E).max()) * E / ids_TK.numel()


@SIZES
@pytest.mark.parametrize("iters", [pytest.param(0, id="0 iters"), pytest.param(10, id="10 iters")])
@pytest.mark.parametrize("temperature", [pytest.param(1.0, id="t=1"), pytest.param(0.3, id="t=0.3")])
def test_the_best_of_the_plan_are_chosen(T: int, E: int, K: int, iters: int, temperature: float) -> None:
    """The ids are the k largest of a Sinkhorn plan computed in float64, which are the scores."""
    logits_TE = skewed_logits(T, E)
    router = make("sinkhorn", E, K, iters=iters, temperature=temperature)
    routing = router.select(logits_TE, RouteContext(want_scores=True))
    expected_TE = plan64(logits_TE, iters, temperature)
    assert routing.expert_ids_TK.tolist() == np.argsort(-expected_TE, axis=-1, kind="stable")[:, :K].tolist()
    assert routing.scores_TE is not None
    np.testing.assert_allclose(routing.scores_TE.exp(), expected_TE, rtol=2e-5, atol=1e-7)


@SIZES
@pytest.mark.parametrize("renormalize", [pytest.param(True, id="renormalised"), pytest.param(False, id="plain")])
@pytest.mark.parametrize("temperature", [pytest.param(1.0, id="t=1"), pytest.param(0.3, id="t=0.3")])
def test_weights_come_from_the_original_softmax(T: int, E: int, K: int, temperature: float, renormalize: bool) -> None:
    """A chosen expert weighs its share of softmax(logits), or all of it, without temperature or plan."""
    logits_TE = skewed_logits(T, E)
    routing = make("sinkhorn", E, K, temperature=temperature, renormalize=renormalize).select(logits_TE)
    chosen_TK = logits_TE.double().softmax(-1).gather(1, routing.expert_ids_TK.long())
    expected_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True) if renormalize else chosen_TK
    torch.testing.assert_close(routing.weights_TK.double(), expected_TK, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("K", [pytest.param(1, id="k=1"), pytest.param(3, id="k=3")])
@pytest.mark.parametrize("E", [pytest.param(7, id="E=7"), pytest.param(12, id="E=12")])
def test_skewed_logits_are_evened_out(K: int, E: int) -> None:
    """Where the softmax router overloads the first experts, the fullest expert has clearly less."""
    logits_TE = skewed_logits(199, E)
    balanced, native = (make(name, E, K).select(logits_TE).expert_ids_TK for name in ("sinkhorn", "mixtral"))
    assert load_max_over_mean(native, E) > 2
    assert load_max_over_mean(balanced, E) < 0.7 * load_max_over_mean(native, E)


def test_without_iterations_the_choice_is_the_softmax_router_s() -> None:
    """With iters=0 the plan is the softmax."""
    logits_TE = skewed_logits(199, 12)
    routing, expected = make("sinkhorn", 12, 3, iters=0).select(logits_TE), make("mixtral", 12, 3).select(logits_TE)
    assert torch.equal(routing.expert_ids_TK, expected.expert_ids_TK)
    assert torch.equal(routing.weights_TK, expected.weights_TK)


def test_sinkhorn_is_not_causal() -> None:
    """As declared: tokens that all want expert 0, added at the end, move the first token off it."""
    early_TE = torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.0, 1.0]])
    late_TE = torch.tensor([[5.0, 0.0, 0.0]]).expand(9, 3)
    router = make("sinkhorn", 3, 1)
    assert not router.causal
    assert int(router.select(early_TE).expert_ids_TK[0, 0]) == 0
    assert int(router.select(torch.cat([early_TE, late_TE])).expert_ids_TK[0, 0]) == 1


def test_sinkhorn_is_not_batch_invariant() -> None:
    """As declared: a token that goes to expert 0 alone goes elsewhere beside tokens that want expert 0 more."""
    token_1E, others_TE = torch.tensor([[1.0, 0.9, 0.0]]), torch.tensor([[5.0, 0.0, 0.0]]).expand(9, 3)
    router = make("sinkhorn", 3, 1)
    assert not router.batch_invariant
    assert int(router.select(token_1E).expert_ids_TK[0, 0]) == 0
    assert int(router.select(torch.cat([others_TE, token_1E])).expert_ids_TK[-1, 0]) == 1


@pytest.mark.parametrize("temperature", [pytest.param(1.0, id="t=1"), pytest.param(0.1, id="t=0.1")])
@pytest.mark.parametrize("K", [pytest.param(1, id="k=1"), pytest.param(3, id="k=3"), pytest.param(7, id="k=E")])
def test_one_token_is_routed_by_its_logits(K: int, temperature: float) -> None:
    """With T=1 the uniform plan decides nothing, so the route and the scores are those of the logits."""
    logits_1E = skewed_logits(1, 7).half()
    routing = make("sinkhorn", 7, K, temperature=temperature).select(logits_1E, RouteContext(want_scores=True))
    expected = make("mixtral", 7, K).select(logits_1E)
    assert torch.equal(routing.expert_ids_TK, expected.expert_ids_TK)
    assert torch.equal(routing.weights_TK, expected.weights_TK)
    assert torch.equal(routing.scores_TE, logits_1E.float())


def test_the_fallback_at_one_token_is_said() -> None:
    """A run with one token warns, naming the router; other runs do not."""
    router = make("sinkhorn", 7, 2)
    (warning,) = router.warnings(1)
    assert "router=sinkhorn" in warning and "one token" in warning
    assert [router.warnings(n_tokens) for n_tokens in (0, 2, 199)] == [[], [], []]


@pytest.mark.parametrize(
    "value", [pytest.param(math.nan, id="NaN"), pytest.param(math.inf, id="+inf"), pytest.param(-math.inf, id="-inf")]
)
@pytest.mark.parametrize("T", [pytest.param(1, id="T=1"), pytest.param(37, id="T=37")])
def test_any_entry_that_is_not_finite_is_refused(value: float, T: int) -> None:
    """A single -inf too, which has no plan: the ValueError names layer and token."""
    logits_TE = skewed_logits(T, 7)
    logits_TE[T - 1, 3] = value
    with pytest.raises(ValueError, match=rf"layer 5\b.*not finite.*token {T - 1}\b"):
        make("sinkhorn", 7, 2).select(logits_TE, RouteContext(layer=5))


@pytest.mark.parametrize("size", [pytest.param(3e4, id="3e4"), pytest.param(3e38, id="3e38")])
@pytest.mark.parametrize("temperature", [pytest.param(1.0, id="t=1"), pytest.param(0.05, id="t=0.05")])
def test_huge_finite_logits_are_not_ranked_as_nan(size: float, temperature: float) -> None:
    """Finite logits are refused by a ValueError or give scores that can be ranked: none is NaN."""
    logits_TE = torch.tensor([[size, -size, 0.0, 1.0], [1.0, 2.0, 3.0, -size]])
    routing = None
    with contextlib.suppress(ValueError):
        routing = make("sinkhorn", 4, 2, temperature=temperature).select(logits_TE, RouteContext(want_scores=True))
    assert routing is None or not routing.scores_TE.isnan().any()


def test_auto_is_torch_on_a_cpu() -> None:
    """The default picks one, and the record says which."""
    for impl in ("auto", "torch"):
        assert make("sinkhorn", 7, 2, impl=impl).compute_on(torch.device("cpu")).implementation() == "torch"


@pytest.mark.parametrize("tolerance", [pytest.param(0.0, id="all iterations"), pytest.param(0.05, id="until near")])
@pytest.mark.parametrize("renormalize", [pytest.param(True, id="renormalised"), pytest.param(False, id="plain")])
@pytest.mark.parametrize("impl", [pytest.param("cuda_ext", id="cuda_ext", marks=needs_cxx), "triton"])
def test_kernels_route_as_the_reference(impl: str, renormalize: bool, tolerance: float, device: torch.device) -> None:
    """Ids, weights and scores, beside the scale of the columns that they were ranked by."""
    logits_TE, keys = skewed_logits(199, 12).to(device), {"tolerance": tolerance, "renormalize": renormalize}
    routers = [make("sinkhorn", 12, 3, impl=name, **keys).compute_on(device) for name in ("torch", impl)]
    expected, found = (router.select(logits_TE, RouteContext(want_scores=True)) for router in routers)
    assert routers[1].implementation().startswith(impl)
    assert torch.equal(found.expert_ids_TK, expected.expert_ids_TK)
    torch.testing.assert_close(found.weights_TK, expected.weights_TK)
    assert found.scores_TE is not None and expected.scores_TE is not None
    torch.testing.assert_close(found.scores_TE, expected.scores_TE, rtol=1e-5, atol=1e-5)
    assert routers[1].select(logits_TE).scores_TE is None


def test_a_reference_of_a_kernel_router_is_torch(device: torch.device) -> None:
    """What verification compares with."""
    with torch.device(device):
        router = make("sinkhorn", 12, 3, impl="triton").compute_on(device)
    assert router.implementation() == "triton"
    router.use_reference()
    assert router.implementation() == "torch"


def test_an_implementation_without_such_a_kernel_is_unavailable() -> None:
    """No silent fallback: the error names router and implementation."""
    with pytest.raises(UnavailableError, match=r"router\.impl=vllm.*Sinkhorn"):
        make("sinkhorn", 7, 2, impl="vllm")
    with pytest.raises(UnavailableError, match="at most 1024 experts"):
        make("sinkhorn", 2000, 2, impl="cuda_ext").compute_on(torch.device("cpu"))
