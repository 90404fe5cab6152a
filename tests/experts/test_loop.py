"""experts=loop: the reference of every other implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.experts.loop import Loop
from moe_lab.experts.weights import Scale
from moe_lab.routers.base import Routing
from tests.experts.cases import SCALES, assert_near, formula, make_routing, make_weights, make_x

loop = Loop()


@settings(max_examples=30, deadline=None, database=None)
@given(
    data=st.data(), T=st.integers(0, 9), E=st.integers(1, 7), K=st.integers(1, 4), D=st.integers(1, 9),
    F=st.integers(1, 9), scale=st.sampled_from(["output", "input"]),
)  # fmt: skip
def test_any_table_of_ids_is_summed(data: st.DataObject, T: int, E: int, K: int, D: int, F: int, scale: Scale) -> None:
    """Any ids, repeated or not, used or not, give the formula in float64."""
    ids = data.draw(st.lists(st.integers(-1, E - 1), min_size=T * K, max_size=T * K))
    routing = make_routing(T, max(E, K), K)._replace(expert_ids_TK=torch.tensor(ids, dtype=torch.int32).view(T, K))
    weights, x_TD = make_weights(E, D, F), make_x(T, D)
    assert_near(loop(x_TD, routing, weights, scale=scale), formula(x_TD, routing, weights, scale))


@SCALES
@pytest.mark.parametrize(
    "weights_dtype",
    [
        pytest.param(torch.bfloat16, id="bf16"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.float64, id="fp64"),
    ],
)
def test_weights_of_another_dtype_are_cast(scale: Scale, weights_dtype: torch.dtype) -> None:
    """The computation is in x's dtype: equal to casting all weights beforehand, which stay as they were."""
    weights, routing, x_TD = make_weights(5, 9, 7, weights_dtype), make_routing(37, 5, 2, 0.2), make_x(37, 9)
    y_TD = loop(x_TD, routing, weights, scale=scale)
    assert y_TD.dtype == torch.float32
    assert weights.w_down_EDF.dtype == weights.w_gate_up_E2FD.dtype == weights_dtype
    assert torch.equal(y_TD, loop(x_TD, routing, weights.float(), scale=scale))


def test_in_float64_it_is_the_formula_to_the_last_digits() -> None:
    """float64 hidden states are summed in float64, so that the loop can serve as a reference."""
    weights, routing, x_TD = make_weights(5, 9, 7, torch.float64), make_routing(37, 5, 2, 0.2), make_x(37, 9).double()
    y_TD = loop(x_TD, routing, weights)
    assert y_TD.dtype == torch.float64
    torch.testing.assert_close(y_TD, formula(x_TD, routing, weights), rtol=1e-12, atol=1e-12)


def test_slots_are_summed_before_rounding() -> None:
    """Slots whose fp16 sum would round at every step are summed in fp32 and rounded once."""
    weights = make_weights(3, 1, 1, torch.float16)
    weights.w_gate_up_E2FD.fill_(8.0)
    weights.w_down_EDF.fill_(1.0)
    x_TD = torch.ones(1, 1, dtype=torch.float16)
    one_expert = float(loop(x_TD, Routing(torch.tensor([[0]], dtype=torch.int32), torch.ones(1, 1)), weights))
    small = 2.0**-11 * 0.4
    routing = Routing(torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.tensor([[1.0, small, small]]))
    expected = torch.tensor(one_expert * (1 + 2 * small)).half()
    assert float(loop(x_TD, routing, weights)) == float(expected) > one_expert


def test_it_declares_that_it_reads_the_host() -> None:
    """No captured graph may hold it."""
    assert loop.graph_safe is False
