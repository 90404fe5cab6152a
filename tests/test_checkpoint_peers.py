"""checkpoint_peers: its cells, its table, and peers that fail beside others that go on."""

from __future__ import annotations

import argparse
import csv
import gc
import re
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from benchmarks import check, checkpoint_peers
from benchmarks.checkpoint_peers import Cell, Loaded, PlainPeer, row
from benchmarks.plain_decoder import PlainDecoder, Way
from benchmarks.turns import Turns
from moe_lab.measure.clocks import Block, Step
from tests import tiny


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(
        sys, "argv", ["checkpoint_peers", "--path", str(tiny.ROOT / "assets/tiny-qwen3-moe"), "--text", ""]
    )
    sys.argv += map(str, arguments)
    return checkpoint_peers.main()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("decode:8", id="no_length"),
        pytest.param("decode:8:0", id="nothing"),
        pytest.param("decode:8:2k", id="no_number"),
        pytest.param("forward:8:128", id="no_phase"),
        pytest.param("prefill:1:128:2", id="too_many"),
    ],
)
def test_what_is_no_cell_is_refused(text: str) -> None:
    """The message says how one is written."""
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be prefill:BATCH:TOKENS or decode:BATCH:CONTEXT$"):
        Cell.parse(text)


def test_a_cell_is_written_as_it_is_read() -> None:
    assert Cell.parse("decode:64:8192") == ("decode", 64, 8192) and str(Cell("prefill", 1, 37)) == "prefill:1:37"


@pytest.mark.parametrize(
    ("ms", "line", "is_slower"),
    [
        pytest.param(
            {"ours": [1.0] * 6, "a": [2.0] * 6, "b": [1.25] * 6},
            "| decode:1:8 | 0.5 | 1 (50%) | 2 (0.500 [0.500, 0.500]) | 1.25 (0.800 [0.800, 0.800]) "
            "| 0.800 [0.800, 0.800] |",
            False,
            id="faster",
        ),
        pytest.param(
            {"ours": [1.0] * 6, "b": [0.5] * 6},
            "| decode:1:8 | 0.5 | 1 (50%) | fails | 0.5 (2.000 [2.000, 2.000]) | 2.000 [2.000, 2.000] |",
            True,
            id="slower_and_one_fails",
        ),
        pytest.param(
            {"ours": [1.0] * 5, "b": [0.5] * 5},
            "| decode:1:8 | 0.5 | 1 (50%) | fails | 0.5 (2.000 [no interval]) | 2.000 [no interval] |",
            False,
            id="few_rounds",
        ),
        pytest.param({"ours": [1.0] * 6}, "| decode:1:8 | 0.5 | 1 (50%) | fails | fails | - |", False, id="no_peer"),
        pytest.param({}, "| decode:1:8 | - | fails | fails | fails | - |", False, id="ours_fails"),
    ],
)
def test_a_line_of_the_table(ms: dict[str, list[float]], line: str, is_slower: bool) -> None:
    """Every peer has its median and the ratio ours / peer of the rounds."""
    assert row(Cell("decode", 1, 8), {name: np.array(each) for name, each in ms.items()}, ["a", "b"], 0.5) == (
        line,
        is_slower,
    )


@pytest.mark.slow
def test_the_floor_is_that_of_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of the steps that are timed; a prefill has none, for it computes more than it reads."""
    monkeypatch.setattr(checkpoint_peers, "measured_peaks", lambda device, dtype: {"bytes_per_s": 1e9})
    options = argparse.Namespace(**vars(_options()), peers=[], rounds=1)
    with torch.inference_mode():
        cells = (Cell("decode", 2, 9), Cell("prefill", 2, 9))
        decode, prefill = (checkpoint_peers.time_cell(options, cell, Loaded({}), Turns(None)) for cell in cells)
    built = checkpoint_peers.ours(options, Cell("decode", 2, 9), {})
    assert decode.floor_ms == pytest.approx(built.least_bytes(checkpoint_peers.STEPS) / 1e6)
    assert prefill.floor_ms is None


def test_bench_check_reads_the_last_ratio_of_a_line() -> None:
    """Not that of a peer before it."""
    ms = {name: np.full(6, value) for name, value in (("ours", 1.0), ("a", 1.25), ("b", 2.0))}
    line, _ = row(Cell("decode", 1, 256), ms, ["a", "b"], 0.5)
    (quote,) = [each for each in check.CHECKS["checkpoint_peers --rounds 10"] if "decode, batch 1" in each.text]
    assert quote.find(quote.printed, line) == 0.8


@pytest.mark.slow
def test_what_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A peer, and a cell longer than the model's sequences; the exit code tells of the latter."""
    cells = ["decode:2:9", "decode:1:5000", "prefill:1:9"]
    arguments = ("--rounds", "2", "--peers", "no_such", "grouped_mm", "plain", "--out", tmp_path, "--cells", *cells)
    assert run(monkeypatch, *arguments) == 1
    out, err = capsys.readouterr()
    numbers = {line.split(" | ")[0]: line.split(" | ")[2:6] for line in out.splitlines() if ":" in line.split(" | ")[0]}
    which = {cell: [number == "fails" for number in numbers[f"| {cell}"]] for cell in cells}
    assert which == {
        "decode:2:9": [False, True, False, False],
        "decode:1:5000": [True] * 4,
        "prefill:1:9": [False, True, False, False],
    }
    assert "no_such does not run here: ValueError" in err and "decode:1:5000: ours does not run here" in err
    assert "plain (attention sums, products torch, experts gathered): " in err
    with open(tmp_path / "checkpoint_peers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2 and all((row["floor_ms"] == "") == row["cell"].startswith("prefill") for row in rows)
    how = {row["implementation"]: row["how"] for row in rows if row["cell"] == "decode:2:9"}
    assert how["ours"] == "eager" and how["grouped_mm"] == "sdpa, not compiled"
    assert re.fullmatch(r"not compiled: attention \w+, products torch, experts \w+", how["plain"])


def test_a_peer_that_computes_something_else_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its times would say nothing."""
    right = PlainDecoder.__call__

    def wrong(self: PlainDecoder, *arguments: Any) -> Tensor:
        return right(self, *arguments) + 0.1 * torch.randn(256)

    monkeypatch.setattr(PlainDecoder, "__call__", wrong)
    assert run(monkeypatch, "--rounds", "2", "--peers", "plain", "--cells", "decode:1:9") == 0
    out, err = capsys.readouterr()
    assert "| fails | - |" in out
    assert "experts gathered) does not run here: ValueError: plain (attention sums, " in err
    assert "computes a different result: relative error" in err


@torch.inference_mode()
def test_the_fastest_way_is_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One that cannot run leaves the others; if none can, the peer cannot."""
    cell, right, ran = Cell("decode", 2, 9), PlainDecoder.__call__, []
    broken = [Way("sdpa", "torch", "grouped")]

    def step(self: PlainDecoder, ids: Tensor, position: Tensor, way: Way) -> Tensor:
        ran.append(way)
        if way in broken:
            raise RuntimeError("out of memory\nmore")
        return right(self, ids, position, way)

    monkeypatch.setattr(PlainDecoder, "__call__", step)

    ms = {("sums", "grouped"): 2.0, ("sums", "gathered"): 1.0, ("sdpa", "gathered"): 3.0}

    def time_block(self: Step, n: int) -> Block:
        self()
        way: Any = self.model.way
        return Block(np.array([ms[way.attention, way.experts]]), np.zeros(1))

    monkeypatch.setattr(Step, "time_block", time_block)
    built = checkpoint_peers.ours(_options(), cell, {})
    mine_BV = checkpoint_peers.our_logits(cell, built).clone()
    peer = PlainPeer(cell, built, mine_BV)
    peer.settle()
    peer.step(9)
    assert ran[-1] == Way("sums", "torch", "gathered") and peer.how == f"not compiled: {ran[-1]}"
    err = capsys.readouterr().err
    assert "plain (attention sdpa, products torch, experts grouped) does not run here: RuntimeError: out of mem" in err
    assert re.findall(r"^plain \(attention (\w+), products torch, experts (\w+)\): (\d) ms$", err, re.MULTILINE) == [
        (*way, f"{value:g}") for way, value in ms.items()
    ]
    cut = PlainPeer(cell, built, mine_BV, limit_s=0)
    cut.settle()
    assert list(cut.steps) == [Way("sums", "torch", "grouped")] and cut.how.count("; not tried: attention ") == 3
    assert len(PlainPeer(cell, built, mine_BV, limit_s=0, clock=lambda: 7.0).steps) == 3  # it stands still in turns
    broken += ran
    with pytest.raises(RuntimeError, match="no way that it can be written in runs"):
        PlainPeer(cell, built, mine_BV, limit_s=0)


@torch.inference_mode()
def test_a_way_that_fails_holds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what it was raised from: a compiler's errors have several that hold each other."""
    held: list[weakref.ref[Tensor]] = []

    def fail(*_: Any) -> Tensor:
        try:
            large = torch.ones(3)
            held.append(weakref.ref(large))
            raise KeyError("first")
        except KeyError as first:
            raise ValueError("second") from first

    cell = Cell("decode", 1, 9)
    built = checkpoint_peers.ours(_options(), cell, {})
    monkeypatch.setattr(PlainDecoder, "__call__", fail)
    with pytest.raises(RuntimeError) as raised:
        PlainPeer(cell, built, torch.ones(1, 1))
    gc.collect()
    assert raised.value and held and all(reference() is None for reference in held)


def break_after(monkeypatch: pytest.MonkeyPatch, function: str, *, stays: bool = True) -> None:
    """Make CUDA report an error from the first call of `function` on, as a kernel does that runs behind the host."""
    done: list[str] = []
    right, wait = getattr(checkpoint_peers, function), checkpoint_peers.synchronize

    def call(*arguments: Any) -> Any:
        done.append(function)
        return right(*arguments)

    def synchronize(device: torch.device) -> None:
        wait(device)
        if done:
            if not stays:
                done.clear()
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(checkpoint_peers, function, call)
    monkeypatch.setattr(checkpoint_peers, "synchronize", synchronize)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        pytest.param("ours", "ours", id="ours"),
        pytest.param("peer_model", "grouped_mm", id="transformers"),
        pytest.param("PlainStep", "plain (attention sums, products torch, experts gathered)", id="plain"),
    ],
)
def test_a_cuda_error_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, function: str, name: str
) -> None:
    """It says in which cell and in whose work; nothing after it would be a result."""
    break_after(monkeypatch, function)
    arguments = ("--peers", "grouped_mm", "plain", "--rounds", "2", "--cells", "decode:1:9", "prefill:1:9")
    with pytest.raises(SystemExit, match=rf"^decode:1:9: the work of {re.escape(name)} ended in a CUDA error"):
        run(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert f"decode:1:9: {name} does not run here: RuntimeError: CUDA error: an illegal memory access" in err
    assert "| decode" not in out and "prefill" not in err


def test_a_cuda_error_in_a_round_names_who_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    break_after(monkeypatch, "unchecked")
    with pytest.raises(SystemExit, match=r"^decode:1:9: the work of ours ended in a CUDA error"):
        run(monkeypatch, "--peers", "plain", "--rounds", "2", "--cells", "decode:1:9")


def test_an_error_that_does_not_stay_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_after(monkeypatch, "peer_model", stays=False)
    assert run(monkeypatch, "--peers", "grouped_mm", "plain", "--rounds", "2", "--cells", "decode:1:9") == 0
    out, err = capsys.readouterr()
    assert "| fails |" in out and "\ngrouped_mm does not run here: RuntimeError: CUDA error" in err


def test_a_peer_that_changes_what_it_is_lent_fails_the_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our keys and values are then others than those that we began with."""
    right = checkpoint_peers.Peer.begin

    def begin(self: Any) -> None:
        right(self)
        for layer in self.cache.layers if self.cache is not None else ():
            layer.values[:, :, :3] = 9

    monkeypatch.setattr(checkpoint_peers.Peer, "begin", begin)
    assert run(monkeypatch, "--peers", "grouped_mm", "--rounds", "2", "--cells", "decode:1:9") == 1
    assert "decode:1:9: ours does not run here: ValueError: ours, after the peers," in capsys.readouterr().err


def test_a_cell_is_prepared_beside_others_and_timed_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Compiling and checking are before the turn, the rounds in it; stderr has the seconds of each."""
    done: list[str] = []

    def noting(name: str, function: Any) -> Any:
        return lambda *arguments: done.append(name) or function(*arguments)

    for name in ("ours", "peer_of", "time_rounds"):
        monkeypatch.setattr(checkpoint_peers, name, noting(name, getattr(checkpoint_peers, name)))

    @contextmanager
    def alone(self: Turns) -> Iterator[None]:
        assert self.folder == tmp_path / "turns"
        done.append("begin")
        yield
        done.append("end")

    monkeypatch.setattr(Turns, "alone", alone)
    monkeypatch.setattr("os.setpgid", lambda *_: None)  # of the tests
    peers = ("--peers", "grouped_mm", "plain")
    assert run(monkeypatch, "--rounds", "2", *peers, "--turns", tmp_path / "turns", "--cells", "decode:1:9") == 0
    assert done == ["ours", "peer_of", "peer_of", "begin", "time_rounds", "end"]
    parts = re.findall(r"^decode:1:9: (.+): [\d.]+ s$", capsys.readouterr().err, re.MULTILINE)
    assert parts == ["ours", "grouped_mm", "plain", "its turn", "its turn, with waiting for it"]


def _options(**changed: str) -> argparse.Namespace:
    keys = {"path": str(tiny.ROOT / "assets/tiny-qwen3-moe"), "text": "", "device": "cpu", "dtype": "fp32"}
    return argparse.Namespace(**keys | changed, execution="eager", attention="sdpa", limit=float("inf"))
