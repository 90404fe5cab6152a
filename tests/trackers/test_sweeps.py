"""Real sweeps with trackers: kill -9, a server that goes away, and what is timed meanwhile."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import moe_lab
from moe_lab.config.trackers import TRACKERS
from moe_lab.records import store
from moe_lab.records.schema import Record
from moe_lab.trackers.sender import Sender
from tests import quick
from tests.trackers import readers
from tests.trackers.server import Server
from tests.waiting import becomes_true

MOE_LAB = [sys.executable, "-m", "moe_lab"]
AXES = ["batch=1,2,3,5"]  # four groups


def command(*more: str) -> list[str]:
    """A sweep of four groups in outputs/s."""
    start = [text for text in quick.overrides("minimal") if not text.startswith("batch=")]
    return [*MOE_LAB, "-m", *start, *AXES, "sweep.name=s", "sweep.report=false", *more]


def run(*arguments: str, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """It ends within ten minutes."""
    return subprocess.run(list(arguments), cwd=cwd, capture_output=True, text=True, timeout=600, **options)  # type: ignore[call-overload, no-any-return]


def records(cwd: Path) -> list[Record]:
    """Of all cells."""
    return [store.read_record(path.parent) for path in sorted((cwd / "outputs/s").glob("*/result.json"))]


def n_noted(cwd: Path) -> int:
    """Cells whose sending was noted."""
    return len(list((cwd / "outputs/s").glob(f"*/{store.SENT}")))


def senders_of(parent: int) -> list[int]:
    """The processes that send for a sweep."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"moe_lab.trackers.sender" in words and str(parent).encode() in words:
            found.append(int(path.parent.name))
    return found


def _killed_while_sending(words: list[str], cwd: Path, n_before: int) -> None:
    """Start a sweep, and kill -9 it while it sends, after so many cells have been noted."""
    with subprocess.Popen(words, cwd=cwd, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        # Looked at often: the sender of the last noted cell has to be gone, and the next one to be at work.
        becomes_true(lambda: process.poll() is not None or (n_noted(cwd) >= n_before and senders_of(process.pid)))
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.7 * n_before)  # in its imports, or later
        process.kill()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc")
@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in TRACKERS])
def test_a_sweep_that_is_killed_while_it_sends_has_each_cell_once(name: str, tmp_path: Path) -> None:
    """Twice, at different moments; the same command then sends what is missing, and nothing twice."""
    pytest.importorskip(name)
    words = command(*readers.overrides_of(name, tmp_path))
    for n_before in (1, 2):
        _killed_while_sending(words, tmp_path, n_before)
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cell_ids = sorted(record.cell_id for record in records(tmp_path))
    assert len(cell_ids) == 4
    seen = readers.of(name, tmp_path)
    assert sorted(one.cell_id for one in seen) == cell_ids
    assert len({one.parent for one in seen}) == 1
    assert [
        record.warnings for record in records(tmp_path) if any("not sent" in text for text in record.warnings)
    ] == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that runs."""
    made = Server(tmp_path)
    made.start()
    yield made
    made.stop()


@pytest.mark.slow
def test_a_server_that_goes_away_costs_no_result(server: Server, tmp_path: Path) -> None:
    """Stopped after the first group: all cells are measured, and rows say what was not sent. Once it is back, it is."""
    pytest.importorskip("mlflow")
    words = command("tracker=mlflow", f"tracker.mlflow.uri={server.uri}", "tracker.mlflow.timeout_s=60")
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        becomes_true(lambda: process.poll() is not None or n_noted(tmp_path))
        server.stop()
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait() == 0
    assert "not sent to mlflow: " in said and "tried again at the end" in said
    assert [record.status for record in records(tmp_path)] == ["ok"] * 4
    warned = [record for record in records(tmp_path) if any("not sent to mlflow" in text for text in record.warnings)]
    assert 1 <= len(warned) <= 3
    table = moe_lab.load(tmp_path / "outputs/s")
    assert sum("not sent to mlflow" in str(texts) for texts in table["warnings"]) == len(warned)
    server.start()
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0 and "0 to run" in done.stderr
    assert sorted(one.cell_id for one in readers.mlflow(server.uri)) == sorted(r.cell_id for r in records(tmp_path))
    ((status, _),) = readers.mlflow_sweeps(server.uri).values()
    assert status == "FINISHED"
    assert not any("not sent" in text for record in records(tmp_path) for text in record.warnings)


@pytest.mark.slow
def test_nothing_is_sent_while_anything_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No sample was taken between the start and the end of a sender; each group is sent before the next."""
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    sendings: list[tuple[float, float, int]] = []
    enter, leave = Sender.__enter__, Sender.__exit__

    def begin(self: Sender) -> Sender:
        self.begun = time.perf_counter()  # type: ignore[attr-defined]
        return enter(self)

    def end(self: Sender, *error: object) -> None:
        leave(self, *error)  # type: ignore[arg-type]
        sendings.append((self.begun, time.perf_counter(), len(self._job.cells)))  # type: ignore[attr-defined]

    monkeypatch.setattr(Sender, "__enter__", begin)
    monkeypatch.setattr(Sender, "__exit__", end)
    moe_lab.multirun([*command()[4:], "tracker=tensorboard"])
    stamps = [np.load(path)["stamp_s"] for path in sorted((tmp_path / "outputs/s").glob("*/samples.npz"))]
    assert len(stamps) == 4 and [number for _, _, number in sendings] == [0, 1, 1, 1, 1, 0]
    for begun, ended, _ in sendings:
        for stamp_s in stamps:
            assert not ((begun <= stamp_s) & (stamp_s <= ended)).any()
    first, last = min(map(np.min, stamps)), max(map(np.max, stamps))
    assert sendings[0][1] < first < sendings[1][0] < sendings[3][1] < last < sendings[4][0]  # the same clock


@pytest.mark.slow
def test_with_several_slots_all_is_sent_at_the_end(tmp_path: Path) -> None:
    """Some slot is always timing."""
    pytest.importorskip("tensorboard")
    words = command(*readers.overrides_of("tensorboard", tmp_path), "sweep.slots.cpu=1")
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(one.cell_id for one in readers.of("tensorboard", tmp_path)) == sorted(
        record.cell_id for record in records(tmp_path)
    )
    noted = [path.stat().st_mtime for path in (tmp_path / "outputs/s").glob(f"*/{store.SENT}")]
    written = [path.stat().st_mtime for path in (tmp_path / "outputs/s").glob("*/samples.npz")]
    assert len(noted) == 4 and max(written) < min(noted)


@pytest.mark.parametrize(
    "plan", [pytest.param([], id="sweep"), pytest.param(["plan"], id="plan", marks=pytest.mark.slow)]
)
def test_a_tracker_that_is_not_installed_is_said_before_the_sweep(plan: list[str], tmp_path: Path) -> None:
    """Exit code 2, one line, and no folder."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'trackio' else find(name, package)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = run(*MOE_LAB, *plan, *command("tracker=trackio")[3:], cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert (
        done.stderr
        == "moe-lab: tracker=trackio: needs trackio; pip install 'moe-lab[trackers]', or leave tracker out.\n"
    )
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("word", "says"),
    [
        pytest.param("tracker=mlflow,wandb", r"not an axis, .*; several trackers are tracker=\[A,B\]", id="group"),
        pytest.param("tracker.mlflow.timeout_s=1,2", "not an axis, .*; choose one value", id="key"),
        pytest.param("sweep.variants=[{tracker: mlflow}]", "tracker.* holds for the whole sweep", id="entry"),
    ],
)
def test_a_tracker_is_not_an_axis(word: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell goes to all of them."""
    monkeypatch.chdir(tmp_path)
    more = ["tracker=mlflow"] if "timeout_s" in word else []
    with pytest.raises(ValueError, match=says):
        moe_lab.multirun([*quick.overrides("minimal"), *more, word])


@pytest.mark.slow
def test_a_single_run_is_sent_after_its_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the command line and from Python; a newer run of the cell takes the place of the older."""
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    overrides = [*quick.overrides("minimal"), *readers.overrides_of("tensorboard", tmp_path)]
    done = run(*MOE_LAB, *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (first,) = readers.of("tensorboard", tmp_path)
    result = moe_lab.run(overrides)
    (second,) = readers.of("tensorboard", tmp_path)
    assert first.cell_id == second.cell_id == result.cell_id
    assert result.latency_ms is not None
    assert second.metrics["latency_ms.p50"] == pytest.approx(result.latency_ms.p50, rel=1e-6)
    assert first.metrics != second.metrics
    (tmp_path / "events").rename(tmp_path / "gone")
    (tmp_path / "events").write_text("no folder")
    done = run(*MOE_LAB, *overrides, cwd=tmp_path)
    assert done.returncode == 0
    assert re.search(r"moe-lab: not sent to tensorboard: .*; the same command measures again", done.stderr)
    assert "not sent to tensorboard" in done.stdout  # the row's warning


@pytest.mark.slow
def test_a_finished_sweep_is_sent_to_a_tracker_that_is_new(tmp_path: Path) -> None:
    """Nothing is stale, nothing runs, and the folder is the same; Ctrl-C while it sends loses nothing either."""
    pytest.importorskip("tensorboard")
    base = [word for word in command() if not word.startswith("sweep.name")]
    done = run(*base, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    before = {path: path.read_bytes() for path in folder.glob("*/result.json")}
    words = [*base, *readers.overrides_of("tensorboard", tmp_path)]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        becomes_true(lambda: process.poll() is not None or senders_of(process.pid))
        os.killpg(process.pid, signal.SIGINT)
        process.communicate()
    assert process.returncode == 130
    assert not list((tmp_path / "events").rglob("events.out.*")), "who stops it does not wait for a tracker"
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0 and "4 done; 0 to run" in done.stderr, shlex.join(words)
    assert sorted(one.cell_id for one in readers.of("tensorboard", tmp_path)) == sorted(
        store.read_record(path.parent).cell_id for path in before
    )
    assert {path: path.read_bytes() for path in folder.glob("*/result.json")} == before


@pytest.mark.slow
def test_a_finished_sweep_sends_nothing_when_it_runs_again(tmp_path: Path) -> None:
    """Its report, tables and plots are written anew, and are the same."""
    pytest.importorskip("tensorboard")
    words = [word for word in command() if word != "sweep.report=false"]
    words += readers.overrides_of("tensorboard", tmp_path)
    folder = tmp_path / "outputs/s"
    assert run(*words, cwd=tmp_path).returncode == 0
    page, noted = (folder / "report.html").read_bytes(), (folder / store.SENT).read_bytes()
    (folder / store.TRACKERS_LOG).write_text("each process begins it anew")
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0 and "0 to run" in done.stderr
    assert (folder / "report.html").read_bytes() == page
    assert (folder / store.SENT).read_bytes() == noted
    assert (folder / store.TRACKERS_LOG).read_text() == "each process begins it anew"
