"""ops/rotate.py: queries and keys turned in one launch, as each is alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.ops.rotate import rotate, rotate_both
from tests.ops.cases import DEVICE, DTYPES, normal
from tests.ops.compiling import assert_compiles


def assert_turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """In float64, rounded once; the heads of a token lie together."""
    for x, y in zip((q, k), rotate_both(q, k, cos, sin, "triton"), strict=True):
        half = x.shape[3] // 2
        other = torch.cat((-x[..., half:], x[..., :half]), dim=3).double()
        want = x.double() * cos.double() + other * sin.double()
        eps = torch.finfo(x.dtype).eps
        torch.testing.assert_close(
            y.double(), want, rtol=eps, atol=2e-7 * float(want.abs().max()) if want.numel() else 0
        )
        assert y.dtype == x.dtype and y.transpose(1, 2).is_contiguous()


@pytest.mark.thinned(2, empty=("no token", "no sequence"))
@DTYPES
@pytest.mark.parametrize(
    ("B", "H", "H_KV", "S", "d"),
    [
        pytest.param(1, 4, 4, 1, 6, id="one token"),
        pytest.param(2, 4, 1, 37, 8, id="one key head"),
        pytest.param(3, 3, 2, 5, 10, id="odd"),
        pytest.param(1, 16, 2, 3, 128, id="d=128"),
        pytest.param(2, 2, 2, 0, 8, id="no token"),
        pytest.param(0, 2, 2, 5, 8, id="no sequence"),
    ],
)
def test_both_are_turned(B: int, H: int, H_KV: int, S: int, d: int, dtype: torch.dtype) -> None:
    """Tables without a pattern: the two halves of a row of them are read each for itself."""
    q, k = normal(B, H, S, d, dtype=dtype), normal(B, H_KV, S, d, dtype=dtype)
    assert_turned(q, k, normal(S, d), normal(S, d).flip(0))


def test_any_strides_are_read() -> None:
    """Views of one projection, as attention has them; heads first; and a last dimension that is not dense."""
    qkv = normal(2, 7, 40)
    q, k, _ = (part.unflatten(2, (-1, 8)).transpose(1, 2) for part in qkv.split([24, 8, 8], dim=2))
    assert_turned(q, k, normal(7, 8), normal(7, 8).flip(0))
    assert_turned(normal(8, 7, 3, 2).permute(3, 2, 1, 0), k, normal(7, 8), normal(7, 8).flip(0))


def test_heads_that_lie_far_apart_are_read() -> None:
    """More than 2**31 elements from the first to the last, as of a long sequence whose heads come first."""
    apart = 2**30 + 8
    room = torch.empty(2**31 + 2 * apart + 4, dtype=torch.int8, device=DEVICE)  # most of it is never touched
    q = room.as_strided((1, 3, 1, 4), (12, apart, 12, 1), 2**31)
    q.copy_(torch.arange(12, device=DEVICE).view(1, 3, 1, 4))
    one = torch.ones(1, 4, device=DEVICE)
    y, _ = rotate_both(q, q[:, :1].contiguous(), one, torch.zeros_like(one), "triton")
    assert torch.equal(y, q)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_any_sizes(B: int, H: int, H_KV: int, S: int, half: int) -> None:
    assert_turned(normal(B, H, S, 2 * half), normal(B, H_KV, S, 2 * half), normal(S, 2 * half), normal(S, 2 * half))


def test_by_torch_it_is_rotate_twice() -> None:
    q, k, tables = normal(2, 3, 5, 8), normal(2, 1, 5, 8), (normal(5, 8), normal(5, 8))
    for x, y in zip((q, k), rotate_both(q, k, *tables), strict=True):
        assert torch.equal(y, rotate(x, *tables))


def test_the_op_passes_opcheck() -> None:
    arguments = (normal(2, 3, 5, 8), normal(2, 1, 5, 8), normal(5, 8), normal(5, 8))
    results = torch.library.opcheck(torch.ops.moe_lab.rotate_both.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def launches() -> None:
    """Every dtype and a size that is not a power of two."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.empty(2, 5, 3, 20, dtype=dtype)
        rotate_both(x, x[:, :1], torch.empty(3, 20), torch.empty(3, 20), "triton")


@pytest.mark.slow
def test_the_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    assert_compiles(launches, tmp_path)
