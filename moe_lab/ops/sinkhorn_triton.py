"""Triton's kernels of `sinkhorn_route`: one launch where one program can have all rows, else one for each iteration.

Programs cannot wait for each other in a way that every device grants, so between launches the columns stand in memory:
of each program its rows' largest entry of a column, and the sum relative to it, which no size of logits can overflow.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _log_kernel(logits_ptr, row, r, e, T, E, temperature):
    """Logits of rows r, [R, E], and log K; a column without an expert is -inf."""
    inside = (r[:, None] < T) & (e[None, :] < E)
    x = tl.load(logits_ptr + r.to(tl.int64)[:, None] * row + e[None, :], mask=inside, other=0.0).to(tl.float32)
    x = tl.where(e[None, :] < E, x, float("-inf"))
    log_k = tl.maximum(x - tl.max(x, axis=1)[:, None], -1e30) / temperature
    return x, tl.where(e[None, :] < E, log_k, float("-inf"))


@triton.jit
def _sum_columns(
    logits_ptr, row, first, last, T, E, temperature, log_b, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Each column's largest log P over the rows [first, last), and the sum of P relative to that."""
    e = tl.arange(0, BLOCK_E)
    largest = tl.full((BLOCK_E,), -3e38, tl.float32)
    total = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        _, log_p = _log_kernel(logits_ptr, row, r, e, T, E, temperature)
        log_p += log_b[None, :]
        top = tl.max(log_p, axis=1)[:, None]
        log_p -= top + tl.log(tl.sum(tl.exp(log_p - top), axis=1))[:, None]
        log_p = tl.where((r < last)[:, None], log_p, float("-inf"))
        now = tl.maximum(largest, tl.max(log_p, axis=0))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(log_p - now[None, :]), axis=0)
        largest = now
    return largest, total


@triton.jit
def _scale(log_b, largest, total, log_share, E, tolerance, BLOCK_E: tl.constexpr):
    """The columns' scale after one iteration, unless all were near enough."""
    inside = tl.arange(0, BLOCK_E) < E
    step = tl.where(inside, log_share - (largest + tl.log(tl.where(inside, total, 1.0))), 0.0)
    is_near = tl.max(tl.abs(tl.exp(-step) - 1), axis=0) <= tolerance
    return log_b + tl.where(is_near & (tolerance > 0), 0.0, step)


@triton.jit
def _choose(
    logits_ptr, row, first, last, T, E, K, temperature, log_b, ids_ptr, weights_ptr,
    SCALED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        x, ranked = _log_kernel(logits_ptr, row, r, e, T, E, temperature)
        if SCALED:
            ranked += log_b[None, :]
        else:
            ranked = x
        ranked = tl.where(ranked != ranked, float("inf"), ranked)  # NaN ranks first, as in a sort
        is_left = (e < E)[None, :] & (r >= 0)[:, None]
        ids = tl.zeros((BLOCK_R, BLOCK_K), tl.int32)
        logits = tl.full((BLOCK_R, BLOCK_K), float("-inf"), tl.float32)
        for place in range(K):
            best = tl.max(tl.where(is_left, ranked, float("-inf")), axis=1)[:, None]
            chosen = tl.min(tl.where(is_left & (ranked == best), e[None, :], BLOCK_E), axis=1)[:, None]
            is_left = is_left & (e[None, :] != chosen)
            logit = tl.sum(tl.where(e[None, :] == chosen, x, 0.0), axis=1)[:, None]
            ids = tl.where(k[None, :] == place, chosen, ids)
            logits = tl.where(k[None, :] == place, logit, logits)
        weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        weights = weights / tl.sum(weights, axis=1)[:, None]
        offset = r.to(tl.int64)[:, None] * K + k[None, :]
        inside = (r < last)[:, None] & (k < K)[None, :]
        tl.store(ids_ptr + offset, ids, mask=inside)
        tl.store(weights_ptr + offset, weights, mask=inside)


@triton.jit
def _alone_kernel(
    logits_ptr, row, log_b_ptr, ids_ptr, weights_ptr, T, E, K, iters, temperature, tolerance, log_share,
    SCALED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    log_b = tl.zeros((BLOCK_E,), tl.float32)
    if SCALED:
        for _ in range(iters):
            largest, total = _sum_columns(logits_ptr, row, 0, T, T, E, temperature, log_b, BLOCK_R, BLOCK_E)
            log_b = _scale(log_b, largest, total, log_share, E, tolerance, BLOCK_E)
    e = tl.arange(0, BLOCK_E)
    tl.store(log_b_ptr + e, log_b, mask=e < E)
    _choose(
        logits_ptr, row, 0, T, T, E, K, temperature, log_b, ids_ptr, weights_ptr, SCALED, BLOCK_R, BLOCK_E, BLOCK_K
    )  # fmt: skip


@triton.jit
def _step_kernel(
    logits_ptr, row, log_b_ptr, next_log_b_ptr, columns_ptr, next_columns_ptr, ids_ptr, weights_ptr,
    T, E, K, rows, temperature, tolerance, log_share,
    FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Ends the iteration before this launch and does the rows' part of the next, or chooses."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    e = tl.arange(0, BLOCK_E)
    log_b = tl.zeros((BLOCK_E,), tl.float32)
    if not FIRST:
        log_b = tl.load(log_b_ptr + e, mask=e < E, other=0.0)
        largest = tl.full((BLOCK_E,), -3e38, tl.float32)
        total = tl.zeros((BLOCK_E,), tl.float32)
        for start in range(0, programs, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            at = columns_ptr + p[:, None] * (2 * BLOCK_E) + e[None, :]
            its_largest = tl.load(at, mask=(p < programs)[:, None], other=-3e38)
            its_total = tl.load(at + BLOCK_E, mask=(p < programs)[:, None], other=0.0)
            now = tl.maximum(largest, tl.max(its_largest, axis=0))
            total = total * tl.exp(largest - now) + tl.sum(its_total * tl.exp(its_largest - now[None, :]), axis=0)
            largest = now
        log_b = _scale(log_b, largest, total, log_share, E, tolerance, BLOCK_E)
    if program == 0:
        tl.store(next_log_b_ptr + e, log_b, mask=e < E)
    first = program * rows
    last = tl.minimum(first + rows, T)
    if LAST:
        _choose(
            logits_ptr, row, first, last, T, E, K, temperature, log_b, ids_ptr, weights_ptr,
            True, BLOCK_R, BLOCK_E, BLOCK_K,
        )  # fmt: skip
    else:
        largest, total = _sum_columns(logits_ptr, row, first, last, T, E, temperature, log_b, BLOCK_R, BLOCK_E)
        at = next_columns_ptr + program * (2 * BLOCK_E) + e
        tl.store(at, largest)
        tl.store(at + BLOCK_E, total)


_ALONE = 16384  # logits of one program
_TILE = 2048  # logits at a time
_PROGRAMS = 264


def launch(
    logits_TE: Tensor, top_k: int, iters: int, temperature: float, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels; arguments and results as `sinkhorn_route`."""
    T, E = logits_TE.shape
    device = logits_TE.device
    ids_TK = torch.empty(T, top_k, dtype=torch.int32, device=device)
    weights_TK = torch.empty(T, top_k, dtype=torch.float32, device=device)
    if T == 0:
        return ids_TK, weights_TK, torch.zeros(E, dtype=torch.float32, device=device)
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    iters = iters if T > 1 else 0
    block_e = triton.next_power_of_2(E)
    blocks = {"BLOCK_E": block_e, "BLOCK_R": max(1, _TILE // block_e), "BLOCK_K": triton.next_power_of_2(top_k)}
    numbers = (float(temperature), float(tolerance), math.log(T / E))
    if iters == 0 or T * block_e <= _ALONE:
        log_b_E = torch.empty(E, dtype=torch.float32, device=device)
        _alone_kernel[(1,)](
            logits_TE, logits_TE.stride(0), log_b_E, ids_TK, weights_TK, T, E, top_k, iters, *numbers,
            SCALED=iters > 0, **blocks, num_warps=8,
        )  # fmt: skip
        return ids_TK, weights_TK, log_b_E
    rows = triton.cdiv(triton.cdiv(T, _PROGRAMS), blocks["BLOCK_R"]) * blocks["BLOCK_R"]
    programs = triton.cdiv(T, rows)
    log_b_2E = torch.empty(2, E, dtype=torch.float32, device=device)
    columns_2P2E = torch.empty(2, programs, 2, block_e, dtype=torch.float32, device=device)
    for i in range(iters + 1):
        _step_kernel[(programs,)](
            logits_TE, logits_TE.stride(0), log_b_2E[i % 2], log_b_2E[1 - i % 2], columns_2P2E[i % 2],
            columns_2P2E[1 - i % 2], ids_TK, weights_TK, T, E, top_k, rows, *numbers, FIRST=i == 0, LAST=i == iters,
            **blocks, BLOCK_P=max(1, _TILE // block_e), num_warps=4,
        )  # fmt: skip
    return ids_TK, weights_TK, log_b_2E[1 - iters % 2]
