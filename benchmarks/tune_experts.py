"""Measures which experts implementation and which tiles are the fastest here, and writes the table that auto reads.

    python -m benchmarks.tune_experts --out outputs/tune_experts    # then copy its .json to moe_lab/experts/choices
    python -m benchmarks.tune_experts --shapes qwen3_30b_a3b,E48-K6-D1024-F512 --tokens 1,64 --dtypes bf16 --seconds 60

A cell is a shape, a dtype and a number of tokens T. Each choice is a CUDA graph of the experts on one random routing,
the L2 cache flushed before each replay; the choices of a cell are timed in interleaved rounds of shuffled order.
The sorting of the slots is part of it, as nothing sorted them before. First every output is compared with that of
experts=grouped.

The products up and down follow each other, so each is tuned alone: first the tiles of up beside the best ones of down
by the model (moe_lab/experts/tiles.py), then the tiles of down beside the best measured ones of up. What is measured of
each are the `--keep` best by the model; not what it takes for `--slack` times slower than its best, and of tiles that
are equal to it but for a width that no expert needs only the narrowest.

One token has a kernel of its own too, which is taken where nobody measured. Here it is a choice beside the others.

`regret` is the time of what is chosen without a table (`table.fastest`, with the model's tiles) over that of the best
measured one, less 1. So every shape is one that the table lacks. The exit code is 1 if a regret is above 10 % or an
output is wrong.
"""

from __future__ import annotations

import argparse
import gc
import importlib.resources
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import moe_lab
from moe_lab.experts.base import Experts
from moe_lab.experts.grouped import Grouped
from moe_lab.experts.table import Shape, fastest, file_name
from moe_lab.experts.tiles import ONE_TOKEN, Gpu, Tiles, candidates, gpu_of, predicted_s, ranked, takes_one_token
from moe_lab.experts.weights import ExpertWeights
from moe_lab.measure import environment
from moe_lab.measure.clocks import Step, make_step
from moe_lab.measure.distance import relative_error
from moe_lab.measure.statistics import median_interval
from moe_lab.measure.tolerances import TOLERANCES
from moe_lab.models import Output
from moe_lab.ops.library import DTYPES
from moe_lab.routers.base import Routing

SHAPES = ("demo", "olmoe_1b_7b", "qwen3_30b_a3b", "mixtral_8x7b", "deepseek_v3")
TOKENS = (1, 8, 64, 512, 4096, 16384)
LIMIT = 0.10
STEP = ("cuda_graph", "cold")  # the execution and the state of the caches that are timed
LEAST_ROUNDS, BLOCK_MS, LEAST_IN_BLOCK, MOST_IN_BLOCK = 3, 20.0, 3, 100
CELL = ["shape", "dtype", *Shape._fields, "T"]


class Layer(nn.Module):
    """The experts of one layer on one routing."""

    def __init__(self, experts: Experts, weights: ExpertWeights, routing: Routing):
        super().__init__()
        self.experts, self.weights, self.routing = experts, weights, routing

    def forward(self, x_TD: Tensor) -> Output:
        """One call."""
        return Output(self.experts(x_TD, self.routing, self.weights))


def fused(tiles: Tiles) -> Experts:
    """The implementation whose tiles are tuned."""
    from moe_lab.experts.fused import Fused

    return Fused(tiles=tiles)


def shape_of(name: str) -> Shape:
    """Of an option of model/shape, or of sizes such as E48-K6-D1024-F512."""
    if sizes := re.fullmatch(r"E(\d+)-K(\d+)-D(\d+)-F(\d+)", name):
        return Shape(*map(int, sizes.groups()))
    shape = moe_lab.compose(["model=moe_layer", f"model/shape={name}", "device=cpu"]).model.shape
    return Shape(shape.n_experts, shape.top_k, shape.d_model, shape.mlp_hidden_dim)


Key = tuple[int, ...]
"""A part of `Tiles`: of up, or of down."""


def kept(gpu: Gpu, shape: Shape, T: int, most: int, slack: float) -> tuple[list[Key], list[Key]]:
    """The tiles of up and those of down that are measured, the best by the model first."""
    all_tiles = candidates(shape.F)
    best = ranked(gpu, shape, T, all_tiles)[0]

    def best_of(keys: Iterable[Key], whole: Callable[[Key], Tiles]) -> list[Key]:
        seconds = {key: predicted_s(gpu, shape, T, whole(key)) for key in dict.fromkeys(keys)}
        order = sorted(seconds, key=lambda key: seconds[key])
        narrowest: dict[Any, Key] = {}
        for key in order:
            rows, _, *pieces = key
            narrowest.setdefault((rows, *pieces, f"{seconds[key]:.3g}"), key)
        return [key for key in narrowest.values() if seconds[key] <= slack * seconds[order[0]]][:most]

    ups = best_of((tiles[:2] for tiles in all_tiles), lambda key: Tiles(*key, *best[2:]))
    downs = best_of((tiles[2:] for tiles in all_tiles), lambda key: Tiles(*best[:2], *key))
    return ups, downs


def timed(steps: Mapping[Any, Step], seconds: float) -> dict[Any, np.ndarray]:
    """Milliseconds of each step in interleaved rounds, until `seconds` are over."""
    stop, samples = time.perf_counter() + seconds, {name: [] for name in steps}
    typical = {name: float(np.median(step.time_block(LEAST_IN_BLOCK).ms)) for name, step in steps.items()}
    lengths = {name: int(np.clip(BLOCK_MS / ms, LEAST_IN_BLOCK, MOST_IN_BLOCK)) for name, ms in typical.items()}
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < stop:
        for name in random.sample(list(steps), len(steps)):
            samples[name].append(steps[name].time_block(lengths[name]).ms)
        rounds += 1
    return {name: np.concatenate(blocks) for name, blocks in samples.items()}


class Cell:
    """One shape, dtype and T on the device: its input, and what was measured of it."""

    def __init__(self, name: str, shape: Shape, dtype: str, T: int, weights: ExpertWeights):
        torch.manual_seed(0)
        self.sizes = {"shape": name, "dtype": dtype, **shape._asdict(), "T": T}
        self.weights, self.rows, self.wrong = weights, [], []
        device = weights.w_down_EDF.device
        self.x_TD = torch.randn(T, shape.D, device=device, dtype=DTYPES[dtype])
        chosen = torch.rand(T, shape.E, device=device).topk(shape.K)
        self.routing = Routing(chosen.indices.int(), chosen.values.softmax(-1))

    def measure(self, choices: Mapping[Key, Experts], seconds: float) -> None:
        """Time each, and grouped, whose key is (); what computes something else is left out."""
        steps: dict[Key, Step] = {}
        reference_TD = Grouped()(self.x_TD, self.routing, self.weights)
        for key, experts in {(): Grouped(), **choices}.items():
            experts.compute_on(self.x_TD.device)
            y_TD = experts(self.x_TD, self.routing, self.weights)
            if not relative_error(y_TD, reference_TD) <= 2 * TOLERANCES[y_TD.dtype].model:  # NaN is wrong too
                self.wrong.append(key)
                continue
            steps[key] = make_step(*STEP, Layer(experts, self.weights, self.routing), self.x_TD)
        for key, ms in timed(steps, seconds).items():
            low, high = median_interval(np.sort(ms)) or (np.nan, np.nan)
            tiles = dict(zip(Tiles._fields, key or [None] * len(Tiles._fields), strict=True))
            us = {"us": np.median(ms) * 1e3, "us_low": low * 1e3, "us_high": high * 1e3, "n": len(ms)}
            self.rows.append({**self.sizes, "implementation": "fused" if key else "grouped", **tiles, **us})

    def fastest(self) -> Key:
        """The tiles that took the least time so far, but those of one token; () if all of them are wrong."""
        rows = [row for row in self.rows if (row["up_rows"] or 1) > 1]
        return tuple(min(rows, key=lambda row: row["us"])[name] for name in Tiles._fields) if rows else ()


def tune(cell: Cell, gpu: Gpu, make: Callable[[Tiles], Experts], most: int, slack: float, deadline: float) -> str:
    """Measure the tiles of up, then those of down, until `deadline` (`time.perf_counter`); how many, for people."""
    shape, T = Shape(*(cell.sizes[name] for name in Shape._fields)), cell.sizes["T"]
    if T == 1 and takes_one_token(shape):
        cell.measure({ONE_TOKEN: make(ONE_TOKEN)}, (deadline - time.perf_counter()) / 2)
    ups, downs = kept(gpu, shape, T, most, slack)
    left = (deadline - time.perf_counter()) / 2
    cell.measure({(*up, *downs[0]): make(Tiles(*up, *downs[0])) for up in ups}, left)
    if best := cell.fastest()[:2]:
        cell.measure({(*best, *down): make(Tiles(*best, *down)) for down in downs}, deadline - time.perf_counter())
    of_model = ONE_TOKEN if T == 1 and takes_one_token(shape) else (*ups[0], *downs[0])
    for row in cell.rows:
        if row["implementation"] == "fused":
            tiles = Tiles(*(row[name] for name in Tiles._fields))
            row["predicted_us"] = 1e6 * predicted_s(gpu, shape, T, tiles) if tiles != ONE_TOKEN else np.nan
            row["of_model"] = tiles == of_model
    n_up, n_down = (len({tiles[part] for tiles in candidates(shape.F)}) for part in (slice(2), slice(2, None)))
    return f"measured {len(ups)} of {n_up} tiles of up, {len(downs)} of {n_down} of down"


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell: grouped, the best tiles, the model's, and the regret."""
    found = []
    for cell, group in rows.groupby(CELL, sort=False):
        of_tiles = group[group.implementation == "fused"].groupby(list(Tiles._fields), as_index=False)
        of_tiles = of_tiles.agg(us=("us", "median"), of_model=("of_model", "first"))
        best = of_tiles.loc[of_tiles.us.idxmin()]
        models = of_tiles[of_tiles.of_model.astype(bool)]  # none if its output is wrong
        grouped_us = group[group.implementation == "grouped"].us.median()
        shape = Shape(*group[list(Shape._fields)].iloc[0].astype(int))
        if fastest("", group.dtype.iloc[0], shape, int(group["T"].iloc[0])) == "grouped":  # on a device without a table
            model_us = grouped_us
        else:
            model_us = models.us.iloc[0] if len(models) else np.inf
        found.append(
            {
                **dict(zip(CELL, cell, strict=True)),
                "grouped_us": grouped_us,
                "best_us": best.us,
                "tiles": [int(best[name]) for name in Tiles._fields],
                "model_us": model_us,
                "model_tiles": [int(value) for value in models[list(Tiles._fields)].to_numpy().flatten()],
                "regret": model_us / np.fmin(best.us, grouped_us) - 1,
            }
        )
    return pd.DataFrame(found)


def merged(before: Mapping[str, Any], cells: pd.DataFrame, made_with: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The table: what was measured now, and of an earlier one the cells that were not."""
    keys = ["dtype", *Shape._fields, "T"]
    choices = {tuple(row[key] for key in keys): row for row in before.get("choices", [])}
    for _, cell in cells.iterrows():
        implementation = "fused" if cell.best_us <= cell.grouped_us else "grouped"
        row = {key: cell[key] if key == "dtype" else int(cell[key]) for key in keys}
        choices[tuple(row.values())] = {**row, "implementation": implementation, "tiles": cell.tiles}
    return {"device": device, "made_with": dict(made_with), "choices": [choices[key] for key in sorted(choices)]}


def written(table: Mapping[str, Any]) -> str:
    """JSON with a line for each choice."""
    head = json.dumps({key: value for key, value in table.items() if key != "choices"}, indent=1)[:-2]
    return head + ',\n "choices": [\n  ' + ",\n  ".join(map(json.dumps, table["choices"])) + "\n ]\n}\n"


def make_weights(shape: Shape, dtype: torch.dtype, device: torch.device) -> ExpertWeights:
    """Normal matrices whose outputs are of order one."""
    with torch.device("meta"):  # which makes no copy in another dtype
        weights = ExpertWeights(shape.E, shape.D, shape.F).to(dtype)
    weights.to_empty(device=device)
    for parameter in weights.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return weights


def command_of(words: Sequence[str]) -> str:
    """As it was typed, without the folder that it wrote to, which only its machine has."""
    kept, left = ["python -m benchmarks.tune_experts"], list(words)
    while left:
        word = left.pop(0)
        if word == "--out":
            del left[:1]
        elif not word.startswith("--out="):
            kept.append(word)
    return " ".join(kept)


class Files:
    """The table and every timing, in a folder; written anew after each cell, should the next one not end."""

    def __init__(self, folder: Path, device_name: str, where: Mapping[str, Any]):
        """`where` is the environment of a record."""
        self.table, self.device_name, self.where = folder / file_name(device_name), device_name, where
        shipped = importlib.resources.files("moe_lab.experts") / "choices" / self.table.name
        self.before = json.loads(shipped.read_text()) if shipped.is_file() else {}
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
        """Of these timings; gives their summary."""
        frame = pd.DataFrame(rows)
        cells = summary(frame[frame.groupby(CELL).implementation.transform(lambda column: "fused" in set(column))])
        made_with = {"command": command_of(sys.argv[1:])}
        made_with |= {key: self.where[key] for key in ("moe_lab", "git_sha", "torch", "cuda", "driver")}
        self.table.write_text(written(merged(self.before, cells, made_with, self.device_name)))
        frame = frame.assign(device=self.device_name, torch=self.where["torch"], driver=self.where["driver"])
        frame.round(3).to_csv(self.table.with_suffix(".csv"), index=False)
        return cells


@torch.inference_mode()
def measured(args: argparse.Namespace, gpu: Gpu, device: torch.device, files: Files) -> tuple[pd.DataFrame, list[str]]:
    """(the summary, what went wrong)."""
    rows: list[dict[str, Any]] = []
    troubles: list[str] = []
    cells = [(name, dtype, T) for name in args.shapes for dtype in args.dtypes for T in args.tokens]
    end, weights, of, found = time.perf_counter() + args.seconds, None, None, pd.DataFrame()
    for number, (name, dtype, T) in enumerate(cells):
        now, shape = time.perf_counter(), shape_of(name)
        deadline = now + max(0.0, end - now) / (len(cells) - number)
        try:
            if of != (name, dtype):
                weights = None  # before the next are made
                _free()
                weights, of = make_weights(shape, DTYPES[dtype], device), (name, dtype)
            cell = Cell(name, shape, dtype, T, weights)
            line = tune(cell, gpu, fused, args.keep, args.slack, deadline)
        except torch.OutOfMemoryError:
            troubles.append(f"{name} {dtype} T={T}: left out, not enough memory")
            continue
        finally:
            _free()
        troubles += [f"{name} {dtype} T={T}: the output with tiles {tiles} is wrong" for tiles in cell.wrong]
        rows += cell.rows
        found = files.write(rows)
        print(f"{name} {dtype} T={T}: {line}, {time.perf_counter() - now:.1f} s", flush=True)
    if (late := time.perf_counter() - end) > 0:
        print(f"--seconds={args.seconds:g} was too little for {LEAST_ROUNDS} rounds of each: {late:.0f} s more")
    return found, troubles


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> int:
    """Measure, write the table and every timing, print the regret."""
    words = lambda text: text.split(",")  # noqa: E731
    numbers = lambda text: [int(word) for word in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=words, default=SHAPES, help="options of model/shape, or E48-K6-D1024-F512")
    parser.add_argument("--tokens", type=numbers, default=TOKENS, help="numbers of tokens, such as 1,64")
    parser.add_argument("--dtypes", type=words, default=["bf16"], help="bf16,fp16 (default: bf16)")
    parser.add_argument("--seconds", type=float, default=300, help="for all cells (default: 300)")
    parser.add_argument("--keep", type=int, default=6, help="most tiles of up, and of down, in a cell (default: 6)")
    parser.add_argument(
        "--slack",
        type=float,
        default=1.5,
        help="leave out what the model takes for slower by this factor (default: 1.5)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/tune_experts"), help="a folder (default: %(default)s)"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    files = Files(args.out, properties.name, environment.capture(device))
    cells, troubles = measured(args, gpu_of(properties.name, properties.multi_processor_count), device, files)
    print(*troubles, sep="\n")
    if cells.empty:
        return 1
    print(cells.round({"grouped_us": 1, "best_us": 1, "model_us": 1, "regret": 3}).to_string(index=False))
    worst = cells.loc[cells.regret.idxmax()]
    mean = float(np.exp(np.log1p(cells.regret).mean()) - 1)
    print(f"the model's choice takes {mean:.1%} more than the best measured (geometric mean of {len(cells)} cells),")
    print(f"at worst {worst.regret:.1%}: {worst['shape']} {worst['dtype']} T={worst['T']}; allowed: {LIMIT:.0%}")
    print(f"{files.table}: copy it to moe_lab/experts/choices; every timing is in the .csv beside it")
    return int(bool(troubles) or worst.regret > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
