"""The Triton kernel of `gemv`: a program sums some elements of y over all of K.

A program asks for its part of the weights at once, so that the memory has enough to do, and before it waits for the
kernel that computes x.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_lab.ops.dependent_launch import begin, is_dependent

_TILE = 1 << 13  # weights that a program asks for at once: 128 bytes of each of its threads
_WARPS = 4


@triton.jit
def _kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, N, K,
    BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w_at = w_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    w = tl.load(w_at, mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)
    begin(DEPENDENT)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0)
    y = tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
    for start in range(BLOCK_K, K, BLOCK_K):
        w = tl.load(w_at + start, mask=(n[:, None] < N) & (k[None, :] + start < K), other=0.0)
        x = tl.load(x_ptr + start + k, mask=k + start < K, other=0.0)
        y += tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, tile: int = _TILE, warps: int = _WARPS) -> Tensor:
    """Run the kernel; arguments and result as `gemv`."""
    N, K = weight.shape
    y = x.new_empty(1, N)
    block_k = min(triton.next_power_of_2(K), 4096)
    block_n = max(tile // block_k, 1)
    dependent = is_dependent(x.device)
    _kernel[(triton.cdiv(N, block_n),)](
        x, weight, x if bias is None else bias, y, N, K, BIAS=bias is not None, BLOCK_N=block_n, BLOCK_K=block_k,
        DEPENDENT=dependent, num_warps=warps, launch_pdl=dependent,
    )  # fmt: skip
    return y
