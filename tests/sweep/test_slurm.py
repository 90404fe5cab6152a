"""sweep/slurm.py: the commands of a real Slurm, where it can be started."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from moe_lab.errors import UnavailableError
from moe_lab.sweep import slurm
from scripts import cluster

pytest.importorskip("submitit", reason="submitit is not installed (pip install '.[slurm]')")

ROOT = Path(__file__).resolve().parent.parent.parent  # tests.tiny has it too, and imports torch, as each job would

OPTIONS = {
    "partition": None,
    "account": None,
    "qos": None,
    "constraint": None,
    "gres": None,
    "mem": None,
    "time": "00:05:00",
    "setup": [],
    "python": None,
    "options": {},
}


def write_place(path: str) -> None:
    """A job: where it ran, and with which signal it was told to end."""
    Path(path).write_text(os.environ["SLURMD_NODENAME"])


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def wait_for(name: str, wanted: set[str]) -> dict[str, slurm.State]:
    deadline = time.monotonic() + 60
    while True:
        states = slurm.states(name)
        if {state.name for state in states.values()} == wanted:
            return states
        assert time.monotonic() < deadline, states
        time.sleep(0.1)


@pytest.fixture(autouse=True)
def _jobs_find_this_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_an_array_runs_on_both_nodes(slurm_cluster: cluster.Cluster, tmp_path: Path) -> None:
    """A job for each call, a number for each job, and a log under the name that messages give."""
    files = [str(tmp_path / f"call{number}") for number in range(4)]
    jobs = slurm.submit(tmp_path / "jobs", "places", OPTIONS, write_place, files)
    assert len(set(jobs)) == 4
    states = wait_for("places", {"COMPLETED"})
    assert set(states) == set(jobs)
    assert {Path(file).read_text() for file in files} <= set(slurm.nodes(None)) == {"node1", "node2"}
    assert all((tmp_path / "jobs" / slurm.LOG.format(job=job)).is_file() for job in jobs)


def test_a_limit_of_jobs_at_once_and_cancelling(slurm_cluster: cluster.Cluster, tmp_path: Path) -> None:
    """One runs, the others wait; those that wait can be cancelled alone."""
    jobs = slurm.submit(tmp_path / "jobs", "sleepers", OPTIONS, sleep, [600.0] * 3, at_once=1)
    states = wait_for("sleepers", {"RUNNING", "PENDING"})
    running = [job for job, state in states.items() if state.name == "RUNNING"]
    assert len(running) == 1 and states[running[0]].node in ("node1", "node2")
    assert not states[running[0]].is_over
    slurm.cancel(jobs, only_waiting=True)
    states = wait_for("sleepers", {"RUNNING", "CANCELLED"})
    assert [job for job, state in states.items() if not state.is_over] == running
    slurm.cancel(jobs)
    wait_for("sleepers", {"CANCELLED"})


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        pytest.param({"partition": "nowhere"}, "invalid partition specified: nowhere", id="partition"),
        pytest.param({"gres": "tpu:1"}, "Invalid generic resource", id="gres"),
        pytest.param({"options": {"no-such-option": 1}}, "unrecognized option", id="option"),
    ],
)
def test_what_slurm_refuses_is_one_line(
    options: dict[str, object],
    complaint: str,
    slurm_cluster: cluster.Cluster,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Slurm's own words behind the key; nothing else is printed."""
    with pytest.raises(UnavailableError, match=rf"^sweep\.slurm: .*{complaint}") as raised:
        slurm.submit(tmp_path, "refused", {**OPTIONS, **options}, sleep, [0.0])
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_without_slurm_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sbatch here."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        UnavailableError, match=r"^sweep\.engine=slurm: sbatch is not on the PATH; start the sweep on a"
    ):
        slurm.require_commands()


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_is_one_line(slurm_cluster: cluster.Cluster) -> None:
    """slurmctld is gone for a while; it knows the jobs again when it is back."""
    slurm_cluster.kill("slurmctld")
    try:
        with pytest.raises(
            UnavailableError, match=r"^sweep\.engine=slurm: squeue: .*Unable to contact slurm controller"
        ):
            slurm.states("any")
    finally:
        slurm_cluster.start("slurmctld")


def test_a_sweep_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its folder, however that is written; another folder of the same name has another."""
    (tmp_path / "a" / "swap").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    assert slurm.job_name(Path("swap")) == slurm.job_name(tmp_path / "a" / "swap") != slurm.job_name(tmp_path / "swap")
    assert slurm.job_name(Path("swap")).startswith("moe-lab:swap:")
    assert slurm.job_name(Path("a,b\nc")).startswith("moe-lab:a_b_c:")  # a list for squeue, a line of a script
