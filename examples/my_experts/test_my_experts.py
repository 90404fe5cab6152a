"""python -m pytest in this folder: on CUDA natively, else under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from my_experts import MyExperts  # noqa: E402

from moe_lab.experts.loop import Loop  # noqa: E402
from moe_lab.experts.weights import ExpertWeights  # noqa: E402
from moe_lab.ops.dispatch import dispatch  # noqa: E402
from moe_lab.routers.base import Routing  # noqa: E402

DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_CUDA else [])]


def inputs(T: int, E: int, K: int, D: int, F: int, dtype: torch.dtype):
    """Hidden states, a routing with unused slots, and weights."""
    generator = torch.Generator().manual_seed(T)
    weights = ExpertWeights(E, D, F)
    for parameter in weights.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    ids_TK = torch.rand(T, E, generator=generator).argsort(-1)[:, :K].to(torch.int32)
    is_unused_TK = torch.rand(T, K, generator=generator) < 0.2
    weights_TK = torch.rand(T, K, generator=generator).masked_fill(is_unused_TK, 0)
    routing = Routing(ids_TK.masked_fill(is_unused_TK, -1).to(DEVICE), weights_TK.to(DEVICE))
    return torch.randn(T, D, generator=generator).to(DEVICE, dtype), routing, weights.to(DEVICE, dtype)


def make(block: int = 32) -> MyExperts:
    experts = MyExperts(block)
    experts.compute_on(DEVICE)
    return experts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["output", "input"])
@pytest.mark.parametrize(
    ("T", "E", "K", "D", "F", "block"), [(0, 5, 2, 8, 12, 16), (1, 7, 2, 16, 11, 32), (37, 5, 5, 9, 7, 16),
    (37, 4, 1, 1, 1, 16), (199, 12, 3, 37, 65, 64)],
)  # fmt: skip
def test_it_computes_what_the_loop_computes(T, E, K, D, F, block, scale, dtype) -> None:
    """In fp32 of the same numbers, up to the rounding of the dtype."""
    x_TD, routing, weights = inputs(T, E, K, D, F, dtype)
    y_TD = make(block)(x_TD, routing, weights, scale=scale)
    want_TD = Loop()(x_TD.float(), routing, weights, scale=scale)
    assert y_TD.dtype == dtype and y_TD.shape == (T, D)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y_TD.float(), want_TD, rtol=tolerance, atol=tolerance)


def test_a_sort_that_comes_along_is_used() -> None:
    """It declares that it reads Routing.dispatch: an order by other ids changes the output."""
    x_TD, routing, weights = inputs(37, 5, 2, 9, 7, torch.float32)
    experts, order = make(), dispatch(routing.expert_ids_TK, 5)
    assert experts.reads_dispatch(x_TD)
    y_TD = experts(x_TD, routing, weights)
    assert torch.equal(experts(x_TD, routing._replace(dispatch=order), weights), y_TD)
    other = dispatch((routing.expert_ids_TK + 1) % 5, 5)
    assert not torch.allclose(experts(x_TD, routing._replace(dispatch=other), weights), y_TD, rtol=1e-2)


@pytest.mark.parametrize("block", [0, 8, 24])
def test_a_block_that_is_not_a_power_of_two_from_16_is_a_mistake(block: int) -> None:
    """The message names the key."""
    with pytest.raises(ValueError, match=f"experts.block={block}: it must be a power of two"):
        make(block)


@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_a_captured_graph_follows_a_new_routing() -> None:
    """It declares graph_safe: nothing waits for the device, and a replay computes with the present ids."""
    x_TD, routing, weights = inputs(199, 12, 3, 64, 32, torch.bfloat16)
    static = Routing(torch.zeros_like(routing.expert_ids_TK), torch.zeros_like(routing.weights_TK))
    experts = make()
    experts(x_TD, static, weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        want_TD = experts(x_TD, routing, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD = experts(x_TD, static, weights)
    static.expert_ids_TK.copy_(routing.expert_ids_TK)
    static.weights_TK.copy_(routing.weights_TK)
    graph.replay()
    assert torch.equal(y_TD, want_TD)
