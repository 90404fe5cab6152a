"""The Triton kernels of `few_tokens_mlp`: up, and down with the sum over a token's slots.

A program belongs to a slot and a piece of the width; of the slots with one expert the first does the work for all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_lab.ops.dependent_launch import begin, is_dependent


@triton.jit
def _is_first(ids_ptr, slot, expert, BLOCK_N: tl.constexpr):
    """Whether no slot before this one has the expert."""
    n = tl.arange(0, BLOCK_N)
    before = tl.load(ids_ptr + n, mask=n < slot, other=-1)
    return tl.sum((before == expert).to(tl.int32), axis=0) == 0


@triton.jit
def _own_slot(ids_ptr, expert, T, K, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """For each token which of its slots has the expert, -1 if none."""
    t = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + t[:, None] * K + k[None, :], mask=(t[:, None] < T) & (k[None, :] < K), other=-1)
    return tl.max(tl.where(ids == expert, k[None, :], -1), axis=1)


@triton.jit
def _up_kernel(
    x_ptr, ids_ptr, weights_ptr, w_ptr, bias_ptr, h_ptr, arrived_ptr, T, K, D, F, n_arrived, alpha, limit,
    SCALES: tl.constexpr, BIAS: tl.constexpr, CLAMPED: tl.constexpr, GELU: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    begin(DEPENDENT)
    slot = tl.program_id(0)
    if (slot == 0) & (tl.program_id(1) == 0):
        for start in range(0, n_arrived, 128):
            n = start + tl.arange(0, 128)
            tl.store(arrived_ptr + n, tl.zeros((128,), tl.int32), mask=n < n_arrived)
    expert = tl.load(ids_ptr + slot)
    if expert < 0:
        return
    if not _is_first(ids_ptr, slot, expert, BLOCK_N):
        return
    own = _own_slot(ids_ptr, expert, T, K, ROWS, BLOCK_K)
    t = tl.arange(0, ROWS)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    d = tl.arange(0, BLOCK_D)
    gate_at = w_ptr + expert.to(tl.int64) * 2 * F * D + f[None, :].to(tl.int64) * D + d[:, None]
    gate = tl.zeros((ROWS, BLOCK_F), tl.float32)
    up = tl.zeros((ROWS, BLOCK_F), tl.float32)
    if SCALES:
        weight = tl.load(weights_ptr + t * K + own, mask=own >= 0, other=0.0)
    for start in range(0, D, BLOCK_D):
        inside = (f[None, :] < F) & (d[:, None] + start < D)
        x = tl.load(
            x_ptr + t[:, None] * D + d[None, :] + start, mask=(own[:, None] >= 0) & (d[None, :] + start < D), other=0.0
        )
        if SCALES:
            x = (x.to(tl.float32) * weight[:, None]).to(x.dtype)
        gate += tl.dot(x, tl.load(gate_at + start, mask=inside, other=0.0), input_precision="ieee")
        up += tl.dot(
            x, tl.load(gate_at + tl.cast(F, tl.int64) * D + start, mask=inside, other=0.0), input_precision="ieee"
        )
    if BIAS:
        bias_at = bias_ptr + expert.to(tl.int64) * 2 * F + f
        gate += tl.load(bias_at, mask=f < F, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_at + F, mask=f < F, other=0.0).to(tl.float32)[None, :]
    gate, up = gate.to(h_ptr.dtype.element_ty).to(tl.float32), up.to(h_ptr.dtype.element_ty).to(tl.float32)
    if CLAMPED:
        gate = tl.minimum(gate, limit, tl.PropagateNan.ALL)
        up = tl.minimum(tl.maximum(up, -limit, tl.PropagateNan.ALL), limit, tl.PropagateNan.ALL)
        h = gate / (1.0 + tl.exp(-alpha * gate)) * (up + 1.0)
    elif GELU:  # g (1 + tanh(z)) / 2 = g sigmoid(2 z)
        h = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))) * up
    else:
        h = gate / (1.0 + tl.exp(-gate)) * up
    where = h_ptr + (t * K + own)[:, None] * F + f[None, :]
    tl.store(where, h.to(h_ptr.dtype.element_ty), mask=(own[:, None] >= 0) & (f[None, :] < F))


@triton.jit
def _down_kernel(
    h_ptr, ids_ptr, weights_ptr, w_ptr, bias_ptr, o_ptr, y_ptr, arrived_ptr, T, K, D, F,
    SCALES: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    begin(DEPENDENT)
    slot = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    expert = tl.load(ids_ptr + slot)
    works = expert >= 0
    if works:
        works = _is_first(ids_ptr, slot, expert, BLOCK_N)
    if works:
        t = tl.arange(0, ROWS)
        f = tl.arange(0, BLOCK_F)
        own = _own_slot(ids_ptr, expert, T, K, ROWS, BLOCK_K)
        w_at = w_ptr + expert.to(tl.int64) * D * F + d[None, :].to(tl.int64) * F + f[:, None]
        o = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for start in range(0, F, BLOCK_F):
            h = tl.load(
                h_ptr + (t * K + own)[:, None] * F + f[None, :] + start,
                mask=(own[:, None] >= 0) & (f[None, :] + start < F), other=0.0,
            )  # fmt: skip
            w = tl.load(w_at + start, mask=(d[None, :] < D) & (f[:, None] + start < F), other=0.0)
            o += tl.dot(h, w, input_precision="ieee")
        if BIAS:
            o += tl.load(bias_ptr + expert.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        where = o_ptr + (t * K + own)[:, None] * D + d[None, :]
        tl.store(where, o.to(o_ptr.dtype.element_ty), mask=(own[:, None] >= 0) & (d[None, :] < D))
    # The last program of these columns adds up the slots: what it reads all have written before they arrived.
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + tl.program_id(1), 1, sem="acq_rel") == T * K - 1:
        _add_slots(o_ptr, ids_ptr, weights_ptr, y_ptr, d, T, K, D, SCALES, ROWS, BLOCK_D)


@triton.jit
def _add_slots(
    o_ptr, ids_ptr, weights_ptr, y_ptr, d, T, K, D, SCALES: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The columns d of y."""
    AT_ONCE: tl.constexpr = 4  # loads under way
    t = tl.arange(0, ROWS)
    y = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in range(0, K, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            k = tl.zeros_like(t) + (first + i)
            used = tl.load(ids_ptr + t * K + k, mask=(t < T) & (k < K), other=-1) >= 0
            at = o_ptr + (t * K + k)[:, None] * D + d[None, :]
            # Not from the L1 cache, which does not see what others write.
            o = tl.load(at, mask=used[:, None] & (d[None, :] < D), other=0.0, cache_modifier=".cg").to(tl.float32)
            if not SCALES:
                o *= tl.load(weights_ptr + t * K + k, mask=used, other=0.0)[:, None]
            y += o
    where = y_ptr + t[:, None] * D + d[None, :]
    tl.store(where, y.to(y_ptr.dtype.element_ty), mask=(t[:, None] < T) & (d[None, :] < D))


def launch(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, scales_input: bool,
    up_bias: Tensor | None, down_bias: Tensor | None, alpha: float, limit: float, gelu: bool,
) -> Tensor:  # fmt: skip
    """Run the kernels; arguments and result as `few_tokens_mlp`."""
    (T, D), K, F = x.shape, ids.shape[1], w_down.shape[2]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if T == 0 or K == 0:
        return y.zero_()
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    h, o = x.new_empty(T * K, F), x.new_empty(T * K, D)
    wide = x.dtype == torch.float32
    depth, width = 64 if wide else 128, 32
    columns = triton.cdiv(D, width)
    arrived = ids.new_empty(columns)  # programs of `down` for each block of columns; `up` writes zeros
    rows = max(16, triton.next_power_of_2(T))  # a matrix unit takes no fewer
    blocks = {"ROWS": rows, "BLOCK_N": triton.next_power_of_2(T * K), "BLOCK_K": triton.next_power_of_2(K)}
    dependent = is_dependent(x.device)
    how = {"SCALES": scales_input, "DEPENDENT": dependent, "launch_pdl": dependent, "num_warps": 4, "num_stages": 3}
    _up_kernel[(T * K, triton.cdiv(F, width))](
        x, ids, weights, w_gate_up, w_gate_up if up_bias is None else up_bias, h, arrived, T, K, D, F, columns,
        alpha, limit, BIAS=up_bias is not None, CLAMPED=limit > 0, GELU=gelu, **blocks, BLOCK_F=width, BLOCK_D=depth,
        **how,
    )  # fmt: skip
    _down_kernel[(T * K, columns)](
        h, ids, weights, w_down, w_down if down_bias is None else down_bias, o, y, arrived, T, K, D, F,
        BIAS=down_bias is not None, **blocks, BLOCK_F=depth, BLOCK_D=width, **how,
    )  # fmt: skip
    return y
