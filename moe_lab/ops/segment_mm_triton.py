"""The Triton kernel of `segment_mm`: one program per tile of rows of one segment and tile of output columns.

How many row tiles there are depends on the offsets, which stay on the device. So the grid has room for the most there
can be (every segment may leave one tile partly filled), and each program finds its segment by counting tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(
    x_ptr, w_ptr, offsets_ptr, y_ptr, E, F, D,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    # Which segment owns this row tile: tiles of all segments, counted up.
    expert = tl.arange(0, BLOCK_E)
    starts = tl.load(offsets_ptr + expert, mask=expert < E, other=0)
    stops = tl.load(offsets_ptr + expert + 1, mask=expert < E, other=0)
    tiles = (stops - starts + BLOCK_N - 1) // BLOCK_N
    tiles_until = tl.cumsum(tiles, axis=0)
    owner = tl.sum((tiles_until <= tile).to(tl.int32), axis=0)
    if owner >= E:
        return
    first_tile = tl.sum(tl.where(expert < owner, tiles, 0), axis=0)
    start = tl.load(offsets_ptr + owner) + (tile - first_tile) * BLOCK_N
    stop = tl.load(offsets_ptr + owner + 1)

    row = start + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    depth = tl.arange(0, BLOCK_D)
    x_at = x_ptr + row[:, None].to(tl.int64) * D + depth[None, :]
    w_at = w_ptr + owner.to(tl.int64) * F * D + column[None, :].to(tl.int64) * D + depth[:, None]
    accumulator = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        x = tl.load(x_at + d, mask=(row[:, None] < stop) & (depth[None, :] + d < D), other=0.0)
        w = tl.load(w_at + d, mask=(column[None, :] < F) & (depth[:, None] + d < D), other=0.0)
        accumulator += tl.dot(x, w, input_precision="ieee")
    y_at = y_ptr + row[:, None].to(tl.int64) * F + column[None, :]
    tl.store(y_at, accumulator.to(y_ptr.dtype.element_ty), mask=(row[:, None] < stop) & (column[None, :] < F))


def launch(x_ND: Tensor, w_EFD: Tensor, offsets_E1: Tensor) -> Tensor:
    """Run the kernel on the device of `x_ND`; arguments and result as `segment_mm`."""
    (N, D), (E, F, _) = x_ND.shape, w_EFD.shape
    y_NF = x_ND.new_empty(N, F)
    if y_NF.numel() == 0:
        return y_NF
    # Tiles as high as an average segment, within what the matrix unit takes (16) and what registers hold.
    block_n = min(max(triton.next_power_of_2(triton.cdiv(N, E)), 16), 64)
    block_f, block_d = 64, 32 if x_ND.dtype == torch.float32 else 64
    grid = (triton.cdiv(N, block_n) + E, triton.cdiv(F, block_f))
    _kernel[grid](
        x_ND.contiguous(), w_EFD.contiguous(), offsets_E1, y_NF, E, F, D,
        BLOCK_E=triton.next_power_of_2(E), BLOCK_N=block_n, BLOCK_F=block_f, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return y_NF
