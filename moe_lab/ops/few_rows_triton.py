"""The Triton kernel of `few_rows`: a program sums some columns of y over all of K.

A program asks for its part of the weights at once, so that the memory has enough to do, and before it waits for the
kernel that computes x (programmatic dependent launch): the weights do not depend on it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_lab.ops.library import triton_interprets

_TILE = 1 << 14  # weights that a program asks for at once: 64 bytes of each of its threads


@triton.jit
def _kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, T, N, K, x_row,
    BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    t = tl.arange(0, ROWS)
    w_at = w_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    w = tl.load(w_at, mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    y = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if start > 0:
            w = tl.load(w_at + start, mask=(n[:, None] < N) & (k[None, :] + start < K), other=0.0)
        wide = w.to(tl.float32)
        for row in tl.static_range(ROWS):
            x_at = x_ptr + tl.minimum(row, T - 1) * x_row + start + k
            x = tl.load(x_at, mask=k + start < K, other=0.0).to(tl.float32)
            y += tl.where(t[:, None] == row, tl.sum(wide * x[None, :], axis=1)[None, :], 0.0)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + t[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=(t[:, None] < T) & (n[None, :] < N)
    )


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, block_n: int | None = None, warps: int = 4, dependent: bool = True
) -> Tensor:
    """Run the kernel; arguments and result as `few_rows`."""
    (T, K), N = x.shape, weight.shape[0]
    y = x.new_empty(T, N)
    if y.numel() == 0:
        return y
    block_k = min(triton.next_power_of_2(K), 4096)
    block_n = block_n or max(_TILE // block_k, 1)
    dependent = dependent and not triton_interprets() and torch.cuda.get_device_capability(x.device) >= (9, 0)
    _kernel[(triton.cdiv(N, block_n),)](
        x, weight, x if bias is None else bias, y, T, N, K, x.stride(0), BIAS=bias is not None,
        ROWS=triton.next_power_of_2(T), BLOCK_N=block_n, BLOCK_K=block_k, DEPENDENT=dependent,
        num_warps=warps, launch_pdl=dependent,
    )  # fmt: skip
    return y
