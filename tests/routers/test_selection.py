"""routers/selection.py: a router of one's own by the kernels, and those of ours with their gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.ops import cxx
from moe_lab.ops.norm_gate_route import MOST_ROWS
from moe_lab.ops.route import gate_route
from moe_lab.ops.selection import Selection
from moe_lab.ops.softmax_topk import chosen
from moe_lab.routers.base import RouteContext, Router
from moe_lab.routers.selection import SelectionRouter
from tests.routers.cases import SCORED, make

needs_cxx = pytest.mark.skipif(cxx.find_cxx() is None, reason="no C++ compiler for the extension")


class Sigmoids(SelectionRouter):
    """The k largest logits, weighed by their sigmoids; the least that a subclass has to say."""

    def __init__(self, n_experts: int, top_k: int, impl: str = "auto"):
        super().__init__(n_experts, top_k, impl)
        self.describe(Selection(top_k, "sigmoid", renormalize=False))

    def ranked(self, logits_TE: Tensor) -> Tensor:
        """The logits."""
        return logits_TE

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """Not divided by their sum."""
        return chosen(logits_TE.float().sigmoid(), expert_ids_TK)


@pytest.mark.parametrize("impl", [pytest.param("cuda_ext", marks=needs_cxx), "triton"])
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (0, 1, 199)])
def test_a_router_of_ones_own_is_computed_by_the_kernels(impl: str, T: int, device: torch.device) -> None:
    """As by torch: choice, weights, scores and sorted slots; and by `route` of hidden states."""
    x_TD, gate_ED = (torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)) for rows in (T, 12))
    x_TD, gate_ED = x_TD.to(device), gate_ED.to(device)
    with torch.device(device):
        by_torch, by_kernel = Sigmoids(12, 3, "torch"), Sigmoids(12, 3, impl).compute_on(device)
    assert by_kernel.implementation().startswith(impl) and not by_kernel.multiplies_gate(T, gate_ED, x_TD.dtype)
    wants = RouteContext(want_scores=True, want_dispatch=True)
    expected, found = (router.route(x_TD, gate_ED, wants) for router in (by_torch, by_kernel))
    assert torch.equal(found.expert_ids_TK, expected.expert_ids_TK)
    torch.testing.assert_close(found.weights_TK, expected.weights_TK)
    assert torch.equal(found.scores_TE, expected.scores_TE)
    assert (found.dispatch is None) == (impl == "triton")


@pytest.mark.parametrize("impl", [pytest.param("cuda_ext", marks=needs_cxx)])
def test_what_no_kernel_computes_is_refused_before_anything_runs(impl: str, device: torch.device) -> None:
    """And auto takes another."""
    with pytest.raises(UnavailableError, match="1024"):
        Sigmoids(1025, 2, impl).compute_on(device)
    assert Sigmoids(1025, 2, "auto").compute_on(device).impl == ("triton" if device.type == "cuda" else "torch")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [pytest.param("cuda_ext", marks=needs_cxx)])
@pytest.mark.parametrize(
    "new_router",
    [
        pytest.param(partial(make, "mixtral"), id="softmax"),
        pytest.param(SCORED, id="scored"),
        pytest.param(partial(make, "loss_free"), id="loss-free"),
        pytest.param(Sigmoids, id="own"),
    ],
)
@pytest.mark.parametrize(("T", "E"), [pytest.param(16, 64, id="few tokens"), pytest.param(199, 8, id="few experts")])
def test_a_router_multiplies_by_its_gate_where_that_is_faster(
    new_router: Callable[..., Router], T: int, E: int, impl: str
) -> None:
    """In half precision, not where scores or sorted slots are asked for; compiled too."""
    with torch.device("cuda"):
        router = new_router(E, 6, impl=impl).compute_on(torch.device("cuda"))
        x_TD, gate_ED = torch.randn(T, 2048).bfloat16(), (torch.randn(E, 2048) / 2048**0.5).bfloat16()
    assert router.multiplies_gate(T, gate_ED, x_TD.dtype) and not router.multiplies_gate(T, gate_ED, torch.float32)
    fused, apart = router.route(x_TD, gate_ED), router.select(x_TD @ gate_ED.t())
    assert (fused.expert_ids_TK == apart.expert_ids_TK).float().mean() > 0.9
    assert router.route(x_TD, gate_ED, RouteContext(want_dispatch=True)).dispatch is not None
    assert router.route(x_TD, gate_ED, RouteContext(want_scores=True)).scores_TE is not None
    compiled = torch.compile(lambda x: router.route(x, gate_ED)[:2], fullgraph=True)(x_TD)
    assert torch.equal(compiled[0], fused.expert_ids_TK) and torch.equal(compiled[1], fused.weights_TK)
    for bad, message in (
        (x_TD.float(), "float16 or bfloat16"),
        (x_TD[:, :48], "multiple of 32"),
        (x_TD[:, :0], "D a multiple"),
    ):
        with pytest.raises(RuntimeError, match=message):
            gate_route(bad, gate_ED[:, : bad.shape[1]], Selection(6))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [pytest.param("cuda_ext", marks=needs_cxx)])
@pytest.mark.parametrize(
    "new_router", [pytest.param(partial(make, "mixtral"), id="softmax"), pytest.param(SCORED, id="scored")]
)
def test_a_router_norms_what_it_multiplies(new_router: Callable[..., Router], impl: str) -> None:
    """Of one token; compiled too. It says of how many it would."""
    with torch.device("cuda"):
        router = new_router(64, 6, impl=impl).compute_on(torch.device("cuda"))
        x_TD, residual_TD, weight_D = (torch.randn(shape).bfloat16() for shape in ((1, 2048), (1, 2048), (2048,)))
        gate_ED = (torch.randn(64, 2048) / 2048**0.5).bfloat16()
    torch.cuda.synchronize()
    is_sm_90 = torch.cuda.get_device_capability() == (9, 0)
    assert router.norms_input(1, weight_D, gate_ED, x_TD.dtype) == is_sm_90
    assert router.norms_input(MOST_ROWS, weight_D, gate_ED, x_TD.dtype) == is_sm_90
    assert not router.norms_input(MOST_ROWS + 1, weight_D, gate_ED, x_TD.dtype)
    inputs = (residual_TD, weight_D, 1e-5, gate_ED)
    normed_TD, _, fused = router.norm_and_route(x_TD, *inputs)
    assert torch.equal(fused.expert_ids_TK.sort().values, router.route(normed_TD, gate_ED).expert_ids_TK.sort().values)
    compiled = torch.compile(lambda x: router.norm_and_route(x, *inputs)[2][:2], fullgraph=True)(x_TD)
    assert torch.equal(compiled[0], fused.expert_ids_TK) and torch.equal(compiled[1], fused.weights_TK)
