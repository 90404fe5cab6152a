"""experts=grouped: slots sorted by expert, one grouped product per projection."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.experts import grouped as module
from moe_lab.experts.grouped import Grouped
from moe_lab.experts.loop import Loop
from moe_lab.experts.weights import Scale
from moe_lab.ops.dispatch import dispatch
from moe_lab.routers.base import Routing
from tests.experts.cases import EMPTY, SCALES, SIZES, UNUSED, assert_near, make_routing, make_weights, make_x

grouped, loop = Grouped(), Loop()
FEW = module._FEW_TOKENS

CUDA_DTYPES = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, id="bf16"),
    ],
)


@pytest.mark.thinned(2, empty=EMPTY)
@SIZES
@UNUSED
@SCALES
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16", marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
    ],
)
def test_grouped_agrees_with_the_loop(
    T: int, E: int, K: int, D: int, F: int, unused: float, scale: Scale, dtype: torch.dtype, device: torch.device
) -> None:
    """The two implementations differ by rounding, on any sizes."""
    weights, routing = make_weights(E, D, F, dtype, device), make_routing(T, E, K, unused, device)
    x_TD = make_x(T, D, dtype, device)
    assert_near(grouped(x_TD, routing, weights, scale=scale), loop(x_TD, routing, weights, scale=scale))


@settings(max_examples=30, deadline=None, database=None)
@given(
    data=st.data(),
    T=st.integers(0, 9),
    E=st.integers(1, 7),
    K=st.integers(1, 4),
    scale=st.sampled_from(["output", "input"]),
)
def test_grouped_agrees_with_the_loop_for_any_ids(data: st.DataObject, T: int, E: int, K: int, scale: Scale) -> None:
    """Any ids, repeated within a token or not, used or not."""
    ids = data.draw(st.lists(st.integers(-1, E - 1), min_size=T * K, max_size=T * K))
    routing = make_routing(T, max(E, K), K)._replace(expert_ids_TK=torch.tensor(ids, dtype=torch.int32).view(T, K))
    weights, x_TD = make_weights(E, 5, 3), make_x(T, 5)
    assert_near(grouped(x_TD, routing, weights, scale=scale), loop(x_TD, routing, weights, scale=scale))


@SCALES
@UNUSED
@pytest.mark.parametrize("more", [pytest.param({}, id="plain"), pytest.param({"bias": True}, id="biases")])
@pytest.mark.parametrize("T", [pytest.param(FEW, id="few"), pytest.param(FEW + 1, id="many")])
def test_few_tokens_on_a_cpu_are_sorted_by_python(
    T: int, more: dict[str, Any], unused: float, scale: Scale, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as `_FEW_TOKENS`; what stands beside an unused slot is not read."""
    routing, x_TD = make_routing(T, 5, 3, unused), make_x(T, 9)
    routing.weights_TK[routing.expert_ids_TK < 0] = math.nan
    weights, calls = make_weights(5, 9, 7, **more), count_calls(monkeypatch, "dispatch")
    assert_near(grouped(x_TD, routing, weights, scale=scale), loop(x_TD, routing, weights, scale=scale))
    assert len(calls) == (T > FEW) == grouped.reads_dispatch(x_TD)


@SCALES
@UNUSED
def test_what_stands_in_the_rows_of_no_expert_is_never_seen(
    scale: Scale, unused: float, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """segment_mm leaves the rows of unused slots unspecified: with NaN there the output is bitwise the same."""
    weights, routing = make_weights(5, 9, 7, device=device), make_routing(37, 5, 3, unused, device)
    x_TD = make_x(37, 9, device=device)
    expected_TD = grouped(x_TD, routing, weights, scale=scale)
    segment_mm = module.segment_mm

    def with_nan(x_ND: Tensor, w_EFD: Tensor, offsets_E1: Tensor, implementation: str) -> Tensor:
        y_NF = segment_mm(x_ND, w_EFD, offsets_E1, implementation)
        y_NF[int(offsets_E1[-1]) :] = math.nan
        return y_NF

    monkeypatch.setattr(module, "segment_mm", with_nan)
    y_TD = grouped(x_TD, routing, weights, scale=scale)
    assert y_TD.isfinite().all()
    assert torch.equal(y_TD, expected_TD)


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[object, ...]]:
    """The arguments of every call that `grouped` makes of `name`, from now on."""
    calls: list[tuple[object, ...]] = []
    function: Callable[..., object] = getattr(module, name)

    def noting(*arguments: object) -> object:
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(module, name, noting)
    return calls


def test_a_dispatch_that_comes_along_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots are sorted once: not here, where the router already did."""
    weights, routing, x_TD = make_weights(5, 9, 7), make_routing(37, 5, 3, 0.3), make_x(37, 9)
    carried = routing._replace(dispatch=dispatch(routing.expert_ids_TK, 5))
    calls = count_calls(monkeypatch, "dispatch")
    y_TD = grouped(x_TD, carried, weights)
    assert calls == []
    assert torch.equal(grouped(x_TD, routing, weights), y_TD)
    assert len(calls) == 1


def test_the_products_read_the_parameters_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products, each on the parameter's own memory, all experts at once: no copy, no reordering."""
    weights, calls = make_weights(5, 9, 7), count_calls(monkeypatch, "segment_mm")
    y_TD = grouped(make_x(37, 9), make_routing(37, 5, 3), weights)
    read = [arguments[1] for arguments in calls]
    assert y_TD.shape == (37, 9)
    assert [w.data_ptr() for w in read] == [weights.w_gate_up_E2FD.data_ptr(), weights.w_down_EDF.data_ptr()]
    assert [w.shape for w in read] == [(5, 14, 9), (5, 9, 7)]


def test_weights_of_another_dtype_are_refused() -> None:
    """Casting would copy them: a ValueError instead."""
    with pytest.raises(ValueError, match="segment_mm"):
        grouped(make_x(3, 9), make_routing(3, 5, 2), make_weights(5, 9, 7, torch.float16))


def test_slots_are_summed_in_float32() -> None:
    """An fp16 output is the fp32 sum of the slots, rounded once."""
    weights = make_weights(3, 1, 1, torch.float16)
    weights.w_gate_up_E2FD.fill_(8.0)
    weights.w_down_EDF.fill_(1.0)
    x_TD = torch.ones(1, 1, dtype=torch.float16)
    one_expert = float(grouped(x_TD, Routing(torch.tensor([[0]], dtype=torch.int32), torch.ones(1, 1)), weights))
    small = 2.0**-11 * 0.4
    routing = Routing(torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.tensor([[1.0, small, small]]))
    expected = torch.tensor(one_expert * (1 + 2 * small)).half()
    assert float(grouped(x_TD, routing, weights)) == float(expected) > one_expert


def test_it_declares_that_a_graph_can_hold_it() -> None:
    """Nothing is read on the host of a CUDA run."""
    assert grouped.graph_safe is True


@pytest.mark.gpu
@CUDA_DTYPES
@SCALES
@UNUSED
def test_nothing_is_read_on_the_host(dtype: torch.dtype, scale: Scale, unused: float, device: torch.device) -> None:
    """On CUDA no step waits for the device, in any dtype."""
    weights, routing = make_weights(12, 32, 16, dtype, device), make_routing(199, 12, 3, unused, device)
    x_TD = make_x(199, 32, dtype, device)
    expected_TD = grouped(x_TD, routing, weights, scale=scale)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y_TD = grouped(x_TD, routing, weights, scale=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_near(y_TD, expected_TD)


@pytest.mark.gpu
@CUDA_DTYPES
def test_a_captured_graph_follows_a_new_routing(dtype: torch.dtype, device: torch.device) -> None:
    """Replaying a graph captured with another load gives the output of the present ids, weights and states."""
    weights, routing = make_weights(12, 32, 16, dtype, device), make_routing(199, 12, 3, 0.3, device)
    x_TD = make_x(199, 32, dtype, device)
    static = Routing(torch.zeros_like(routing.expert_ids_TK), torch.zeros_like(routing.weights_TK))
    static_TD = torch.zeros_like(x_TD)
    grouped(static_TD, static, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD = grouped(static_TD, static, weights)
    static_TD.copy_(x_TD)
    static.expert_ids_TK.copy_(routing.expert_ids_TK)
    static.weights_TK.copy_(routing.weights_TK)
    graph.replay()
    assert_near(y_TD, grouped(x_TD, routing, weights))
