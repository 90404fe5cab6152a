"""The weighted sum over a token's slots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_lab.ops.combine import combine

DTYPES = [
    pytest.param(torch.float32, 1e-6, id="fp32"),
    pytest.param(torch.float16, 2e-3, id="fp16"),
    pytest.param(torch.bfloat16, 1e-2, id="bf16"),
]


def case(T: int, K: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs in a random order, weights, and about a third of the slots unused (one token without any)."""
    generator = torch.Generator().manual_seed(T * 100 + K)
    o_ND = torch.randn(T * K, D, generator=generator).to(dtype)
    inverse_N = torch.randperm(T * K, generator=generator).int()
    weights_TK, used_TK = torch.rand(T, K, generator=generator), torch.rand(T, K, generator=generator) > 0.3
    used_TK[T // 2 : T // 2 + 1] = False
    return o_ND.to(device), inverse_N.to(device), weights_TK.to(device), used_TK.to(device)


def expected(o_ND: Tensor, inverse_N: Tensor, weights_TK: Tensor, used_TK: Tensor) -> Tensor:
    """The formula in float64, slot by slot."""
    (T, K), o_ND = weights_TK.shape, o_ND.double().cpu()
    y_TD = torch.zeros(T, o_ND.shape[1], dtype=torch.float64)
    for token, slot in used_TK.cpu().nonzero().tolist():
        y_TD[token] += float(weights_TK[token, slot]) * o_ND[int(inverse_N[token * K + slot])]
    return y_TD


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    ("T", "K", "D"),
    [pytest.param(0, 2, 5, id="T=0"), pytest.param(1, 1, 1, id="ones"), pytest.param(37, 3, 33, id="odd")],
)
def test_the_sum_is_that_of_the_formula(
    T: int, K: int, D: int, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    """In every dtype, with slots and whole tokens unused."""
    arguments = case(T, K, D, dtype, device)
    y_TD = combine(*arguments)
    assert y_TD.dtype == dtype
    assert y_TD.shape == (T, D)
    torch.testing.assert_close(y_TD.double().cpu(), expected(*arguments), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_rows_of_unused_slots_may_hold_nan(dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    """They are replaced, not multiplied by 0; a token without a slot is 0."""
    o_ND, inverse_N, weights_TK, used_TK = case(37, 3, 33, dtype, device)
    o_ND[inverse_N[~used_TK.flatten()].long()] = float("nan")
    weights_TK[~used_TK] = float("nan")
    y_TD = combine(o_ND, inverse_N, weights_TK, used_TK)
    assert y_TD.isfinite().all()
    assert not y_TD[~used_TK.any(-1)].any()
    wanted_TD = expected(o_ND, inverse_N, weights_TK, used_TK)
    torch.testing.assert_close(y_TD.double().cpu(), wanted_TD, atol=tolerance, rtol=tolerance)


def test_all_slots_unused_is_zero(device: torch.device) -> None:
    """Even where every row is NaN."""
    o_ND = torch.full((6, 4), float("nan"), device=device)
    nothing_TK = torch.zeros(3, 2, dtype=torch.bool, device=device)
    y_TD = combine(o_ND, torch.arange(6, dtype=torch.int32, device=device), torch.ones(3, 2, device=device), nothing_TK)
    assert torch.equal(y_TD, torch.zeros(3, 4, device=device))


def test_rows_of_unused_slots_need_not_be_there() -> None:
    """On a CPU in fp32 the used ones alone are computed; they come first in the order."""
    o_ND, _, weights_TK, used_TK = case(37, 3, 33, torch.float32, torch.device("cpu"))
    used_N = used_TK.flatten()
    inverse_N = torch.where(used_N, used_N.cumsum(0) - 1, used_N.sum() + (~used_N).cumsum(0) - 1).int()
    few = combine(o_ND[: int(used_N.sum())], inverse_N, weights_TK, used_TK)
    torch.testing.assert_close(few, combine(o_ND, inverse_N, weights_TK, used_TK), atol=0, rtol=0)
    assert combine(o_ND[:0], inverse_N, weights_TK, torch.zeros_like(used_TK)).eq(0).all()
