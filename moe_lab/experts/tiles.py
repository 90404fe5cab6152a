"""Into which tiles the kernels of experts=fused cut their products: `tiles_for`. Known without torch.

The true numbers of tokens by expert are on the device, where nobody looks. So the choice depends on the shape alone,
for tokens that are routed at random: a table of what was measured (table.py), else a model of the time of each choice.

The model. A block multiplies `rows` of an expert's matrix by up to `tokens` of its tokens; an expert's tokens are dealt
evenly to as few tiles as hold them, in steps of 16. A tile takes the longer of two: its products at the peak of a
multiprocessor, and the way of both operands from the L2 cache (the rows for every tile, which few tokens waste). Then
it stores its results, unless another block of the multiprocessor multiplies meanwhile. Tiles run in whole waves. So do
their bytes; a multiprocessor draws twice its fair share at most.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import product
from math import ceil, exp, lgamma, log, log1p, sqrt
from typing import NamedTuple

from moe_lab.errors import UnavailableError
from moe_lab.experts.table import Shape, neighbours


class Kind(NamedTuple):
    """Of the tiles of so many rows.

    Attributes:
        tokens: how many they may have at most.
        blocks: that share a multiprocessor.
        splits: the sum over F may be in pieces, and a block can sort few slots for itself.
    """

    tokens: tuple[int, ...]
    blocks: int
    splits: bool


KINDS = {
    128: Kind((16, 32, 48, 64), 2, splits=True),
    256: Kind((32, 64, 96, 128, 160, 192), 1, splits=False),
}
"""What the kernels offer, by rows. The first of equally fast choices is taken."""

PIECES, MOST_PIECES = (1, 2, 4, 8), 64  # that are tried, and at most
FEW_SLOTS = 1024  # that each block sorts for itself, where its kind can; else a kernel sorts them before
DEPTH = 64  # of the sum, in one step of the kernels' loop; a piece of it has at least one


class Tiles(NamedTuple):
    """One choice.

    Attributes:
        up_rows, down_rows: rows of the weights that a block multiplies; of up half of them are of the gate.
        up_tokens, down_tokens: the most tokens of a tile.
        pieces: into how many the sum over F is split; more than one are written in fp32 and added afterwards.
    """

    up_rows: int
    up_tokens: int
    down_rows: int
    down_tokens: int
    pieces: int


ONE_TOKEN = Tiles(1, 1, 1, 1, 1)
"""Of a single token: both products in one launch, by a row of the weights at a time."""
_MOST_K, _MOST_VECTORS = 32, 50_000  # of it; the latter of D and of K F (kernels/experts.h)


class Gpu(NamedTuple):
    """What the kernels reach on a GPU.

    Attributes:
        bytes_s: of its memory.
        flop_s: of products in 16 bits.
        l2_bytes_s: from the L2 cache to one multiprocessor.
        draws: times its fair share of `bytes_s` is what one multiprocessor can draw.
        sort_s: that a kernel takes to sort few slots.
        store_s: that storing a tile's results takes at least; with 192 tokens `store_up_s` (SwiGLU too) or
            `store_down_s` more.
    """

    multiprocessors: int
    bytes_s: float
    flop_s: float
    l2_bytes_s: float = 8e12 / 132
    draws: float = 2.0
    sort_s: float = 4e-6
    store_s: float = 0.3e-6
    store_up_s: float = 1.0e-6
    store_down_s: float = 0.6e-6


# TB/s of memory and dense TFLOP/s in 16 bits of the makers' data sheets, by the name that CUDA gives.
_DATA_SHEETS = {
    "NVIDIA H100 80GB HBM3": (3.35, 989),
    "NVIDIA H100 NVL": (3.9, 835),
    "NVIDIA H100 PCIe": (2.0, 756),
    "NVIDIA H800": (3.35, 989),
    "NVIDIA H200": (4.8, 989),
    "NVIDIA H200 NVL": (4.8, 835),
    "NVIDIA H20": (4.0, 148),
    "NVIDIA GH200 480GB": (4.0, 989),
    "NVIDIA GH200 144G HBM3e": (4.9, 989),
}
_UNKNOWN = (3.35 / 132, 989 / 132)  # of one multiprocessor: an H100's
_REACHED = (4.4 / 4.8, 695 / 989)  # of both, by kernels of this kind on an H200


@lru_cache(maxsize=4096)
def tiles_for(device_name: str, multiprocessors: int, dtype: str, T: int, E: int, K: int, D: int, F: int) -> Tiles:
    """The tiles for T tokens: as measured; between two T's the better of both by the model; elsewhere the model's.

    One token that nobody measured has `ONE_TOKEN`, if it may.

    Args:
        device_name: as CUDA gives it.
        multiprocessors: of the device.
        dtype: `bf16` or `fp16`.
    """
    assert dtype in ("bf16", "fp16"), dtype
    shape, gpu = Shape(E, K, D, F), gpu_of(device_name, multiprocessors)
    known = [Tiles(*choice.tiles) for choice in neighbours(device_name, dtype, shape, T) if choice.tiles is not None]
    if known == [ONE_TOKEN] or (not known and T == 1 and takes_one_token(shape)):
        return ONE_TOKEN
    return ranked(gpu, shape, T, [tiles for tiles in known if tiles != ONE_TOKEN] or candidates(F))[0]


def takes_one_token(shape: Shape) -> bool:
    """Whether the kernel of `ONE_TOKEN` computes such a layer."""
    return shape.K <= _MOST_K and max(shape.D, shape.K * shape.F) <= _MOST_VECTORS


def require_offered_for(tiles: Tiles, shape: Shape, T: int) -> None:
    """Raise `UnavailableError` if tiles that were chosen are of one token, and this input or layer is not."""
    if tiles == ONE_TOKEN and not (T <= 1 and takes_one_token(shape)):
        raise UnavailableError(
            f"experts.tiles={'-'.join(map(str, tiles))}: is for one token, at most {_MOST_K} slots, and at most "
            f"{_MOST_VECTORS} for D and K * F, not T={T}, K={shape.K}, D={shape.D}, F={shape.F}; leave it out"
        )


def gpu_of(device_name: str, multiprocessors: int) -> Gpu:
    """By its data sheet; a GPU that is not in the list is taken for so many multiprocessors of an H100."""
    tera = _DATA_SHEETS.get(device_name) or [multiprocessors * each for each in _UNKNOWN]
    bytes_s, flop_s = (1e12 * value * share for value, share in zip(tera, _REACHED, strict=True))
    return Gpu(multiprocessors, bytes_s, flop_s)


def candidates(F: int) -> list[Tiles]:
    """All tiles that the kernels offer where no piece of the sum over F is empty."""
    pieces = [n for n in PIECES if n == not_empty(n, F)]
    products = [(rows, tokens) for rows, kind in KINDS.items() for tokens in kind.tokens]
    return [
        Tiles(*up, *down, n) for up, down, n in product(products, products, pieces) if n == 1 or KINDS[down[0]].splits
    ]


def not_empty(pieces: int, F: int) -> int:
    """Into how many pieces the kernels split the sum over F if they are asked for so many: all have the same depth."""
    steps = ceil(F / DEPTH)
    return ceil(steps / ceil(steps / pieces))


def offered(given: Iterable[int]) -> Tiles:
    """What a person chose. Raises `ValueError` for what the kernels do not offer for any F."""
    values = tuple(given)
    what = f"experts.tiles={'-'.join(map(str, values))}"
    if len(values) != len(Tiles._fields):
        raise ValueError(f"{what}: must be {', '.join(Tiles._fields)}.")
    tiles = Tiles(*values)
    if tiles == ONE_TOKEN:
        return tiles
    for rows, tokens in (values[:2], values[2:4]):
        if rows not in KINDS or tokens not in KINDS[rows].tokens:
            known = [f"{rows} rows by {', '.join(map(str, kind.tokens))} tokens" for rows, kind in KINDS.items()]
            raise ValueError(f"{what}: must be {', or '.join(known)}; or {'-'.join(map(str, ONE_TOKEN))}.")
    if not 1 <= tiles.pieces <= MOST_PIECES or (tiles.pieces > 1 and not KINDS[tiles.down_rows].splits):
        raise ValueError(f"{what}: pieces must be between 1 and {MOST_PIECES}, and 1 where down_rows is 256.")
    return tiles


def require_no_empty_piece(tiles: Tiles, F: int) -> None:
    """Raise `ValueError` if the kernels would split the sum over F into fewer pieces than were chosen."""
    if (most := not_empty(tiles.pieces, F)) < tiles.pieces:
        raise ValueError(
            f"experts.tiles={'-'.join(map(str, tiles))}: of {tiles.pieces} pieces some would be empty, because "
            f"mlp_hidden_dim={F} has {ceil(F / DEPTH)} steps of {DEPTH}; use {most}."
        )


def ranked(gpu: Gpu, shape: Shape, T: int, tiles: Iterable[Tiles]) -> list[Tiles]:
    """The fastest by the model first."""
    tiles = list(tiles)
    up_s = {key: _up_s(gpu, shape, T, *key) for key in {(t.up_rows, t.up_tokens) for t in tiles}}
    down_s = {key: _down_s(gpu, shape, T, *key) for key in {(t.down_rows, t.down_tokens, t.pieces) for t in tiles}}
    return sorted(tiles, key=lambda t: up_s[t[:2]] + down_s[t[2:]])


def predicted_s(gpu: Gpu, shape: Shape, T: int, tiles: Tiles) -> float:
    """Seconds of both products, by the model."""
    return _up_s(gpu, shape, T, *tiles[:2]) + _down_s(gpu, shape, T, *tiles[2:])


def _up_s(gpu: Gpu, shape: Shape, T: int, rows: int, tokens: int) -> float:
    moved = 2 * (_used_experts(shape, T) * 2 * shape.F * shape.D + T * shape.D + T * shape.K * shape.F)
    return _product_s(gpu, shape, T, (rows, tokens), (2 * shape.F, shape.D), 1, gpu.store_up_s, moved)


def _down_s(gpu: Gpu, shape: Shape, T: int, rows: int, tokens: int, pieces: int) -> float:
    """With the sorting, and the time of reading its results again, which in pieces are more."""
    of_results = T * shape.K * shape.D * (2 if pieces == 1 else 4 * pieces)
    moved = 2 * (_used_experts(shape, T) * shape.F * shape.D + T * shape.K * shape.F) + of_results
    store_s = gpu.store_down_s * (1 if pieces == 1 else 2)
    seconds = _product_s(gpu, shape, T, (rows, tokens), (shape.D, shape.F), pieces, store_s, moved)
    sorts = T > 0 and (T * shape.K > FEW_SLOTS or not KINDS[rows].splits)
    return seconds + of_results / gpu.bytes_s + sorts * gpu.sort_s


def _product_s(
    gpu: Gpu,
    shape: Shape,
    T: int,
    tile: tuple[int, int],
    matrix: tuple[int, int],
    pieces: int,
    store_s: float,
    moved: float,
) -> float:
    """Seconds of one grouped product: `matrix` is (rows, depth) of each expert's, `moved` what memory sees."""
    rows, most = tile
    depth, by_rows = matrix[1] / pieces, ceil(matrix[0] / rows) * pieces
    number, busy_s = 0.0, 0.0
    for width, expected in _widths(shape, T, most):
        number += by_rows * expected
        busy_s += by_rows * expected * _tile_s(gpu, rows, width, depth, store_s)
    if number == 0:
        return 0.0
    blocks = gpu.multiprocessors * KINDS[rows].blocks
    waves, rest = divmod(ceil(number), blocks)
    computes_s = ceil(ceil(number) / gpu.multiprocessors) * busy_s / number
    of_tile = moved / number
    # the last wave: at the memory's rate, or as fast as a block can draw
    last_s = max(rest * of_tile / gpu.bytes_s, (rest > 0) * of_tile * blocks / (gpu.draws * gpu.bytes_s))
    reads_s = waves * blocks * of_tile / gpu.bytes_s + last_s
    return float((computes_s**6 + reads_s**6) ** (1 / 6))  # both at once, at times in each other's way


def _tile_s(gpu: Gpu, rows: int, width: int, depth: float, store_s: float) -> float:
    """Seconds of a multiprocessor for one tile."""
    multiplies_s = 2 * rows * width * depth * gpu.multiprocessors / gpu.flop_s
    fetches_s = 2 * (rows + width) * depth / gpu.l2_bytes_s
    busy_s, stores_s = max(multiplies_s, fetches_s), gpu.store_s + store_s * width / 192
    return max(busy_s, (busy_s + stores_s) / KINDS[rows].blocks)


@lru_cache(maxsize=64)
def _widths(shape: Shape, T: int, most: int) -> list[tuple[int, float]]:
    """(tokens of a tile with its padding, how many such tiles of one matrix row are to be expected)."""
    found: dict[int, float] = {}
    for count, experts in _counts(T, shape.K, shape.E):
        parts = ceil(count / most)
        width = 16 * ceil(count / (16 * parts))
        found[width] = found.get(width, 0.0) + experts * parts
    return list(found.items())


def _used_experts(shape: Shape, T: int) -> float:
    """How many experts have a token."""
    return sum(experts for _, experts in _counts(T, shape.K, shape.E))


@lru_cache(maxsize=64)
def _counts(T: int, K: int, E: int) -> list[tuple[int, float]]:
    """(tokens of an expert, how many experts have so many): binomial, less its tails and those without a token."""
    share = K / E
    if share == 1:
        return [(T, float(E))] if T else []
    mean, deviation = T * share, sqrt(T * share * (1 - share))
    low, high = max(1, int(mean - 6 * deviation)), min(T, int(mean + 6 * deviation) + 16)

    def expected(count: int) -> float:
        ways = lgamma(T + 1) - lgamma(count + 1) - lgamma(T - count + 1)
        return E * exp(ways + count * log(share) + (T - count) * log1p(-share))

    return [(count, expected(count)) for count in range(low, high + 1)]
