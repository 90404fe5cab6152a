"""benchmarks/tune_experts.py: what it measures and the table it writes; on a CPU, grouped in the place of fused."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from benchmarks import tune_experts as module
from benchmarks.tune_experts import (
    CELL,
    Cell,
    command_of,
    kept,
    make_weights,
    merged,
    shape_of,
    summary,
    timed,
    tune,
    written,
)
from moe_lab.experts.base import Experts
from moe_lab.experts.grouped import Grouped
from moe_lab.experts.table import Shape
from moe_lab.experts.tiles import Tiles, candidates, gpu_of, predicted_s, ranked
from tests import tiny

H200 = gpu_of("NVIDIA H200", 132)
SMALL = Shape(8, 2, 64, 512)
SLOW = 128  # tiles with so many rows of up are planted to be slow


class Clock:
    """Stands but for what is planted and a microsecond at each look, so that nothing depends on the machine's load."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


CLOCK = Clock()


class Delayed(Grouped):
    """Computes what grouped does, later."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, *arguments: Any, **keys: Any) -> Tensor:
        CLOCK.now += self.seconds
        return super().__call__(*arguments, **keys)


class Wrong(Grouped):
    def __call__(self, *arguments: Any, **keys: Any) -> Tensor:
        return super().__call__(*arguments, **keys) * 1.1


def planted(tiles: Tiles) -> Experts:
    """As if few rows were slow, those of one token quick, and two pieces wrong."""
    return Wrong() if tiles.pieces == 2 else Delayed({SLOW: 0.004, 1: 0.0005}.get(tiles.up_rows, 0.001))


def cell_of(T: int = 16) -> Cell:
    weights = make_weights(SMALL, torch.bfloat16, torch.device("cpu"))
    return Cell("small", SMALL, "bf16", T, weights)


@pytest.fixture(autouse=True)
def of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed, in short blocks."""
    monkeypatch.setattr(module, "STEP", ("eager", "natural"))
    monkeypatch.setattr(module, "BLOCK_MS", 1.0)
    monkeypatch.setattr(time, "perf_counter", CLOCK)


@torch.inference_mode()
def tuned() -> tuple[Cell, pd.DataFrame]:
    cell = cell_of()
    tune(cell, H200, planted, 6, 3.0, time.perf_counter() + 0.05)
    return cell, pd.DataFrame(cell.rows)


@pytest.mark.slow
def test_a_cell_is_tuned_product_by_product() -> None:
    """Tiles of up, then those of down beside the fastest of up; grouped with each; the wrong ones are left out."""
    cell, rows = tuned()
    ups, downs = kept(H200, SMALL, 16, 6, 3.0)
    assert {up[0] for up in ups} > {SLOW} and {down[-1] for down in downs} > {2} and downs[0][-1] != 2
    of_tiles = rows[rows.implementation == "fused"]
    found = {tuple(int(value) for value in row) for row in of_tiles[list(Tiles._fields)].to_numpy()}
    assert {(*up, *downs[0]) for up in ups} <= found
    (best_up,) = {key[:2] for key in found if key[2:] != downs[0]}
    assert best_up[0] != SLOW
    assert {key[2:] for key in found} == {down for down in downs if down[-1] != 2}
    assert {key[2:] for key in cell.wrong} == {down for down in downs if down[-1] == 2}
    assert (rows.implementation == "grouped").sum() == 2
    assert (rows.us > 0).all() and (rows.n >= module.LEAST_ROUNDS * module.LEAST_IN_BLOCK).all()
    regret = summary(rows).regret.iloc[0]
    assert regret > 1 if ups[0][0] == SLOW else regret < 1


@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (1, 64, 4096)])
@pytest.mark.parametrize("most", [pytest.param(most, id=f"keep={most}") for most in (1, 4, 99)])
def test_what_is_measured_is_the_best_by_the_model(T: int, most: int) -> None:
    """Its own choice first; no more than asked for, none slower than allowed or different in nothing that counts."""
    shape = Shape(64, 8, 2048, 1024)
    ups, downs = kept(H200, shape, T, most, 1.5)
    assert (*ups[0], *downs[0]) == ranked(H200, shape, T, candidates(shape.F))[0]
    assert 1 <= len(ups) <= min(most, 10) and 1 <= len(downs) <= min(most, 22)
    best_s = predicted_s(H200, shape, T, Tiles(*ups[0], *downs[0]))
    seconds = [predicted_s(H200, shape, T, Tiles(*up, *downs[0])) for up in ups]
    assert all(best_s <= one <= 1.5 * best_s for one in seconds) and seconds == sorted(seconds)
    if T == 1:
        assert {key[1] for key in (*ups, *downs)} <= {16, 32} and all(key[1] == 16 for key in downs if key[0] < 256)


def test_rounds_go_on_until_the_time_is_over() -> None:
    """Three at the least, whatever is left."""
    step = cell_of()
    with torch.inference_mode():
        steps = {name: module.make_step("eager", "natural", _layer(step), step.x_TD) for name in "ab"}
        few, many = timed(steps, -1.0), timed(steps, 0.6)
    assert set(few) == {"a", "b"}
    assert len(few["a"]) >= module.LEAST_ROUNDS * module.LEAST_IN_BLOCK and len(many["a"]) > len(few["a"])


def _layer(cell: Cell) -> Any:
    return module.Layer(Delayed(0.004), cell.weights, cell.routing)


def row(implementation: str, us: float, tiles: tuple[int, ...] | None = None, **more: Any) -> dict[str, Any]:
    sizes = {"shape": "small", "dtype": "bf16", **SMALL._asdict(), "T": 16}
    named = dict(zip(Tiles._fields, tiles or [None] * 5, strict=True))
    return {**sizes, "implementation": implementation, **named, "us": us, **more}


ONE, OTHER = (128, 16, 128, 16, 1), (256, 64, 256, 64, 2)


def test_the_regret_is_of_the_models_choice() -> None:
    """Over the best measured one; of a cell whose model's choice is wrong it is infinite."""
    rows = [row("grouped", 30.0), row("fused", 12.0, ONE, of_model=True), row("fused", 10.0, OTHER, of_model=False)]
    (found,) = summary(pd.DataFrame(rows)).to_dict("records")
    assert (found["tiles"], found["model_tiles"], found["grouped_us"]) == (list(OTHER), list(ONE), 30.0)
    assert found["regret"] == pytest.approx(0.2)
    (found,) = summary(pd.DataFrame([rows[0], rows[2]])).to_dict("records")
    assert found["regret"] == float("inf")


def test_the_regret_is_of_grouped_where_that_is_chosen() -> None:
    """And over whichever is the best: tiles may be faster, and so may grouped where the model takes tiles."""
    few = {"T": 4, "E": 32, "K": 8}
    rows = [row("grouped", 12.0), row("fused", 10.0, ONE, of_model=True), row("fused", 15.0, OTHER, of_model=False)]
    (found,) = summary(pd.DataFrame([{**each, **few} for each in rows])).to_dict("records")
    assert found["model_us"] == 12.0 and found["regret"] == pytest.approx(0.2)
    (found,) = summary(pd.DataFrame([{**rows[0], "us": 8.0}, *rows[1:]])).to_dict("records")
    assert found["model_us"] == 10.0 and found["regret"] == pytest.approx(0.25)


def test_the_page_says_what_its_timings_come_to() -> None:
    """docs/results/h200/experts.md, of expert_tiles.csv."""
    folder = tiny.ROOT / "docs/results/h200"
    regret = summary(pd.read_csv(folder / "expert_tiles.csv")).regret
    page = " ".join((folder / "experts.md").read_text().split())
    assert f"it takes {np.exp(np.log1p(regret).mean()) - 1:.1%} more".replace("%", " %") in page
    assert f"and {regret.max():.1%} at worst".replace("%", " %") in page and regret.max() < module.LIMIT


def test_the_table_keeps_what_was_not_measured_again() -> None:
    """A row for each cell, of which a new one replaces the old; grouped where that is faster."""
    rows = [row("grouped", 9.0), row("fused", 10.0, ONE, of_model=True)]
    rows += [{**one, "T": 64} for one in (row("grouped", 30.0), row("fused", 10.0, OTHER, of_model=True))]
    key = {"dtype": "bf16", **SMALL._asdict()}
    before = {"choices": [{**key, "T": T, "implementation": "fused", "tiles": list(ONE)} for T in (16, 512)]}
    table = merged(before, summary(pd.DataFrame(rows)), {"command": "x"}, "NVIDIA Test")
    assert json.loads(written(table)) == {
        "device": "NVIDIA Test",
        "made_with": {"command": "x"},
        "choices": [
            {**key, "T": 16, "implementation": "grouped", "tiles": list(ONE)},
            {**key, "T": 64, "implementation": "fused", "tiles": list(OTHER)},
            {**key, "T": 512, "implementation": "fused", "tiles": list(ONE)},
        ],
    }
    assert CELL[0] == "shape" and len(written(table).splitlines()) == 11


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--out", "/a/b", "--seconds", "9"], id="first"),
        pytest.param(["--seconds", "9", "--out", "/a/b"], id="last"),
        pytest.param(["--out=/a/b", "--seconds", "9"], id="in one word"),
        pytest.param(["--seconds", "9"], id="not given"),
    ],
)
def test_a_table_names_no_folder_of_its_machine(words: list[str]) -> None:
    assert command_of(words) == "python -m benchmarks.tune_experts --seconds 9"


def test_what_was_measured_so_far_is_on_the_disk(tmp_path: Path) -> None:
    """Every timing and the table; a cell all of whose tiles are wrong has timings alone."""
    where = dict.fromkeys(("moe_lab", "git_sha", "torch", "cuda", "driver"), "1")
    files = module.Files(tmp_path / "out", "NVIDIA Test", where)
    rows = [row("grouped", 30.0), row("fused", 10.0, ONE, of_model=True), {**row("grouped", 40.0), "T": 64}]
    assert list(files.write(rows)["T"]) == [16]
    assert len(pd.read_csv(tmp_path / "out" / "nvidia_test.csv")) == 3
    (choice,) = json.loads((tmp_path / "out" / "nvidia_test.json").read_text())["choices"]
    assert (choice["T"], choice["implementation"], choice["tiles"]) == (16, "fused", list(ONE))


@pytest.mark.slow
def test_cells_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line says what was pruned; wrong outputs, what did not fit and too little time are told."""
    monkeypatch.setattr(module, "fused", planted)
    monkeypatch.setattr(module, "kept", lambda *_: ([(128, 16), (256, 16)], [(128, 16, 1), (128, 16, 2)]))
    make = module.make_weights

    def make_unless_large(shape: Shape, *arguments: Any) -> Any:
        if shape.E > 8:
            raise torch.OutOfMemoryError("planted")
        return make(shape, *arguments)

    monkeypatch.setattr(module, "make_weights", make_unless_large)
    names = ["E8-K2-D64-F512", "E9-K2-D64-F512"]
    args = argparse.Namespace(shapes=names, dtypes=["bf16"], tokens=[1, 5], seconds=0.0, keep=6, slack=1.5)
    files = module.Files(tmp_path, "NVIDIA Test", dict.fromkeys(("moe_lab", "git_sha", "torch", "cuda", "driver"), "1"))
    cells, troubles = module.measured(args, H200, torch.device("cpu"), files)
    assert list(cells["T"]) == [1, 5] and list(cells["tiles"]) == [[1] * 5, [256, 16, 128, 16, 1]]
    over_tiles = list(cells.model_us / cells.best_us - 1)
    assert over_tiles == pytest.approx([0.0, 3.0], rel=0.01)  # of one token its own; 4 ms, and 1 ms
    assert list(cells.regret) == pytest.approx(list(cells.model_us / cells.grouped_us - 1))  # planted to be the fastest
    wrong = "the output with tiles (256, 16, 128, 16, 2) is wrong"
    assert troubles == [
        *(f"{names[0]} bf16 T={T}: {wrong}" for T in (1, 5)),
        *(f"{names[1]} bf16 T={T}: left out, not enough memory" for T in (1, 5)),
    ]
    text = capsys.readouterr().out
    assert text.count("measured 2 of 10 tiles of up, 2 of 22 of down") == 2 and "--seconds=0 was too little" in text


def test_a_shape_is_an_option_or_its_sizes() -> None:
    """As the names in folders of runs."""
    assert shape_of("mixtral_8x7b") == Shape(8, 2, 4096, 14336)
    assert shape_of("E48-K6-D1024-F512") == Shape(48, 6, 1024, 512)
    with pytest.raises(ValueError, match="mixtrl"):
        shape_of("mixtrl")
