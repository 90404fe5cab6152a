"""The Triton kernel of `add_rms_norm`: one program per row, the row held in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_lab.ops.dependent_launch import begin, is_dependent


@triton.jit
def _kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, total_ptr, x_stride, residual_stride, D, eps,
    BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
    # Round the sum as if it had been stored: the next layer reads it in that dtype.
    total = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    tl.store(total_ptr + row * D + column, total, mask=inside)
    wide = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / D + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * D + column, (wide * scale * weight).to(x.dtype), mask=inside)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """[..., D] as rows with unit stride in D, and their stride: a view where the strides allow, else a copy."""
    if x.is_contiguous():
        return x, x.shape[-1]
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    return flat, flat.stride(0)


def launch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Run the kernel on the device of `x`; arguments and results as `add_rms_norm`."""
    width = x.shape[-1]
    normed, total = x.new_empty(x.shape), x.new_empty(x.shape)
    if x.numel() == 0:
        return normed, total
    x_RD, x_stride = _rows(x)
    residual_RD, residual_stride = _rows(residual)
    block = triton.next_power_of_2(width)
    warps, dependent = min(max(block // 512, 1), 16), is_dependent(x.device)
    _kernel[(x.numel() // width,)](
        x_RD, residual_RD, weight.contiguous(), normed, total, x_stride, residual_stride, width, eps,
        BLOCK=block, DEPENDENT=dependent, num_warps=warps, launch_pdl=dependent,
    )  # fmt: skip
    return normed, total
