"""Fits the model of the experts' tiles to what `benchmarks.tune_experts` measured; says how far its choices are off.

    python -m benchmarks.fit_tiles docs/results/h200/expert_tiles.csv

Needs no GPU. The figures of `moe_lab.experts.tiles.Gpu` are changed one after the other, as long as the model's choices
get faster or its times truer. `as it is` is the regret of the model in the package, `fitted` that of one fitted to all
cells, and `left out` that of each shape under a model fitted to the others: of a shape that the table lacks. A choice
is one of the measured tiles of up with one of the measured tiles of down, whose times add up. The exit code is 1 if a
regret `as it is` is above 10 %.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.tune_experts import CELL, LIMIT, Key
from moe_lab.experts.table import Shape
from moe_lab.experts.tiles import ONE_TOKEN, Gpu, Tiles, gpu_of, predicted_s, ranked

FITTED = [name for name in Gpu._fields if name != "multiprocessors"]
FACTORS = (0.7, 0.85, 0.95, 1 / 0.95, 1 / 0.85, 1 / 0.7)
TRUTH = 0.1  # how much a wrong time counts beside a slow choice


class Cell(NamedTuple):
    """What was measured at one T [us]: the time with each of the tiles of up, and what each one of down adds."""

    name: str
    shape: Shape
    T: int
    ups: dict[Key, float]
    downs: dict[Key, float]

    def us(self, tiles: Tiles) -> float:
        """Of both products with these tiles."""
        return self.ups[tiles[:2]] + self.downs[tiles[2:]]

    def choices(self) -> list[Tiles]:
        """All that is known."""
        return [Tiles(*up, *down) for up in self.ups for down in self.downs]


def cells_of(frame: pd.DataFrame) -> list[Cell]:
    """Of the timings of `benchmarks.tune_experts`."""
    found = []
    fused = frame[frame.implementation == "fused"].astype(dict.fromkeys(Tiles._fields, int))
    fused = fused[fused.up_rows != ONE_TOKEN.up_rows]  # which no model chooses
    for cell, group in fused.groupby(CELL, sort=False):
        us = {
            Tiles(*map(int, key)): float(value) for key, value in group.groupby(list(Tiles._fields)).us.median().items()
        }
        chosen = group[group.of_model.astype(bool)]
        if chosen.empty:  # its output was wrong, or it is of one token
            continue
        first = Tiles(*(int(chosen[name].iloc[0]) for name in Tiles._fields))
        ups = {tiles[:2]: value for tiles, value in us.items() if tiles[2:] == first[2:]}
        best = min(ups, key=lambda up: ups[up])
        downs = {tiles[2:]: value - ups[best] for tiles, value in us.items() if tiles[:2] == best}
        name, dtype, *sizes, T = cell
        found.append(Cell(f"{name} {dtype}", Shape(*map(int, sizes)), int(T), ups, downs))
    return found


def regret(gpu: Gpu, cell: Cell) -> float:
    """The time of the model's choice over that of the best one, less 1."""
    choices = cell.choices()
    return cell.us(ranked(gpu, cell.shape, cell.T, choices)[0]) / min(map(cell.us, choices)) - 1


def loss(gpu: Gpu, cells: Sequence[Cell]) -> float:
    """Of slow choices, and a little of wrong times."""
    slow = [log(1 + regret(gpu, cell)) for cell in cells]
    best = [min(cell.choices(), key=cell.us) for cell in cells]
    off = [
        abs(log(1e6 * predicted_s(gpu, cell.shape, cell.T, tiles) / cell.us(tiles)))
        for cell, tiles in zip(cells, best, strict=True)
    ]
    return float(np.mean(slow) + TRUTH * np.mean(off))


def fit(gpu: Gpu, cells: Sequence[Cell]) -> Gpu:
    """From `gpu` on, the best factor of one figure after the other; without cells `gpu` itself."""
    if not cells:
        return gpu
    least = loss(gpu, cells)
    while True:
        before = least
        for name in FITTED:
            others = [gpu._replace(**{name: factor * getattr(gpu, name)}) for factor in FACTORS]
            losses = [loss(other, cells) for other in others]
            if min(losses) < least:
                least, gpu = min(losses), others[int(np.argmin(losses))]
        if before - least < 1e-4:
            return gpu


def main() -> int:
    """Print the regret of each cell and the figures that fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="the timings that tune_experts wrote")
    parser.add_argument("--multiprocessors", type=int, default=132, help="of the GPU (default: 132)")
    args = parser.parse_args()
    if not args.csv.is_file():
        parser.error(f"{args.csv}: file not found; python -m benchmarks.tune_experts writes one")
    frame = pd.read_csv(args.csv)
    if not {*CELL, *Tiles._fields, "implementation", "us", "of_model", "device"} <= {*frame.columns}:
        parser.error(f"{args.csv}: not the timings of python -m benchmarks.tune_experts")
    cells = cells_of(frame)
    as_it_is = gpu_of(str(frame.device.iloc[0]), args.multiprocessors)
    fitted = fit(as_it_is, cells)
    shapes = {cell.shape for cell in cells}
    left_out = {shape: fit(as_it_is, [cell for cell in cells if cell.shape != shape]) for shape in shapes}
    rows = [
        (cell.name, cell.T, *(regret(gpu, cell) for gpu in (as_it_is, fitted, left_out[cell.shape]))) for cell in cells
    ]
    table = pd.DataFrame(rows, columns=["shape", "T", "as it is", "fitted", "left out"])
    print(table.round(3).to_string(index=False))
    for name in ("as it is", "fitted", "left out"):
        mean = np.exp(np.log1p(table[name]).mean()) - 1
        print(f"{name}: {mean:.1%} in the geometric mean, {table[name].max():.1%} at worst")
    print(*(f"{name}: {getattr(as_it_is, name):.3g} -> {getattr(fitted, name):.3g}" for name in FITTED), sep="\n")
    return int(table["as it is"].max() > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
