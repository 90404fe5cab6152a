"""The Triton kernels of `latent_attention`: the pieces of a sequence's positions, and their sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_PIECES = 64
_PROGRAMS = 512  # that fill a GPU some times; each more writes sums of BLOCK_H x rank, which are read again
_COLUMNS = 128  # of the sum that a program adds up


@triton.jit
def _piece_kernel(
    q_ptr, latent_ptr, position_ptr, acc_ptr, max_ptr, sum_ptr, H, rank, rope, row_b, row_n, scale, n_pieces, keys,
    BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A piece of the positions of a sequence, for BLOCK_H of its heads."""
    piece, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    i, j = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    position = tl.load(position_ptr)
    query = b * H + h
    q_rows = q_ptr + query[:, None] * (rank + rope)
    q_c = tl.load(q_rows + i[None, :], mask=(h[:, None] < H) & (i[None, :] < rank), other=0.0)
    q_r = tl.load(q_rows + rank + j[None, :], mask=(h[:, None] < H) & (j[None, :] < rope), other=0.0)
    best = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    start = piece * keys
    for first in range(start, tl.minimum(start + keys, position + 1), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        seen = (n <= position) & (n < start + keys)
        rows = latent_ptr + b * row_b + n[:, None].to(tl.int64) * row_n
        c = tl.load(rows + i[None, :], mask=seen[:, None] & (i[None, :] < rank), other=0.0)
        r = tl.load(rows + rank + j[None, :], mask=seen[:, None] & (j[None, :] < rope), other=0.0)
        scores = tl.dot(q_c, tl.trans(c), input_precision="ieee")
        scores = tl.dot(q_r, tl.trans(r), scores, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))  # some position is seen, so it is finite
        p = tl.exp(scores - new_best[:, None])
        kept = tl.exp(best - new_best)
        acc = acc * kept[:, None] + tl.dot(p.to(c.dtype), c, input_precision="ieee")
        total = total * kept + tl.sum(p, axis=1)
        best = new_best
    out = query * n_pieces + piece
    tl.store(max_ptr + out, best, mask=h < H)
    tl.store(sum_ptr + out, total, mask=h < H)
    tl.store(acc_ptr + out[:, None] * rank + i[None, :], acc, mask=(h[:, None] < H) & (i[None, :] < rank))


@triton.jit
def _join_kernel(
    acc_ptr, max_ptr, sum_ptr, y_ptr, rank, n_pieces, BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Columns of the pieces of one head, put together."""
    query = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    p = tl.arange(0, BLOCK_P)
    best = tl.load(max_ptr + query * n_pieces + p, mask=p < n_pieces, other=float("-inf"))
    total = tl.load(sum_ptr + query * n_pieces + p, mask=p < n_pieces, other=0.0)
    share = tl.exp(best - tl.max(best, axis=0))  # of a piece without a position it is 0
    inside = (p[:, None] < n_pieces) & (i[None, :] < rank)
    acc = tl.load(acc_ptr + (query * n_pieces + p[:, None]) * rank + i[None, :], mask=inside, other=0.0)
    y = tl.sum(acc * share[:, None], axis=0) / tl.sum(total * share, axis=0)
    tl.store(y_ptr + query * rank + i, y.to(y_ptr.dtype.element_ty), mask=i < rank)


def keys_of_a_piece(n_blocks: int, n_positions: int, block_n: int) -> int:
    """How many positions a program takes, where `n_blocks` programs take each of them: so many blocks of `block_n`."""
    n_pieces = min(max(_PROGRAMS // max(n_blocks, 1), 1), _MOST_PIECES)
    return block_n * max(-(-n_positions // (block_n * n_pieces)), 2)


def launch(q: Tensor, latent: Tensor, rank: int, position: Tensor, scale: float) -> Tensor:
    """Run the kernels; arguments and result as `latent_attention`."""
    (B, H, width), N = q.shape, latent.shape[1]
    is_half = q.element_size() == 2
    block_n = 32 if is_half else 16  # more do not fit into the registers
    block_h = min(max(triton.next_power_of_2(H), 16), 32 if is_half else 16)
    keys = keys_of_a_piece(B * triton.cdiv(H, block_h), N, block_n)
    n_pieces = triton.cdiv(N, keys)
    acc = torch.empty((B * H, n_pieces, rank), dtype=torch.float32, device=q.device)
    best = torch.empty((B * H, n_pieces), dtype=torch.float32, device=q.device)
    total = torch.empty_like(best)
    _piece_kernel[(triton.cdiv(H, block_h), n_pieces, B)](
        q.contiguous(), latent, position, acc, best, total, H, rank, width - rank, latent.stride(0), latent.stride(1),
        scale, n_pieces, keys, BLOCK_H=block_h, BLOCK_C=max(triton.next_power_of_2(rank), 16),
        BLOCK_R=max(triton.next_power_of_2(width - rank), 16), BLOCK_N=block_n, num_warps=8, num_stages=1,
    )  # fmt: skip
    y = q.new_empty(B, H, rank)
    _join_kernel[(B * H, triton.cdiv(rank, _COLUMNS))](
        acc, best, total, y, rank, n_pieces, BLOCK_P=triton.next_power_of_2(n_pieces), COLUMNS=_COLUMNS, num_warps=4
    )
    return y
