"""measure/blocks.py: blocks that are looked at, and repeated where the machine throttled."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import moe_lab
from moe_lab.measure import blocks, contention
from moe_lab.measure.blocks import MOST_REPEATS, Blocks, Seen
from moe_lab.measure.contention import Watch
from moe_lab.measure.device_lock import DeviceLock
from tests import quick


@pytest.fixture
def counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """How often a CPU was too hot, as Linux counts it; a container's quota is not looked at."""
    path = tmp_path / "cpu0/thermal_throttle/core_throttle_count"
    path.parent.mkdir(parents=True)
    path.write_text("7")
    monkeypatch.setattr(contention, "_CPU", tmp_path)
    monkeypatch.setattr(contention, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(blocks, "PAUSE_S", 0.0)
    return path


class Heating:
    """Blocks of which those with these numbers find the CPU too hot."""

    def __init__(self, counter: Path, hot: range | set[int]):
        self.counter, self.hot, self.n = counter, hot, 0

    def __call__(self) -> int:
        if self.n in self.hot:
            self.counter.write_text(str(int(self.counter.read_text()) + 1))
        self.n += 1
        return self.n - 1


def timed(counter: Path, hot: range | set[int], n: int, *, repeats: bool) -> tuple[list[tuple[int, Seen]], Watch]:
    watch, block = Watch(DeviceLock("cpus_test")), Heating(counter, hot)
    watch.start([os.getpid()])
    looked = Blocks(watch, None, repeats=repeats)
    found = [looked.timed(block) for _ in range(n)]
    watch.stop()
    return found, watch


def test_a_throttled_block_is_marked_and_kept(counter: Path) -> None:
    """Only that one."""
    found, watch = timed(counter, {1}, 3, repeats=False)
    assert found == [(0, Seen()), (1, Seen("CPU temperature")), (2, Seen())]
    assert watch.seen()["throttled"] == "CPU temperature"


def test_a_throttled_block_is_repeated_until_it_is_not(counter: Path) -> None:
    """What was discarded leaves no trace in what was kept, but its number."""
    found, watch = timed(counter, {1, 2}, 3, repeats=True)
    assert found == [(0, Seen()), (3, Seen("", 2)), (4, Seen())]
    assert watch.seen()["throttled"] == ""


def test_repeats_have_a_bound(counter: Path) -> None:
    """A machine that always throttles is measured as it is; the bound is one for all blocks."""
    found, watch = timed(counter, range(100), 3, repeats=True)
    hot = "CPU temperature"
    assert found == [(10, Seen(hot, MOST_REPEATS)), (11, Seen(hot)), (12, Seen(hot))]
    assert watch.seen()["throttled"] == hot


@pytest.mark.parametrize("keeps", [pytest.param(True, id="keep"), pytest.param(False, id="repeat")])
def test_a_run_says_which_of_its_blocks_were_throttled(
    keeps: bool, counter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of three; the samples that are kept are of three blocks either way."""
    hot, time_block = [True], moe_lab.runs.run.Run.time_block

    def heating(self: moe_lab.runs.run.Run, n: int) -> object:
        if hot:
            hot.pop()
            counter.write_text("8")
        return time_block(self, n)

    monkeypatch.setattr(moe_lab.runs.run.Run, "time_block", heating)
    option = "measure.throttled=" + ("keep" if keeps else "repeat")
    record = moe_lab.run(quick.compose("minimal", option, "measure.max_time_s=0.01"), tmp_path / "run")
    latency = record.latency_ms
    assert latency is not None and record.contention is not None
    assert (latency.throttled_blocks, latency.repeated_blocks) == ((1, 0) if keeps else (0, 1))
    assert any("throttled by CPU temperature" in text for text in record.warnings) == keeps
    with np.load(tmp_path / "run/samples.npz") as samples:
        assert samples["throttled"].any() == keeps and len(samples["throttled"]) == latency.n
