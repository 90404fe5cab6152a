"""The Triton kernels of `decode_attention`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_lab.ops.dependent_launch import begin, is_dependent

_KEYS = 128  # of a piece; half as many where few pieces then leave multiprocessors without one
_FEW = 264  # pieces: two for each multiprocessor of an H200


@triton.jit
def _clamped(x, clip):
    """NaN stays NaN, as in torch.clamp."""
    return tl.minimum(tl.maximum(x, -clip, tl.PropagateNan.ALL), clip, tl.PropagateNan.ALL)


@triton.jit
def _turned(
    x_ptr, norm_ptr, cos_ptr, sin_ptr, heads, d, eps, clip,
    NORM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of heads * d values, normed, clamped and turned: [BLOCK_H, BLOCK_D] fp32.

    NORM: 0 none, 1 of each head, 2 of all, 3 of each head after it was turned.
    """
    h = tl.arange(0, BLOCK_H)[:, None]
    i = tl.arange(0, BLOCK_D)[None, :]
    partner = (i + d // 2) % d  # with which dimension i is turned
    inside = (h < heads) & (i < d)
    x = tl.load(x_ptr + h * d + i, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + h * d + partner, mask=inside, other=0.0).to(tl.float32)
    if NORM == 2:
        scale = 1.0 / tl.sqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / (heads * d) + eps)
        x *= scale * tl.load(norm_ptr + h * d + i, mask=inside, other=0.0).to(tl.float32)
        other *= scale * tl.load(norm_ptr + h * d + partner, mask=inside, other=0.0).to(tl.float32)
    x, other = _clamped(x, clip), _clamped(other, clip)
    if NORM == 1:
        scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / d + eps)[:, None]
        x *= scale * tl.load(norm_ptr + i, mask=i < d, other=0.0).to(tl.float32)
        other *= scale * tl.load(norm_ptr + partner, mask=i < d, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + i, mask=i < d, other=0.0)
    sin = tl.load(sin_ptr + i, mask=i < d, other=0.0)
    y = x * cos + tl.where(i < d // 2, -other, other) * sin
    if NORM == 3:
        weight = tl.load(norm_ptr + i, mask=i < d, other=0.0).to(tl.float32)
        y *= weight / tl.sqrt(tl.sum(y * y, axis=1) / d + eps)[:, None]
    return y


@triton.jit
def _append_kernel(
    q_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, position_ptr, y_ptr, k_cache_ptr, v_cache_ptr,
    S, H, H_KV, N, d, q_row, k_row, v_row, cache_row, eps, clip,
    NORM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_D: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    b, s = row // S, row % S
    position = tl.load(position_ptr + s)
    cos_ptr += s * d
    sin_ptr += s * d
    i = tl.arange(0, BLOCK_D)[None, :]
    if tl.program_id(1) == 0:
        h = tl.arange(0, BLOCK_H)[:, None]
        q = _turned(q_ptr + row * q_row, q_norm_ptr, cos_ptr, sin_ptr, H, d, eps, clip, NORM, BLOCK_H, BLOCK_D)
        tl.store(y_ptr + row * H * d + h * d + i, q.to(y_ptr.dtype.element_ty), mask=(h < H) & (i < d))
    else:
        kv = tl.arange(0, BLOCK_KV)[:, None]  # not h: a name has one shape in both branches
        inside = (kv < H_KV) & (i < d)
        offset = b * cache_row + kv.to(tl.int64) * N * d + position * d + i
        if tl.program_id(1) == 1:
            k = _turned(k_ptr + row * k_row, k_norm_ptr, cos_ptr, sin_ptr, H_KV, d, eps, clip, NORM, BLOCK_KV, BLOCK_D)
            tl.store(k_cache_ptr + offset, k.to(k_cache_ptr.dtype.element_ty), mask=inside)
        else:
            v = tl.load(v_ptr + row * v_row + kv * d + i, mask=inside, other=0.0).to(tl.float32)
            tl.store(v_cache_ptr + offset, _clamped(v, clip).to(v_cache_ptr.dtype.element_ty), mask=inside)


def launch_append(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, clip: float,
    cos: Tensor, sin: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor, turn_first: bool,
) -> Tensor:  # fmt: skip
    """Run the kernel; arguments and result as `rope_append`."""
    _, H_KV, N, d = k_cache.shape
    R, H = q.shape[0], q.shape[1] // d
    q, k, v = (part if part.stride(1) == 1 else part.contiguous() for part in (q, k, v))
    y = q.new_empty(R, H, d)
    norm = 0 if q_norm is None else 1 if q_norm.shape[0] == d and H > 1 else 2
    norm = 3 if turn_first and norm else norm
    block_h, block_kv = triton.next_power_of_2(H), triton.next_power_of_2(H_KV)
    dependent = is_dependent(q.device)
    _append_kernel[(R, 3)](
        q, k, v, q if q_norm is None else q_norm, k if k_norm is None else k_norm, cos, sin, position, y, k_cache,
        v_cache, len(position), H, H_KV, N, d, q.stride(0), k.stride(0), v.stride(0), k_cache.stride(0), eps, clip,
        NORM=norm, BLOCK_H=block_h, BLOCK_KV=block_kv, BLOCK_D=triton.next_power_of_2(d), DEPENDENT=dependent,
        num_warps=8, launch_pdl=dependent,
    )  # fmt: skip
    return y


@triton.jit
def _piece_kernel(
    q_ptr, k_ptr, v_ptr, position_ptr, acc_ptr, max_ptr, sum_ptr, H_KV, N, d, window, cache_row, scale, n_pieces,
    S: tl.constexpr, G: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A piece of the keys of one key head, for the G query heads that share it, of each of S new tokens."""
    begin(DEPENDENT)
    pair, piece = tl.program_id(0), tl.program_id(1)
    b, kv = (pair // H_KV).to(tl.int64), pair % H_KV
    r = tl.arange(0, BLOCK_R)  # token by token
    i = tl.arange(0, BLOCK_D)
    position = tl.load(position_ptr + r // G, mask=r < S * G, other=-1)
    last = tl.load(position_ptr + S - 1)
    first = tl.maximum(tl.load(position_ptr) - window + 1, 0)
    query = (b * S + r // G) * (H_KV * G) + kv * G + r % G
    of_rows = (r[:, None] < S * G) & (i[None, :] < d)
    q = tl.load(q_ptr + query[:, None] * d + i[None, :], mask=of_rows, other=0.0)
    best = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    start = piece * KEYS
    if (start <= last) & (start + KEYS > first):
        offset = b * cache_row + kv.to(tl.int64) * N * d
        for block in range(0, KEYS, BLOCK_N):
            n = start + block + tl.arange(0, BLOCK_N)
            where = offset + n[:, None].to(tl.int64) * d + i[None, :]
            inside = ((n <= last) & (n >= first))[:, None] & (i[None, :] < d)
            k = tl.load(k_ptr + where, mask=inside, other=0.0)
            v = tl.load(v_ptr + where, mask=inside, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            seen = (n[None, :] <= position[:, None]) & (n[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, axis=1))
            known = tl.where(new_best == float("-inf"), 0.0, new_best)  # nothing seen yet
            p = tl.exp(scores - known[:, None])
            kept = tl.exp(best - known)
            acc = acc * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            total = total * kept + tl.sum(p, axis=1)
            best = new_best
    out = query * n_pieces + piece
    tl.store(max_ptr + out, best, mask=r < S * G)
    tl.store(sum_ptr + out, total, mask=r < S * G)
    tl.store(acc_ptr + out[:, None] * d + i[None, :], acc, mask=of_rows)


@triton.jit
def _join_kernel(
    acc_ptr, max_ptr, sum_ptr, sinks_ptr, y_ptr, H, d, n_pieces,
    SINKS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The pieces of one query head, put together."""
    begin(DEPENDENT)
    query = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    i = tl.arange(0, BLOCK_D)
    best = tl.load(max_ptr + query * n_pieces + p, mask=p < n_pieces, other=float("-inf"))
    total = tl.load(sum_ptr + query * n_pieces + p, mask=p < n_pieces, other=0.0)
    largest = tl.max(best, axis=0)
    if SINKS:
        sink = tl.load(sinks_ptr + query % H).to(tl.float32)
        largest = tl.maximum(largest, sink)
    share = tl.exp(best - largest)
    inside = (p[:, None] < n_pieces) & (i[None, :] < d)
    acc = tl.load(acc_ptr + (query * n_pieces + p[:, None]) * d + i[None, :], mask=inside, other=0.0)
    whole = tl.sum(total * share, axis=0)
    if SINKS:
        whole += tl.exp(sink - largest)
    y = tl.sum(acc * share[:, None], axis=0) / whole
    tl.store(y_ptr + query * d + i, y.to(y_ptr.dtype.element_ty), mask=i < d)


def launch_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, window: int, scale: float, sinks: Tensor | None
) -> Tensor:
    """Run the kernels; arguments and result as `cached_attention`."""
    (R, H, d), (_, H_KV, N, _), S = q.shape, k_cache.shape, len(position)
    G, pairs = H // H_KV, R // S * H_KV
    keys = _KEYS // 2 if pairs * triton.cdiv(N, _KEYS // 2) <= _FEW else _KEYS
    n_pieces = triton.cdiv(N, keys)
    q = q.contiguous()
    acc = torch.empty((R * H, n_pieces, d), dtype=torch.float32, device=q.device)
    best = torch.empty((R * H, n_pieces), dtype=torch.float32, device=q.device)
    total = torch.empty_like(best)
    block_d = max(triton.next_power_of_2(d), 16)
    dependent = is_dependent(q.device)
    block_n = max(16, min(64, 32768 // (block_d * q.element_size())))  # shared memory holds no more
    _piece_kernel[(pairs, n_pieces)](
        q, k_cache, v_cache, position, acc, best, total, H_KV, N, d, window, k_cache.stride(0), scale, n_pieces,
        S=S, G=G, BLOCK_R=max(triton.next_power_of_2(S * G), 16), BLOCK_D=block_d, KEYS=keys,
        BLOCK_N=block_n, DEPENDENT=dependent, num_warps=4, launch_pdl=dependent,
    )  # fmt: skip
    y = torch.empty_like(q)
    _join_kernel[(R * H,)](
        acc, best, total, q if sinks is None else sinks, y, H, d, n_pieces, SINKS=sinks is not None,
        BLOCK_P=triton.next_power_of_2(n_pieces), BLOCK_D=block_d, DEPENDENT=dependent, num_warps=4,
        launch_pdl=dependent,
    )  # fmt: skip
    return y
