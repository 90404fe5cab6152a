"""What is around DeepGEMM's products: the gather into padded rows, SwiGLU, and the sum of the slots, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_lab.ops.dispatch import dispatch

ALIGNMENT = 128  # of the rows of an expert, for DeepGEMM on Hopper


@triton.jit
def _gather_kernel(
    x_ptr, ids_ptr, counts_ptr, offsets_ptr, inverse_ptr, out_ptr, layout_ptr, row_ptr, N, K, E, D,
    ENDS: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One slot: find and note its row, and copy the token there. The first programs note the ends of the experts."""
    slot = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    padded_E = (tl.load(counts_ptr + e, mask=e < E, other=0) + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    if ENDS:
        if slot < E:
            begin = tl.sum(tl.where(e < slot, padded_E, 0), axis=0)
            tl.store(layout_ptr + slot, begin + tl.load(counts_ptr + slot))
        if slot >= N:
            return
    expert = tl.load(ids_ptr + slot)
    if expert < 0:
        tl.store(row_ptr + slot, -1)
        return
    begin = tl.sum(tl.where(e < expert, padded_E, 0), axis=0)
    row = begin + tl.load(inverse_ptr + slot) - tl.load(offsets_ptr + expert)
    tl.store(row_ptr + slot, row)
    if not ENDS:
        tl.store(layout_ptr + row, expert)
    token = slot // K
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + token.to(tl.int64) * D + d, mask=d < D, other=0.0)
        tl.store(out_ptr + row.to(tl.int64) * D + d, x, mask=d < D)


@triton.jit
def _swiglu_kernel(u_ptr, row_ptr, h_ptr, F, BLOCK_F: tl.constexpr):
    row = tl.load(row_ptr + tl.program_id(0)).to(tl.int64)
    if row < 0:
        return
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    gate = tl.load(u_ptr + row * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(u_ptr + row * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    h = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(h_ptr + row * F + f, h.to(h_ptr.dtype.element_ty), mask=f < F)


@triton.jit
def _combine_kernel(o_ptr, row_ptr, weights_ptr, y_ptr, K, D, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(row_ptr + token * K + k, mask=k < K, other=-1)
    used = row >= 0
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    o = tl.load(o_ptr + at, mask=used[:, None] & (d[None, :] < D), other=0.0).to(tl.float32)
    weight = tl.load(weights_ptr + token * K + k, mask=used, other=0.0)
    y = tl.sum(o * weight[:, None], axis=0)
    tl.store(y_ptr + token.to(tl.int64) * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


def gather(x_TD: Tensor, ids_TK: Tensor, E: int, *, ends: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [M, D], whose rows they are, the row of each slot or -1 [T * K]).

    M is the most rows that may be needed. Whose they are is told by the end of each expert's rows [E] with `ends`, else
    by the expert of each row, -1 for none [M].
    """
    (T, K), D = ids_TK.shape, x_TD.shape[1]
    N = T * K
    M = (N + min(E, N) * (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
    order = dispatch(ids_TK, E)
    layout = ids_TK.new_empty(E) if ends else ids_TK.new_full((M,), -1)
    x_MD, row_N = x_TD.new_empty(M, D), ids_TK.new_empty(N)
    _gather_kernel[(max(N, E) if ends else N,)](
        x_TD, ids_TK, order.counts_E, order.offsets_E1, order.inverse_N, x_MD, layout, row_N, N, K, E, D, ENDS=ends,
        ALIGNMENT=ALIGNMENT, BLOCK_E=triton.next_power_of_2(E), BLOCK_D=1024,
    )  # fmt: skip
    return x_MD, layout, row_N


def swiglu(u_MG: Tensor, row_N: Tensor) -> Tensor:
    """silu(gate) * up of the rows that are used, [M, F]; the others are left as they are in memory."""
    M, F = len(u_MG), u_MG.shape[1] // 2
    h_MF = u_MG.new_empty(M, F)
    _swiglu_kernel[(len(row_N), triton.cdiv(F, 1024))](u_MG, row_N, h_MF, F, BLOCK_F=1024)
    return h_MF


def combine(o_MD: Tensor, row_N: Tensor, weights_TK: Tensor) -> Tensor:
    """The weighted sum of each token's slots, in fp32."""
    (T, K), D = weights_TK.shape, o_MD.shape[1]
    y_TD, block_k = o_MD.new_empty(T, D), triton.next_power_of_2(K)
    block_d = max(64, 4096 // block_k)
    _combine_kernel[(T, triton.cdiv(D, block_d))](o_MD, row_N, weights_TK, y_TD, K, D, BLOCK_K=block_k, BLOCK_D=block_d)
    return y_TD
