"""The index maps of FlashInfer's kernels, in Triton: the slots sorted by expert, in tiles that have one expert each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_lab.ops.dispatch import dispatch


@triton.jit
def _tiles_kernel(
    counts_ptr, first_ptr, tile_expert_ptr, tile_limit_ptr, n_tiles_ptr, E,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One expert: its first row, and its tiles, each with the end of its valid rows."""
    expert = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    tiles_E = (tl.load(counts_ptr + e, mask=e < E, other=0) + ROWS - 1) // ROWS
    first = tl.sum(tl.where(e < expert, tiles_E, 0), axis=0)
    count = tl.load(counts_ptr + expert)
    n = (count + ROWS - 1) // ROWS
    tl.store(first_ptr + expert, first * ROWS)
    if expert == 0:
        tl.store(n_tiles_ptr, tl.sum(tiles_E, axis=0))
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(tile_expert_ptr + first + i, tl.full((BLOCK,), 0, tl.int32) + expert, mask=i < n)
        tl.store(tile_limit_ptr + first + i, first * ROWS + tl.minimum((i + 1) * ROWS, count), mask=i < n)


@triton.jit
def _place_kernel(ids_ptr, first_ptr, offsets_ptr, inverse_ptr, slot_ptr, N, BLOCK: tl.constexpr):
    """Note each slot at its row, among those of its expert in their order."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids_ptr + n, mask=n < N, other=-1)
    used = expert >= 0
    at = tl.where(used, expert, 0)
    row = tl.load(first_ptr + at) + tl.load(inverse_ptr + n, mask=used, other=0) - tl.load(offsets_ptr + at)
    tl.store(slot_ptr + row, n, mask=used)


def index_maps(ids_TK: Tensor, E: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(expert of each tile, end of its valid rows, slot of each row or -1, number of tiles in use); all int32.

    There are as many tiles of `rows` rows as may be needed at most.
    """
    N = ids_TK.numel()
    most = (N + min(E, N) * (rows - 1)) // rows
    noted = ids_TK.new_full((most * rows + 2 * most + E + 1,), -1)
    slot_M, tile_expert, tile_limit, first_E, n_tiles = noted.split([most * rows, most, most, E, 1])
    order = dispatch(ids_TK, E)
    _tiles_kernel[(E,)](
        order.counts_E, first_E, tile_expert, tile_limit, n_tiles, E,
        ROWS=rows, BLOCK_E=triton.next_power_of_2(E), BLOCK=128,
    )  # fmt: skip
    _place_kernel[(triton.cdiv(N, 256),)](ids_TK, first_E, order.offsets_E1, order.inverse_N, slot_M, N, BLOCK=256)
    return tile_expert, tile_limit, slot_M, n_tiles
