"""log_plan against an independent Sinkhorn in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.ops.sinkhorn import log_plan

SIZES = pytest.mark.parametrize(
    ("T", "E"),
    [
        pytest.param(1, 5, id="T=1"),
        pytest.param(37, 1, id="E=1"),
        pytest.param(3, 12, id="T<E"),
        pytest.param(37, 7, id="T=37"),
        pytest.param(199, 12, id="T=199"),
    ],
)
ITERS = pytest.mark.parametrize(
    "iters", [pytest.param(0, id="0 iters"), pytest.param(1, id="1 iter"), pytest.param(10, id="10 iters")]
)


def skewed_logits(T: int, E: int) -> Tensor:
    """Seeded logits that favour the first experts."""
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T + E)) - torch.arange(E) * 0.3


def plan64(logits_TE: Tensor, iters: int, temperature: float = 1.0) -> np.ndarray:
    """Rows scaled to 1, then columns to T/E and rows to 1 in turn, on the matrix itself in float64."""
    T, E = logits_TE.shape
    wide = logits_TE.double().numpy() / temperature
    plan_TE = np.exp(wide - wide.max(1, keepdims=True))
    plan_TE /= plan_TE.sum(1, keepdims=True)
    for _ in range(iters):
        plan_TE *= T / E / plan_TE.sum(0)
        plan_TE /= plan_TE.sum(1, keepdims=True)
    return plan_TE


def column_error(log_plan_TE: Tensor) -> float:
    """Largest deviation of a column from T/E, relative to it."""
    T, E = log_plan_TE.shape
    return float((log_plan_TE.double().exp().sum(0) * E / T - 1).abs().max())


@SIZES
@ITERS
@pytest.mark.parametrize(
    "temperature", [pytest.param(1.0, id="1"), pytest.param(0.3, id="0.3"), pytest.param(4.0, id="4")]
)
def test_the_plan_equals_sinkhorn_in_float64(T: int, E: int, iters: int, temperature: float) -> None:
    """After any number of iterations the plan is that of the matrix form, in float32."""
    logits_TE = skewed_logits(T, E)
    log_plan_TE = log_plan(logits_TE, iters, temperature)
    assert log_plan_TE.dtype == torch.float32
    np.testing.assert_allclose(log_plan_TE.exp(), plan64(logits_TE, iters, temperature), rtol=2e-5, atol=1e-7)


@SIZES
def test_the_converged_plan_has_both_marginals(T: int, E: int) -> None:
    """With many iterations rows sum to 1, columns to T/E, and the plan is the float64 fixed point."""
    logits_TE = skewed_logits(T, E)
    log_plan_TE = log_plan(logits_TE, 300, 1.0)
    torch.testing.assert_close(log_plan_TE.exp().sum(1), torch.ones(T), rtol=1e-5, atol=0)
    assert column_error(log_plan_TE) < 1e-4
    np.testing.assert_allclose(log_plan_TE.exp(), plan64(logits_TE, 3000), rtol=2e-4)


@SIZES
@ITERS
@pytest.mark.parametrize("scale", [pytest.param(1.0, id="1"), pytest.param(30.0, id="30"), pytest.param(3e4, id="3e4")])
def test_rows_sum_to_one_after_any_number_of_iterations(T: int, E: int, iters: int, scale: float) -> None:
    """The rows are scaled last, so they are exact however far the columns are off and however large the logits."""
    rows_T = log_plan(skewed_logits(T, E) * scale, iters, 1.0).exp().sum(1)
    torch.testing.assert_close(rows_T, torch.ones(T), rtol=2e-5, atol=0)


def test_columns_come_nearer_with_every_iteration() -> None:
    """The columns' error never grows (but for rounding) and ends small."""
    logits_TE = skewed_logits(199, 12)
    errors = [column_error(log_plan(logits_TE, iters, 0.5)) for iters in (0, 1, 2, 4, 8, 16, 32)]
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(errors))
    assert errors[0] > 1 and errors[-1] < 1e-2


@settings(max_examples=30, deadline=None, database=None)
@given(
    logits=st.integers(1, 6).flatmap(
        lambda E: st.lists(st.lists(st.floats(-20, 20, width=32), min_size=E, max_size=E), min_size=1, max_size=6)
    ),
    iters=st.integers(0, 5),
)
def test_rows_sum_to_one_for_any_logits(logits: list[list[float]], iters: int) -> None:
    """Any finite logits give a finite plan with rows that sum to 1."""
    log_plan_TE = log_plan(torch.tensor(logits), iters, 1.0)
    assert log_plan_TE.isfinite().all()
    torch.testing.assert_close(log_plan_TE.exp().sum(1), torch.ones(len(logits)), rtol=2e-5, atol=0)


@pytest.mark.parametrize("E", [pytest.param(5, id="E=5"), pytest.param(12, id="E=12")])
def test_one_token_has_the_uniform_plan(E: int) -> None:
    """With T=1 every column must hold 1/E, whatever the logits."""
    log_plan_TE = log_plan(skewed_logits(1, E) * 10, 1, 1.0)
    torch.testing.assert_close(log_plan_TE, torch.full((1, E), -math.log(E)), rtol=1e-5, atol=1e-5)


@ITERS
def test_no_tokens_have_an_empty_plan(iters: int) -> None:
    """T=0 gives [0, E] float32."""
    log_plan_TE = log_plan(torch.empty(0, 7, dtype=torch.float16), iters, 1.0)
    assert log_plan_TE.shape == (0, 7) and log_plan_TE.dtype == torch.float32


@ITERS
@pytest.mark.parametrize("E", [pytest.param(5, id="E=5"), pytest.param(33, id="E=33")])
def test_equal_experts_have_equal_columns(iters: int, E: int) -> None:
    """Experts with the same logits get the same share, up to the order in which a column is summed."""
    logits_TE = skewed_logits(37, E)
    logits_TE[:, E - 1] = logits_TE[:, E // 2] = logits_TE[:, 0]
    log_plan_TE = log_plan(logits_TE, iters, 1.0)
    torch.testing.assert_close(log_plan_TE[:, [E - 1, E // 2]], log_plan_TE[:, [0, 0]], rtol=1e-6, atol=1e-6)


@SIZES
@ITERS
def test_equal_logits_have_a_plan_of_one_value(T: int, E: int, iters: int) -> None:
    """Where all logits are equal, all entries are bitwise equal: a tie that the ids can break."""
    log_plan_TE = log_plan(torch.full((T, E), 1.7), iters, 0.7)
    assert log_plan_TE.unique().numel() == 1
    torch.testing.assert_close(log_plan_TE, torch.full((T, E), -math.log(E)), rtol=1e-6, atol=1e-6)


@ITERS
@pytest.mark.parametrize(
    "shift", [pytest.param(10.0, id="10"), pytest.param(-1e3, id="-1e3"), pytest.param(3e4, id="3e4")]
)
def test_a_shift_of_a_token_s_logits_changes_nothing(iters: int, shift: float) -> None:
    """A constant added to a row cancels; the logits are multiples of 1/256, so the sum itself is exact."""
    logits_TE = (skewed_logits(37, 7) * 256).round() / 256
    shift_T1 = torch.arange(37)[:, None] % 2 * shift
    torch.testing.assert_close(
        log_plan(logits_TE + shift_T1, iters, 1.0), log_plan(logits_TE, iters, 1.0), rtol=1e-5, atol=2e-5
    )


def test_at_convergence_a_shift_of_an_expert_s_logits_changes_nothing() -> None:
    """A bias per expert is what the column scaling takes out."""
    logits_TE = skewed_logits(37, 7)
    torch.testing.assert_close(
        log_plan(logits_TE + torch.arange(7), 300, 1.0), log_plan(logits_TE, 300, 1.0), rtol=1e-4, atol=1e-4
    )


@ITERS
def test_the_temperature_divides_the_logits(iters: int) -> None:
    """Dividing the logits beforehand is the same."""
    logits_TE = skewed_logits(37, 7)
    assert torch.equal(log_plan(logits_TE, iters, 0.25), log_plan(logits_TE / 0.25, iters, 1.0))


@ITERS
def test_tokens_and_experts_have_no_order(iters: int) -> None:
    """Permuting tokens and experts permutes the plan."""
    logits_TE = skewed_logits(37, 7)
    generator = torch.Generator().manual_seed(0)
    token_T, expert_E = torch.randperm(37, generator=generator), torch.randperm(7, generator=generator)
    torch.testing.assert_close(
        log_plan(logits_TE[token_T][:, expert_E], iters, 1.0),
        log_plan(logits_TE, iters, 1.0)[token_T][:, expert_E],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, id="bf16"),
        pytest.param(torch.float64, id="fp64"),
    ],
)
def test_logits_of_any_dtype_give_the_float32_plan(dtype: torch.dtype) -> None:
    """The computation is float32 whatever comes in."""
    logits_TE = skewed_logits(37, 7).to(dtype)
    before_TE = logits_TE.clone()
    assert torch.equal(log_plan(logits_TE, 5, 1.0), log_plan(logits_TE.float(), 5, 1.0))
    assert torch.equal(logits_TE, before_TE)
