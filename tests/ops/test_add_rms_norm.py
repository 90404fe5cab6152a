"""add_rms_norm: the op, its Triton kernel, what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lab.ops import add_rms_norm as module
from moe_lab.ops.add_rms_norm import add_rms_norm, reference

EPS = 1e-6

IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", [pytest.param("torch", id="torch"), pytest.param("triton", id="triton")]
)

SHAPES = pytest.mark.parametrize(
    "shape",
    [
        pytest.param((37, 1), id="width 1"),
        pytest.param((5, 7), id="width 7"),
        pytest.param((3, 37), id="width 37"),
        pytest.param((2, 129), id="width 129"),
        pytest.param((1, 513), id="width 513"),
        pytest.param((4, 1000), id="width 1000"),
        pytest.param((37,), id="1-D"),
        pytest.param((2, 3, 37), id="3-D"),
        pytest.param((0, 37), id="no rows"),
        pytest.param((2, 0, 7), id="3-D without rows"),
        pytest.param((3, 0), id="no columns"),
    ],
)


def operands(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, residual and weight, seeded."""
    generator = torch.Generator().manual_seed(sum(shape) + 1)
    return [
        torch.randn(size, generator=generator).to(device=device, dtype=dtype) for size in (shape, shape, shape[-1:])
    ]


def formula(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The documented formula in float64, after the one rounding of the sum."""
    total = x + residual
    wide = total.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double(), total


def assert_follows_the_formula(results: tuple[Tensor, Tensor], inputs: list[Tensor], eps: float = EPS) -> None:
    """The sum is bitwise that of torch, the normed rows agree within the rounding of their dtype."""
    normed, total = formula(*inputs, eps)
    dtype = inputs[0].dtype
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert results[0].dtype == results[1].dtype == dtype
    torch.testing.assert_close(results[1], total, rtol=0, atol=0)
    torch.testing.assert_close(results[0].double(), normed, rtol=tolerance, atol=tolerance)


@IMPLEMENTATIONS
@SHAPES
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
    ],
)
def test_every_implementation_follows_the_float64_formula(
    implementation: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Both results are those of the formula, for every width and number of rows."""
    inputs = operands(shape, device, dtype)
    assert_follows_the_formula(add_rms_norm(*inputs, EPS, implementation), inputs)


@SHAPES
def test_the_triton_kernel_agrees_with_the_reference(shape: tuple[int, ...], device: torch.device) -> None:
    """Kernel and reference differ by less than 1e-5 in fp32."""
    inputs = operands(shape, device)
    torch.testing.assert_close(
        add_rms_norm(*inputs, EPS, "triton"), reference(*inputs, EPS), rtol=1e-5, atol=1e-5, equal_nan=True
    )


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:37, :5].t(), id="transposed"),
        pytest.param(lambda x: x[:5, ::3], id="every third column"),
        pytest.param(lambda x: x[1:40:4, :37], id="every fourth row, cut"),
        pytest.param(lambda x: x[:1, :37].expand(5, 37), id="expanded over rows"),
        pytest.param(lambda x: x[:5, :1].expand(5, 37), id="expanded over columns"),
        pytest.param(lambda x: x[:6, :35].view(2, 3, 35).permute(1, 0, 2), id="3-D, rows permuted"),
        pytest.param(lambda x: x[:6, :35].unflatten(1, (5, 7)).permute(2, 0, 1), id="3-D, columns permuted"),
        pytest.param(lambda x: x[:37, 3:4], id="one column of many"),
        pytest.param(lambda x: x[:37, 0], id="1-D with a stride"),
    ],
)
def test_strides_of_the_inputs_change_nothing(
    implementation: str, view: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    """A view gives what its contiguous copy gives, whichever of the inputs it is."""
    wide_x, wide_residual, _ = operands((41, 111), device)
    x, residual = view(wide_x), view(wide_residual)
    weight = wide_x[7, : 2 * x.shape[-1] : 2]
    expected = add_rms_norm(x.contiguous(), residual.contiguous(), weight.contiguous(), EPS, implementation)
    for arguments in [(x, residual, weight), (x, residual.contiguous(), weight), (x.contiguous(), residual, weight)]:
        results = add_rms_norm(*arguments, EPS, implementation)
        torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-6)
        assert all(result.is_contiguous() for result in results)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "weight_dtype",
    [pytest.param(torch.float16, id="fp16"), pytest.param(torch.float64, id="fp64")],
)
def test_the_weight_may_have_another_dtype(
    implementation: str, weight_dtype: torch.dtype, device: torch.device
) -> None:
    """The results stay in x's dtype and use the weight's own values."""
    x, residual, weight = operands((5, 37), device)
    inputs = [x, residual, weight.to(weight_dtype)]
    assert_follows_the_formula(add_rms_norm(*inputs, EPS, implementation), inputs)


@IMPLEMENTATIONS
def test_results_are_contiguous_and_share_no_memory(implementation: str, device: torch.device) -> None:
    """Neither result aliases an input or the other result, and the inputs keep their values."""
    inputs = operands((5, 37), device)
    before = [value.clone() for value in inputs]
    results = add_rms_norm(*inputs, EPS, implementation)
    assert all(result.is_contiguous() for result in results)
    pointers = [tensor.untyped_storage().data_ptr() for tensor in (*inputs, *results)]
    assert len(set(pointers)) == len(pointers)
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)


@IMPLEMENTATIONS
def test_a_row_of_zeros_stays_zero(implementation: str, device: torch.device) -> None:
    """eps stands under the root: where x cancels the residual, the result is 0 and not NaN."""
    x, _, weight = operands((3, 7), device)
    normed, total = add_rms_norm(x, -x, weight, EPS, implementation)
    assert not normed.any() and not total.any()


@IMPLEMENTATIONS
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rows_do_not_touch_each_other(implementation: str, device: torch.device) -> None:
    """NaN and infinities in a row leave every other row bitwise as it was."""
    x, residual, weight = operands((5, 37), device)
    clean = add_rms_norm(x, residual, weight, EPS, implementation)
    x[1, 3], x[3, 36] = float("nan"), float("inf")
    dirty = add_rms_norm(x, residual, weight, EPS, implementation)
    for with_bad_rows, without in zip(dirty, clean, strict=True):
        torch.testing.assert_close(with_bad_rows[[0, 2, 4]], without[[0, 2, 4]], rtol=0, atol=0)
    assert dirty[0][1].isnan().all() and not dirty[1].isfinite().all(-1)[[1, 3]].any()


@settings(max_examples=15, deadline=None, database=None)
@given(rows=st.integers(1, 5), width=st.integers(1, 70), power=st.integers(-8, 8))
def test_without_eps_the_scale_of_a_row_cancels(rows: int, width: int, power: int) -> None:
    """Scaling x and residual by a power of two scales the sum by it and leaves the normed rows."""
    x, residual, weight = operands((rows, width), torch.device("cpu"))
    normed, total = add_rms_norm(x, residual, weight, 0.0)
    scaled_normed, scaled_total = add_rms_norm(x * 2.0**power, residual * 2.0**power, weight, 0.0)
    torch.testing.assert_close(scaled_total, total * 2.0**power, rtol=0, atol=0)
    torch.testing.assert_close(scaled_normed, normed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [pytest.param((5, 7), id="2-D"), pytest.param((2, 3, 37), id="3-D"), pytest.param((0, 7), id="no rows")]
)
def test_the_op_passes_opcheck(shape: tuple[int, ...]) -> None:
    """Schema, fake tensors and tracing agree with what the op does."""
    arguments = (*operands(shape, torch.device("cpu")), EPS, "torch")
    results = torch.library.opcheck(torch.ops.moe_lab.add_rms_norm.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@IMPLEMENTATIONS
def test_fake_tensors_have_the_real_shapes(implementation: str) -> None:
    """Under FakeTensorMode the results have x's shape and dtype and are contiguous, whatever x's strides."""
    with FakeTensorMode():
        x = torch.empty(7, 5, 3, dtype=torch.float16).permute(2, 1, 0)
        results = add_rms_norm(x, x, torch.empty(7), EPS, implementation)
    assert [(r.shape, r.dtype, r.is_contiguous()) for r in results] == [((3, 5, 7), torch.float16, True)] * 2


def test_a_fake_call_refuses_what_the_real_one_refuses() -> None:
    """A wrong shape is found while tracing too."""
    with FakeTensorMode(), pytest.raises(ValueError, match="weight"):
        add_rms_norm(torch.empty(3, 7), torch.empty(3, 7), torch.empty(6), EPS)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("x", "residual", "weight"),
    [
        pytest.param(torch.ones(3, 7), torch.ones(1, 7), torch.ones(7), id="residual would broadcast"),
        pytest.param(torch.ones(3, 7), torch.ones(7, 3), torch.ones(7), id="residual transposed"),
        pytest.param(torch.ones(3, 7), torch.ones(3, 7).half(), torch.ones(7), id="residual of another dtype"),
        pytest.param(torch.ones(3, 7), torch.ones(3, 7), torch.ones(1), id="weight would broadcast"),
        pytest.param(torch.ones(3, 7), torch.ones(3, 7), torch.ones(1, 7), id="weight of two dimensions"),
        pytest.param(torch.ones(3, 7), torch.ones(3, 7), torch.tensor(1.0), id="weight of no dimension"),
        pytest.param(torch.ones(()), torch.ones(()), torch.ones(()), id="x of no dimension"),
        pytest.param(torch.ones(3, 7).int(), torch.ones(3, 7).int(), torch.ones(7), id="integer x"),
        pytest.param(torch.ones(3, 7).double(), torch.ones(3, 7).double(), torch.ones(7), id="fp64 x"),
        pytest.param(torch.ones(3, 7), torch.ones(3, 7), torch.ones(7).int(), id="integer weight"),
    ],
)
def test_what_does_not_fit_is_a_value_error(
    implementation: str, x: Tensor, residual: Tensor, weight: Tensor, device: torch.device
) -> None:
    """Shapes and dtypes outside the documented ones are refused by name, not computed or broadcast."""
    with pytest.raises(ValueError, match="add_rms_norm"):
        add_rms_norm(x.to(device), residual.to(device), weight.to(device), EPS, implementation)


def test_the_default_implementation_is_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without naming one, the op computes by `reference`."""
    calls = []
    monkeypatch.setattr(module, "reference", lambda *arguments: calls.append(arguments) or reference(*arguments))
    inputs = operands((3, 7), torch.device("cpu"))
    assert_follows_the_formula(add_rms_norm(*inputs, EPS), inputs)
    assert len(calls) == 1
