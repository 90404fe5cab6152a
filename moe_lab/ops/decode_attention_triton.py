"""The Triton kernels of `decode_attention`."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEYS = 128  # of a piece


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
    H, H_KV, N, d, q_row, k_row, v_row, cache_row, eps, clip,
    NORM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr)
    i = tl.arange(0, BLOCK_D)[None, :]
    if tl.program_id(1) == 0:
        h = tl.arange(0, BLOCK_H)[:, None]
        q = _turned(q_ptr + b * q_row, q_norm_ptr, cos_ptr, sin_ptr, H, d, eps, clip, NORM, BLOCK_H, BLOCK_D)
        tl.store(y_ptr + b * H * d + h * d + i, q.to(y_ptr.dtype.element_ty), mask=(h < H) & (i < d))
    else:
        kv = tl.arange(0, BLOCK_KV)[:, None]  # not h: a name has one shape in both branches
        inside = (kv < H_KV) & (i < d)
        offset = b * cache_row + kv.to(tl.int64) * N * d + position * d + i
        if tl.program_id(1) == 1:
            k = _turned(k_ptr + b * k_row, k_norm_ptr, cos_ptr, sin_ptr, H_KV, d, eps, clip, NORM, BLOCK_KV, BLOCK_D)
            tl.store(k_cache_ptr + offset, k.to(k_cache_ptr.dtype.element_ty), mask=inside)
        else:
            v = tl.load(v_ptr + b * v_row + kv * d + i, mask=inside, other=0.0).to(tl.float32)
            tl.store(v_cache_ptr + offset, _clamped(v, clip).to(v_cache_ptr.dtype.element_ty), mask=inside)


def launch_append(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, clip: float,
    cos: Tensor, sin: Tensor, position: Tensor, k_cache: Tensor, v_cache: Tensor, turn_first: bool,
) -> Tensor:  # fmt: skip
    """Run the kernel; arguments and result as `rope_append`."""
    B, H_KV, N, d = k_cache.shape
    H = q.shape[1] // d
    q, k, v = (part if part.stride(1) == 1 else part.contiguous() for part in (q, k, v))
    y = q.new_empty(B, H, d)
    norm = 0 if q_norm is None else 1 if q_norm.shape[0] == d and H > 1 else 2
    norm = 3 if turn_first and norm else norm
    block_h, block_kv = triton.next_power_of_2(H), triton.next_power_of_2(H_KV)
    _append_kernel[(B, 3)](
        q, k, v, q if q_norm is None else q_norm, k if k_norm is None else k_norm, cos, sin, position, y, k_cache,
        v_cache, H, H_KV, N, d, q.stride(0), k.stride(0), v.stride(0), k_cache.stride(0), eps, clip,
        NORM=norm, BLOCK_H=block_h, BLOCK_KV=block_kv, BLOCK_D=triton.next_power_of_2(d), num_warps=8,
    )  # fmt: skip
    return y


@triton.jit
def _finish(sinks_ptr, y_ptr, acc, total, best, query, head, inside, i, d, SINKS: tl.constexpr):
    """Sums over keys [n, BLOCK_D] of n query heads, as shares of the whole, to y."""
    if SINKS:
        sink = tl.load(sinks_ptr + head, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(best, sink)
        kept = tl.exp(best - largest)
        acc, total = acc * kept[:, None], total * kept + tl.exp(sink - largest)
    y = (acc / total[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + query[:, None] * d + i[None, :], y, mask=inside[:, None] & (i[None, :] < d))


@triton.jit
def _join(
    sinks_ptr, acc_ptr, max_ptr, sum_ptr, y_ptr, query, head, d, n_pieces, first_piece, last_piece,
    SINKS: tl.constexpr, G: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The pieces of G query heads put together, in their order: the result does not depend on who was last."""
    j = tl.arange(0, BLOCK_J)
    i = tl.arange(0, BLOCK_D)
    best = tl.full((BLOCK_J,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_J,), tl.float32)
    acc = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    for start in range(first_piece, last_piece + 1, BLOCK_P):
        piece = start + tl.arange(0, BLOCK_P)
        at = (query + j[None, :]) * n_pieces + piece[:, None]
        inside = (piece[:, None] <= last_piece) & (j[None, :] < G)
        # .cg: from L2, where the other programs' results are
        of_piece = tl.load(max_ptr + at, mask=inside, other=float("-inf"), cache_modifier=".cg")
        largest = tl.maximum(best, tl.max(of_piece, axis=0))
        known = tl.where(largest == float("-inf"), 0.0, largest)  # of heads beyond G
        share, kept = tl.exp(of_piece - known[None, :]), tl.exp(best - known)
        where = at[:, :, None] * d + i[None, None, :]
        part = tl.load(
            acc_ptr + where, mask=inside[:, :, None] & (i[None, None, :] < d), other=0.0, cache_modifier=".cg"
        )
        acc = acc * kept[:, None] + tl.sum(part * share[:, :, None], axis=0)
        total = total * kept + tl.sum(
            tl.load(sum_ptr + at, mask=inside, other=0.0, cache_modifier=".cg") * share, axis=0
        )
        best = largest
    _finish(sinks_ptr, y_ptr, acc, total, best, query + j, head + j, j < G, i, d, SINKS)


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, position_ptr, sinks_ptr, acc_ptr, max_ptr, sum_ptr, arrived_ptr, y_ptr,
    H_KV, N, d, window, cache_row, scale, n_pieces,
    SINKS: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, KEYS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A piece of the keys of one key head, for the G query heads that share it; who is last joins the pieces."""
    pair, piece = tl.program_id(0), tl.program_id(1)
    b, kv = (pair // H_KV).to(tl.int64), pair % H_KV
    position = tl.load(position_ptr)
    first = tl.maximum(position - window + 1, 0)
    first_piece, last_piece = first // KEYS, position // KEYS
    if (piece < first_piece) | (piece > last_piece):
        return
    g = tl.arange(0, BLOCK_G)
    i = tl.arange(0, BLOCK_D)
    query = pair.to(tl.int64) * G + g
    of_heads = (g[:, None] < G) & (i[None, :] < d)
    q = tl.load(q_ptr + query[:, None] * d + i[None, :], mask=of_heads, other=0.0)
    best = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    offset = b * cache_row + kv.to(tl.int64) * N * d
    for block in range(0, KEYS, BLOCK_N):
        n = piece * KEYS + block + tl.arange(0, BLOCK_N)
        seen = (n <= position) & (n >= first)
        where = offset + n[:, None].to(tl.int64) * d + i[None, :]
        inside = seen[:, None] & (i[None, :] < d)
        k = tl.load(k_ptr + where, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        known = tl.where(new_best == float("-inf"), 0.0, new_best)  # nothing seen yet
        p = tl.exp(scores - known[:, None])
        kept = tl.exp(best - known)
        v = tl.load(v_ptr + where, mask=inside, other=0.0)
        acc = acc * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * kept + tl.sum(p, axis=1)
        best = new_best
    if first_piece != last_piece:
        out = query * n_pieces + piece
        tl.store(max_ptr + out, best, mask=g < G)
        tl.store(sum_ptr + out, total, mask=g < G)
        tl.store(acc_ptr + out[:, None] * d + i[None, :], acc, mask=of_heads)
        tl.debug_barrier()  # the atomic operation is one thread's: it publishes what all have stored
        before = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel", scope="gpu")
        if before == last_piece - first_piece:
            tl.debug_barrier()
            tl.store(arrived_ptr + pair, 0)  # for the next call
            _join(
                sinks_ptr, acc_ptr, max_ptr, sum_ptr, y_ptr, pair.to(tl.int64) * G, kv * G, d, n_pieces, first_piece,
                last_piece, SINKS, G, BLOCK_J, BLOCK_P, BLOCK_D,
            )  # fmt: skip
    else:
        _finish(sinks_ptr, y_ptr, acc, total, best, query, kv * G + g, g < G, i, d, SINKS)


@cache
def _arrived(device: torch.device, n: int) -> Tensor:
    """How many pieces of each pair of sequence and key head are done; 0 between calls, of which one runs at a time."""
    return torch.zeros(n, dtype=torch.int32, device=device)


def launch_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, window: int, scale: float, sinks: Tensor | None
) -> Tensor:
    """Run the kernel; arguments and result as `cached_attention`."""
    (B, H, d), (_, H_KV, N, _) = q.shape, k_cache.shape
    G, n_pieces = H // H_KV, triton.cdiv(N, _KEYS)
    q = q.contiguous()
    acc = torch.empty((B * H, n_pieces, d), dtype=torch.float32, device=q.device)
    best = torch.empty((B * H, n_pieces), dtype=torch.float32, device=q.device)
    total, y = torch.empty_like(best), torch.empty_like(q)
    block_d = max(triton.next_power_of_2(d), 16)
    block_n = max(16, min(64, 32768 // (block_d * q.element_size())))  # shared memory holds no more
    block_j = triton.next_power_of_2(G)
    block_p = min(max(16384 // (block_j * block_d), 1), triton.next_power_of_2(n_pieces), 64)  # registers hold no more
    _attention_kernel[(B * H_KV, n_pieces)](
        q, k_cache, v_cache, position, q if sinks is None else sinks, acc, best, total,
        _arrived(q.device, triton.next_power_of_2(B * H_KV)), y, H_KV, N, d, window, k_cache.stride(0), scale, n_pieces,
        SINKS=sinks is not None, G=G, BLOCK_G=max(block_j, 16), BLOCK_J=block_j, BLOCK_P=block_p, BLOCK_D=block_d,
        KEYS=_KEYS, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return y
