"""benchmarks/turns.py: one process at a time runs, however the one before it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.turns import Turns
from tests import tiny

COUNTS = """
import sys, time
from pathlib import Path
from benchmarks.turns import Turns
turns, log = Turns(Path(sys.argv[1])), Path(sys.argv[1]) / "log"
print("here", flush=True)
for i in range(10**6):
    log.write_text(str(i))
    time.sleep(0.001)
"""
TIMES = """
import sys, time
from pathlib import Path
from benchmarks.turns import Turns
turns = Turns(Path(sys.argv[1]))
print("here", flush=True)
with turns.alone():
    print("alone", flush=True)
    time.sleep(1000)
"""


@contextmanager
def started(code: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()


def state(process: subprocess.Popen[str]) -> str:
    """`T` is a stopped one."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_until_it_runs(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 20
    while state(process) == "T":
        assert time.monotonic() < deadline, "it is still stopped"
        time.sleep(0.01)


@pytest.fixture
def in_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own process stays in its group."""
    monkeypatch.setattr("os.setpgid", lambda *_: None)


@pytest.mark.usefixtures("in_a_group")
def test_others_stand_still_in_a_turn(tmp_path: Path) -> None:
    """And go on after it, also after one that fails."""
    turns = Turns(tmp_path)

    def time_something(other: subprocess.Popen[str]) -> None:
        with turns.alone():
            while state(other) != "T":
                time.sleep(0.01)
            before = (tmp_path / "log").read_text()
            time.sleep(0.1)
            assert (tmp_path / "log").read_text() == before
            raise RuntimeError("it fails")

    with started(COUNTS, tmp_path) as other:
        with pytest.raises(RuntimeError, match="it fails"):
            time_something(other)
        wait_until_it_runs(other)


@pytest.mark.parametrize("how", [pytest.param(signal.SIGTERM, id="ended"), pytest.param(signal.SIGKILL, id="killed")])
@pytest.mark.usefixtures("in_a_group")
def test_others_go_on_when_it_dies_in_its_turn(tmp_path: Path, how: signal.Signals) -> None:
    """And the next has its turn; the file of the dead one is removed."""
    with started(COUNTS, tmp_path) as other, started(TIMES, tmp_path) as timing:
        while state(other) != "T":
            time.sleep(0.01)
        timing.send_signal(how)
        timing.wait()
        wait_until_it_runs(other)
        with Turns(tmp_path).alone():
            assert not (tmp_path / str(timing.pid)).exists() and (tmp_path / str(other.pid)).exists()


@pytest.mark.usefixtures("in_a_group")
def test_one_turn_at_a_time(tmp_path: Path) -> None:
    """Whoever is second waits, and is stopped while it does; so does one that comes in a turn."""
    turns = Turns(tmp_path)
    with started(TIMES, tmp_path) as second:
        assert second.stdout is not None and second.stdout.readline() == "alone\n"
        third = subprocess.Popen([sys.executable, "-c", COUNTS, str(tmp_path)], cwd=tiny.ROOT)
        time.sleep(0.5)
        assert not (tmp_path / "log").exists()
        second.kill()
        second.wait()
        with turns.alone():
            pass
        while not (tmp_path / "log").exists():
            time.sleep(0.01)
        third.kill()
        third.wait()


WATCHES = """
import sys, time
from pathlib import Path
from benchmarks.turns import Turns
turns = Turns(Path(sys.argv[1]))
clock, other = turns.clock(), time.perf_counter()
print("here", flush=True)
for _ in range(10**4):
    if (Path(sys.argv[1]) / "seconds").exists():
        break
    time.sleep(0.001)
print(turns.clock() - clock, time.perf_counter() - other, flush=True)
"""


@pytest.mark.usefixtures("in_a_group")
def test_the_clock_stands_still_in_turns_of_others(tmp_path: Path) -> None:
    """So a limit of seconds is one of those in which a process runs."""
    turns = Turns(tmp_path)
    with started(WATCHES, tmp_path) as other:
        with turns.alone():
            while state(other) != "T":
                time.sleep(0.01)
            time.sleep(1)
        assert other.stdout is not None
        ran, passed = map(float, other.stdout.readline().split())
    assert passed > 1 and ran < passed - 1


def test_without_a_folder_nobody_is_stopped() -> None:
    """And no group is made."""
    before, clock = os.getpgrp(), Turns(None).clock()
    with Turns(None).alone():
        assert os.getpgrp() == before
    assert 0 <= time.perf_counter() - clock < 60
