"""rms_norm: the same whoever computes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from moe_lab.ops import rms_norm as module
from moe_lab.ops.rms_norm import rms_norm


def assert_is_the_norm(x: Tensor, weight_D: Tensor, eps: float) -> None:
    wide = x.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D.double()
    tolerance = 4 * torch.finfo(x.dtype).eps  # of the norm, and of the product with the weight
    y = rms_norm(x, weight_D, eps)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), want, rtol=max(tolerance, 1e-6), atol=max(tolerance, 1e-6))


@settings(max_examples=40, deadline=None, database=None)
@given(
    shape=st.lists(st.integers(1, 5), max_size=2),
    width=st.integers(1, 300),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_it_is_the_formula(shape: list[int], width: int, eps: float, dtype: torch.dtype) -> None:
    assert_is_the_norm(torch.randn(*shape, width, dtype=dtype), torch.rand(width).to(dtype) + 0.5, eps)


@pytest.mark.parametrize(
    "shape",
    [pytest.param((3, 0), id="no columns"), pytest.param((0, 7), id="no rows"), pytest.param((1, 9001), id="wide")],
)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    assert_is_the_norm(torch.randn(shape), torch.rand(shape[-1]), 1e-5)


def test_views_and_operands_are_left_alone() -> None:
    whole, weight_D = torch.randn(4, 3, 14), torch.rand(7)
    before, x = whole.clone(), whole.transpose(0, 1)[..., ::2]
    assert_is_the_norm(x, weight_D, 1e-5)
    assert torch.equal(whole, before)


def test_few_passes_are_for_eager_fp32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled pass fuses torch's own norm."""
    x, weight_D = torch.randn(2, 7), torch.rand(7)
    with FakeTensorMode():
        assert rms_norm(torch.empty(2, 7), torch.empty(7), 1e-5).shape == (2, 7)
    y = rms_norm(x, weight_D, 1e-5)
    with FlopCounterMode(display=False):
        assert torch.equal(rms_norm(x, weight_D, 1e-5), y)  # who looks on changes no bit
    monkeypatch.setattr(module, "_by_few_passes", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rms_norm(x, weight_D, 1e-5)
    half = x.bfloat16(), weight_D.bfloat16()
    assert torch.equal(rms_norm(*half, 1e-5), F.rms_norm(half[0], (7,), half[1], 1e-5))
    compiled = torch.compile(lambda x: rms_norm(x, weight_D, 1e-5), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), F.rms_norm(x, (7,), weight_D, 1e-5))
