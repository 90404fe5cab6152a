"""segment_mm: every implementation against the reference and float64, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lab.errors import UnavailableError
from moe_lab.ops import segment_mm as module
from moe_lab.ops.segment_mm import implementation_for, reference, segment_mm

AMD, INTEL = module._TRANSPOSED["AuthenticAMD"], module._TRANSPOSED["GenuineIntel"]
TWELVE_SEGMENTS = [3, 0, 17, 1, 0, 64, 2, 7, 6, 33, 0, 66]

KERNELS = pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        pytest.param("loop", torch.float32, id="loop-fp32"),
        pytest.param("loop", torch.float16, id="loop-fp16"),
        pytest.param("loop", torch.bfloat16, id="loop-bf16"),
        pytest.param("triton", torch.float32, id="triton-fp32"),
        pytest.param("triton", torch.float16, id="triton-fp16"),
        pytest.param("grouped_mm", torch.bfloat16, id="grouped_mm-bf16", marks=pytest.mark.gpu),
    ],
)

SEGMENTS = pytest.mark.parametrize(
    "counts",
    [
        pytest.param([37], id="E=1"),
        pytest.param([1], id="one row"),
        pytest.param([1, 2, AMD.padded - 1, INTEL.least, 3, INTEL.most, INTEL.most + 1], id="thresholds of the loop"),
        pytest.param([0, 3, 1, 4, 2], id="first empty"),
        pytest.param([3, 1, 0, 4, 0], id="middle and last empty"),
        pytest.param([0, 0, 37, 0, 0], id="all rows in one segment"),
        pytest.param(TWELVE_SEGMENTS, id="E=12, 199 rows"),
        pytest.param([0, 0, 0, 0, 0], id="N=0"),
    ],
)


def operands(
    counts: list[int], D: int, F: int, dtype: torch.dtype, device: torch.device, tail: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and offsets for segments of `counts` rows, then `tail` rows of no segment."""
    generator = torch.Generator().manual_seed(len(counts) + sum(counts))
    x_ND = torch.randn(sum(counts) + tail, D, generator=generator)
    w_EFD = torch.randn(len(counts), F, D, generator=generator)
    offsets_E1 = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    return x_ND.to(device, dtype), w_EFD.to(device, dtype), offsets_E1.to(device)


def widths(implementation: str) -> tuple[int, int]:
    """(D, F), odd where the implementation allows it."""
    return (40, 72) if implementation == "grouped_mm" else (37, 65)


def assert_is_the_product(y_NF: Tensor, x_ND: Tensor, w_EFD: Tensor, offsets_E1: Tensor) -> None:
    """The rows of the segments are x @ w.T in float64, up to one rounding and fp32 accumulation."""
    used = int(offsets_E1[-1])
    expert_N = torch.repeat_interleave(torch.arange(len(w_EFD), device=x_ND.device), offsets_E1.diff().long())
    expected_NF = torch.einsum("nd,nfd->nf", x_ND[:used].double(), w_EFD.double()[expert_N])
    tolerance = 1e-5 if x_ND.dtype == torch.float32 else torch.finfo(x_ND.dtype).eps
    assert y_NF.dtype == x_ND.dtype and y_NF.shape == (x_ND.shape[0], w_EFD.shape[1])
    torch.testing.assert_close(y_NF[:used].double(), expected_NF, rtol=tolerance, atol=tolerance)


@KERNELS
@SEGMENTS
def test_every_implementation_is_the_product_of_each_segment(
    implementation: str, dtype: torch.dtype, counts: list[int], device: torch.device
) -> None:
    """Each row is multiplied by its own segment's matrix, whichever segments are empty."""
    inputs = operands(counts, *widths(implementation), dtype, device)
    assert_is_the_product(segment_mm(*inputs, implementation), *inputs)


@SEGMENTS
@pytest.mark.parametrize("tail", [pytest.param(0, id="all used"), pytest.param(19, id="some unused")])
@pytest.mark.parametrize("processor", [pytest.param(AMD, id="amd"), pytest.param(INTEL, id="intel")])
def test_the_loop_is_the_product_of_large_matrices(
    counts: list[int], tail: int, processor: module._Transposed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which it multiplies in another way: transposed, with rows of other segments beside."""
    monkeypatch.setattr(module, "_SMALL", 37 * 65 - 1)
    monkeypatch.setattr(module, "_transposed", lambda: replace(processor, small=37 * 65 - 1))
    inputs = operands(counts, 37, 65, torch.float32, torch.device("cpu"), tail)
    assert_is_the_product(segment_mm(*inputs, "loop"), *inputs)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param("vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n", AMD, id="amd"),
        pytest.param("vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R)\n", INTEL, id="intel"),
        pytest.param("CPU implementer\t: 0x41\n", None, id="arm"),
        pytest.param(None, INTEL, id="no such file"),
    ],
)
def test_the_processor_chooses_the_product(
    names: str | None, expected: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the vendor in /proc/cpuinfo, elsewhere by what Python calls the processor."""
    if names is not None:
        (tmp_path / "cpuinfo").write_text(names)
    monkeypatch.setattr(module, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(module.platform, "processor", lambda: "Intel64 Family 6 Model 143, GenuineIntel")
    assert module._transposed.__wrapped__() is expected


@pytest.mark.thinned(1, empty=("N=0",))
@KERNELS
@SEGMENTS
def test_every_implementation_agrees_with_the_reference(
    implementation: str, dtype: torch.dtype, counts: list[int], device: torch.device
) -> None:
    """The plain loop over segments and the kernel differ by the rounding of the dtype at most."""
    inputs = operands(counts, *widths(implementation), dtype, device)
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(
        segment_mm(*inputs, implementation), reference(*inputs), rtol=tolerance, atol=2 * tolerance
    )


@KERNELS
@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([3, 0, 7, 1, 2], id="some rows used"),
        pytest.param([0, 0, 0], id="no row used"),
        pytest.param([15, 17, 0], id="ends inside a tile"),
    ],
)
def test_rows_of_no_segment_disturb_no_other_row(
    implementation: str, dtype: torch.dtype, counts: list[int], device: torch.device
) -> None:
    """NaN rows after the last offset leave the rows before it finite and right."""
    x_ND, w_EFD, offsets_E1 = operands(counts, *widths(implementation), dtype, device, tail=19)
    x_ND[sum(counts) :] = float("nan")
    assert_is_the_product(segment_mm(x_ND, w_EFD, offsets_E1, implementation), x_ND, w_EFD, offsets_E1)


@KERNELS
def test_the_matrices_of_empty_segments_are_not_used(
    implementation: str, dtype: torch.dtype, device: torch.device
) -> None:
    """NaN in the weights of segments without rows never reaches a result."""
    counts = [0, 5, 0, 1, 0]
    x_ND, w_EFD, offsets_E1 = operands(counts, *widths(implementation), dtype, device)
    w_EFD[[0, 2, 4]] = float("nan")
    assert segment_mm(x_ND, w_EFD, offsets_E1, implementation).isfinite().all()


@KERNELS
@pytest.mark.parametrize(
    "rows", [pytest.param(1, id="1 row"), pytest.param(3, id="3 rows"), pytest.param(INTEL.least, id="7 rows")]
)
def test_sums_are_accumulated_in_fp32(implementation: str, dtype: torch.dtype, rows: int, device: torch.device) -> None:
    """4000 ones sum to 4000, which an fp16 or bf16 accumulator cannot reach."""
    x_ND, w_EFD = torch.ones(rows, 4000, dtype=dtype, device=device), torch.ones(2, 8, 4000, dtype=dtype, device=device)
    offsets_E1 = torch.tensor([0, 0, rows], dtype=torch.int32, device=device)
    expected_NF = torch.full((rows, 8), 4000.0, device=device).to(dtype)
    torch.testing.assert_close(segment_mm(x_ND, w_EFD, offsets_E1, implementation), expected_NF, rtol=0, atol=0)


@KERNELS
def test_the_operands_keep_their_values(implementation: str, dtype: torch.dtype, device: torch.device) -> None:
    """Nothing is written into x, w or the offsets, and the result shares no memory with them."""
    inputs = operands([2, 0, 9], *widths(implementation), dtype, device, tail=3)
    before = [tensor.clone() for tensor in inputs]
    y_NF = segment_mm(*inputs, implementation)
    torch.testing.assert_close(list(inputs), before, rtol=0, atol=0)
    assert y_NF.untyped_storage().data_ptr() not in {tensor.untyped_storage().data_ptr() for tensor in inputs}


@pytest.mark.parametrize("F", [pytest.param(1, id="F=1"), pytest.param(129, id="F=129")])
@pytest.mark.parametrize("D", [pytest.param(1, id="D=1"), pytest.param(65, id="D=65")])
@pytest.mark.parametrize("implementation", [pytest.param("loop", id="loop"), pytest.param("triton", id="triton")])
def test_odd_widths_need_no_padding(implementation: str, D: int, F: int, device: torch.device) -> None:
    """Widths that divide no tile give the product too."""
    inputs = operands([1, 0, 18, 5, 7], D, F, torch.float32, device)
    assert_is_the_product(segment_mm(*inputs, implementation), *inputs)


@settings(max_examples=30, deadline=None, database=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    tail=st.integers(0, 3),
    D=st.integers(1, 9),
    F=st.integers(1, 9),
)
def test_the_loop_is_the_product_for_any_segments(counts: list[int], tail: int, D: int, F: int) -> None:
    """Any counts, any widths, any number of rows of no segment."""
    inputs = operands(counts, D, F, torch.float32, torch.device("cpu"), tail)
    assert_is_the_product(segment_mm(*inputs, "loop"), *inputs)


def test_the_reference_is_zero_outside_the_segments() -> None:
    """Rows after the last offset are 0 in the reference."""
    inputs = operands([2, 0, 3], 7, 5, torch.float32, torch.device("cpu"), tail=4)
    y_NF = reference(*inputs)
    assert_is_the_product(y_NF, *inputs)
    assert not y_NF[5:].any()


@pytest.mark.parametrize(
    "counts", [pytest.param([0, 3, 0, 7, 1], id="E=5"), pytest.param([0, 0], id="N=0"), pytest.param([9], id="E=1")]
)
def test_the_op_passes_opcheck(counts: list[int]) -> None:
    """Schema, fake tensors and tracing agree with what the op does."""
    arguments = (*operands(counts, 7, 5, torch.float32, torch.device("cpu")), "loop")
    results = torch.library.opcheck(torch.ops.moe_lab.segment_mm.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@KERNELS
def test_fake_tensors_have_the_real_shape(implementation: str, dtype: torch.dtype) -> None:
    """Under FakeTensorMode the result is [N, F] of x's dtype, and nothing is computed."""
    with FakeTensorMode():
        x_ND, w_EFD = torch.empty(37, 8, dtype=dtype), torch.empty(5, 65, 8, dtype=dtype)
        y_NF = segment_mm(x_ND, w_EFD, torch.empty(6, dtype=torch.int32), implementation)
    assert y_NF.shape == (37, 65) and y_NF.dtype == dtype and y_NF.is_contiguous()


@KERNELS
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "offsets"),
    [
        pytest.param((8,), (2, 8, 8), [0, 1, 1], id="x of one dimension"),
        pytest.param((1, 3, 8), (2, 8, 8), [0, 3, 3], id="x of three dimensions"),
        pytest.param((3, 8), (8, 8), [0, 3], id="w of two dimensions"),
        pytest.param((3, 8), (2, 8, 16), [0, 1, 3], id="widths differ"),
        pytest.param((3, 8), (2, 8, 8), [0, 3], id="an offset too few"),
        pytest.param((3, 8), (2, 8, 8), [0, 1, 2, 3], id="an offset too many"),
        pytest.param((3, 8), (2, 8, 8), [[0, 1, 3]], id="offsets of two dimensions"),
    ],
)
def test_shapes_that_do_not_fit_are_value_errors(
    implementation: str,
    dtype: torch.dtype,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    offsets: list[int],
    device: torch.device,
) -> None:
    """Every implementation refuses the same shapes, by name."""
    x_ND, w_EFD = torch.ones(x_shape, dtype=dtype, device=device), torch.ones(w_shape, dtype=dtype, device=device)
    with pytest.raises(ValueError, match="segment_mm"):
        segment_mm(x_ND, w_EFD, torch.tensor(offsets, dtype=torch.int32, device=device), implementation)


@pytest.mark.parametrize(
    ("w_dtype", "offsets_dtype"),
    [
        pytest.param(torch.float16, torch.int32, id="w of another dtype"),
        pytest.param(torch.float32, torch.int64, id="int64 offsets"),
        pytest.param(torch.float32, torch.float32, id="float offsets"),
    ],
)
def test_dtypes_that_do_not_fit_are_value_errors(w_dtype: torch.dtype, offsets_dtype: torch.dtype) -> None:
    """x and w share a dtype, offsets are int32; a fake call refuses the same."""
    with pytest.raises(ValueError, match="segment_mm"):
        segment_mm(torch.ones(3, 8), torch.ones(2, 8, 8, dtype=w_dtype), torch.ones(3).to(offsets_dtype), "loop")
    with FakeTensorMode(), pytest.raises(ValueError, match="segment_mm"):
        segment_mm(torch.ones(3, 8), torch.ones(2, 8, 8, dtype=w_dtype), torch.ones(3).to(offsets_dtype), "loop")


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "expected"),
    [
        pytest.param("cpu", torch.float32, (0, 0), "loop", id="cpu-fp32"),
        pytest.param("cpu", torch.bfloat16, (0, 0), "loop", id="cpu-bf16"),
        pytest.param("cuda", torch.bfloat16, (9, 0), "grouped_mm", id="sm_90-bf16"),
        pytest.param("cuda", torch.bfloat16, (8, 0), "grouped_mm", id="sm_80-bf16"),
        pytest.param("cuda", torch.bfloat16, (7, 5), "triton", id="sm_75-bf16"),
        pytest.param("cuda", torch.float16, (9, 0), "triton", id="sm_90-fp16"),
        pytest.param("cuda", torch.float32, (9, 0), "triton", id="sm_90-fp32"),
    ],
)
def test_the_implementation_follows_device_and_dtype(
    device: str, dtype: torch.dtype, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU loops; CUDA takes grouped_mm for bf16 from sm_80 on where rows are 16 bytes whole, else Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert implementation_for(torch.device(device), dtype, 64, 24) == expected
    odd = "triton" if expected == "grouped_mm" else expected
    assert implementation_for(torch.device(device), dtype, 64, 37) == odd
    assert implementation_for(torch.device(device), dtype, 65, 24) == odd


def test_cuda_without_triton_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """No silent fallback: fp32 on CUDA names the package that is missing."""
    monkeypatch.setattr(module, "resolve_implementation", lambda asked, device, *, op: "torch")
    with pytest.raises(UnavailableError, match="triton"):
        implementation_for(torch.device("cuda"), torch.float32, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.bfloat16, id="bf16"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.float32, id="fp32"),
    ],
)
@pytest.mark.parametrize(("D", "F"), [pytest.param(40, 72, id="multiples of 8"), pytest.param(37, 65, id="odd widths")])
def test_what_is_chosen_on_cuda_computes_any_width(dtype: torch.dtype, D: int, F: int, device: torch.device) -> None:
    """The implementation chosen for a device and dtype is right for aligned and odd widths alike."""
    inputs = operands(TWELVE_SEGMENTS, D, F, dtype, device, tail=5)
    assert_is_the_product(segment_mm(*inputs, implementation_for(device, dtype, D, F)), *inputs)
