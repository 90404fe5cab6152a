"""sweep/slurm_pool.py, sweep/slurm_job.py: sweeps in jobs of a real Slurm, where it can be started."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cluster_kills
from moe_lab.sweep import slurm_job
from moe_lab.sweep.slurm_job import Line, Mailbox
from scripts import cluster
from tests.tiny import ROOT

pytest.importorskip("submitit", reason="submitit is not installed (pip install '.[slurm]')")

MOE_LAB = [sys.executable, "-m", "moe_lab"]
SMALL = ["model=minimal", "model.hidden=37", "device=cpu", "measure.max_time_s=0.02", "measure.warmup_s=0"]
SMALL += ["sweep.report=false", "sweep.engine=slurm"]


def moe_lab(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """A command that is running."""
    return subprocess.Popen(
        [*MOE_LAB, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and what it said."""
    _, said = process.communicate(timeout=200)
    return process.returncode, said


def run(folder: Path, *words: str, **environment: str) -> tuple[int, str]:
    return ended(moe_lab(folder, *words, **environment))


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"outputs/{name}/*/result.json"))]


def becomes_true(question: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def jobs(state: str) -> list[str]:
    """The numbers of those in a state."""
    command = ["squeue", "--noheader", "--array", f"--states={state}", "--format=%i"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


@pytest.fixture(autouse=True)
def _no_jobs_are_left(slurm_cluster: cluster.Cluster) -> Iterator[None]:
    """A job of one test would keep the next waiting."""
    yield
    left = [*jobs("RUNNING"), *jobs("PENDING")]
    subprocess.run(["scancel", "--quiet", *left], check=True) if left else None
    becomes_true(lambda: not [*jobs("RUNNING"), *jobs("COMPLETING"), *jobs("PENDING")])


def test_a_sweep_runs_in_jobs(tmp_path: Path) -> None:
    """A group a job. The record says where it ran and on which CPUs; a second start has nothing to do."""
    code, said = run(tmp_path, "-m", *SMALL, "batch=1,2", "sweep.name=s")
    assert code == 0, said
    found = records(tmp_path, "s")
    assert [record["status"] for record in found] == ["ok", "ok"]
    for record in found:
        assert record["environment"]["cpus"] == 1
        job = record["environment"]["job"]
        assert (tmp_path / f"outputs/s/.slurm/{job}_0_log.out").is_file()
    assert len({record["environment"]["job"] for record in found}) == 2
    assert jobs("RUNNING") == []


# ---- a whole sweep, undisturbed and disturbed


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results of the sweep of `benchmarks.cluster_kills` on this machine."""
    return cluster_kills.without_a_cluster(tmp_path_factory.mktemp("local"))


@pytest.mark.slow
def test_a_sweep_equals_the_local_one(
    expected: dict[str, dict[str, Any]], slurm_cluster: cluster.Cluster, tmp_path: Path
) -> None:
    """Cell for cell: the cell_ids, verified, the same routes; and no cell ran twice."""
    sweep = cluster_kills.Sweep("slurm", slurm_cluster, tmp_path)
    sweep.start()
    assert sweep.ends() == 0, (tmp_path / "log").read_text()
    assert len(expected) == cluster_kills.N_CELLS
    assert cluster_kills.complaints(sweep.results(), expected) == []
    assert sweep.n_run_twice() == 0


@pytest.mark.slow
@pytest.mark.parametrize("kill", [pytest.param(kill, id=kill) for kill in cluster_kills.KILLS["slurm"]])
def test_a_disturbed_sweep_is_resumed(
    kill: str, expected: dict[str, dict[str, Any]], slurm_cluster: cluster.Cluster, tmp_path: Path
) -> None:
    """In the middle. The same command again, if it did not end well: then every cell is there, exactly once."""
    sweep = cluster_kills.Sweep("slurm", slurm_cluster, tmp_path)
    sweep.start()
    becomes_true(lambda: len(sweep.results()) >= 4)
    becomes_true(lambda: jobs("RUNNING"))
    assert cluster_kills.KILLS["slurm"][kill](sweep, random.Random(0)) != "nothing ran"
    n_commands = 1
    while sweep.ends() != 0:
        n_commands += 1
        assert n_commands < 4, (tmp_path / "log").read_text()
        sweep.start()
    assert cluster_kills.complaints(sweep.results(), expected) == [], (tmp_path / "log").read_text()
    assert sweep.n_run_twice() == 0


@pytest.mark.slow
def test_jobs_of_a_killed_driver_go_on(slurm_cluster: cluster.Cluster, tmp_path: Path) -> None:
    """The next start takes them over: nothing is cancelled, and no cell has two jobs."""
    sweep = cluster_kills.Sweep("slurm", slurm_cluster, tmp_path)
    sweep.start()
    becomes_true(lambda: jobs("RUNNING") and jobs("PENDING") and len(sweep.results()) >= 4)
    assert sweep.driver is not None
    sweep.driver.kill()
    sweep.driver.wait()
    before = {*jobs("RUNNING"), *jobs("PENDING")}
    (tmp_path / "log").unlink()
    sweep.start()
    assert sweep.ends() == 0
    said = (tmp_path / "log").read_text()
    assert "groups are in jobs of an earlier start; these go on" in said
    assert {*jobs("COMPLETED")} >= before
    assert sweep.n_run_twice() == 0


@pytest.mark.slow
def test_a_cancelled_job_is_told_from_a_failed_one(tmp_path: Path) -> None:
    """Its cells have no row that says failed, the others run, and the same command runs what is missing."""
    words = ["-m", *SMALL, "batch=1,2,3,4", "sweep.name=s", "sweep.slots.cpu=1"]
    process = moe_lab(tmp_path, *words)
    becomes_true(lambda: len(jobs("PENDING")) >= 2 and len(jobs("RUNNING")) == 1)
    cancelled = jobs("PENDING")[-1]
    subprocess.run(["scancel", cancelled], check=True)
    code, said = ended(process)
    assert code == 2
    assert f"job {cancelled} was cancelled" in said
    assert "1 cells were not run" in said.splitlines()[-1] and "to continue, run: " in said.splitlines()[-1]
    assert [record["status"] for record in records(tmp_path, "s")] == ["ok"] * 3
    code, said = run(tmp_path, *words)
    assert code == 0 and "3 done; 1 to run" in said


@pytest.mark.slow
def test_ctrl_c_lets_groups_end_that_run_and_cancels_those_that_wait(tmp_path: Path) -> None:
    """Exit code 130, and no job is left."""
    process = moe_lab(tmp_path, "-m", *SMALL, "batch=1,2,3,4", "sweep.name=s", "sweep.slots.cpu=1")
    becomes_true(lambda: len(jobs("PENDING")) >= 2 and len(jobs("RUNNING")) == 1)
    process.send_signal(signal.SIGINT)
    code, said = ended(process)
    assert code == 130 and "to continue, run: " in said
    assert [record["status"] for record in records(tmp_path, "s")] == ["ok"]
    assert jobs("RUNNING") == jobs("PENDING") == []


_SLOW = """
import time
from moe_lab.models.minimal import Minimal
"""


@pytest.mark.slow
def test_a_group_that_meets_its_limit_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """With a limit of a minute and cells that are timed for half of one each, alone: the job is put back, and no cell is timed twice."""
    words = ["-m", *SMALL, "batch=1,2,3", "sweep.compare=[batch]", "sweep.interleave=true", "sweep.name=s"]
    code, said = run(
        tmp_path, *words, "measure.max_time_s=30", "measure.target_ci=0.000001", "sweep.slurm.time=00:01:00"
    )
    assert code == 0, said


def test_lines_of_a_mailbox_come_once_and_whole(tmp_path: Path) -> None:
    """Half a line waits for its end."""
    (tmp_path / slurm_job.FOLDER).mkdir()
    writer, reader = Mailbox(tmp_path, "7"), Mailbox(tmp_path, "7")
    assert reader.new() == []
    writer.put(Line("begun", None, "node1"))
    with open(writer.path, "a") as file:
        file.write('["step", "cell", ')
        file.flush()
        assert reader.new() == [Line("begun", None, "node1")]
        file.write('"build", null]\n')
    assert reader.new() == [Line("step", "cell", "build")]
    assert reader.new() == []
