"""sweep/slurm_pool.py, sweep/slurm_job.py, sweep/slurm_asker.py: jobs of a real Slurm, where it can be started."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cluster_kills
from moe_lab.sweep import slurm, slurm_job
from moe_lab.sweep.slurm_job import GroupJob, Line, Mailbox
from moe_lab.sweep.tasks import Setup, Task
from scripts import cluster
from tests.tiny import ROOT
from tests.waiting import becomes_true

pytest.importorskip("submitit", reason="submitit is not installed (pip install '.[slurm]')")

MOE_LAB = [sys.executable, "-m", "moe_lab"]
TINY = ["model=minimal", "model.hidden=37", "device=cpu", "measure.warmup_s=0", "sweep.report=false"]
TINY += ["sweep.engine=slurm", "sweep.name=s"]
SMALL = [*TINY, "measure.max_time_s=0.02"]
LONG = [*TINY[2:], "model=moe_layer", "measure.target_ci=1e-9"]  # for as long as it may


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
    _, said = process.communicate(timeout=500)
    return process.returncode, said


def run(folder: Path, *words: str, **environment: str) -> tuple[int, str]:
    return ended(moe_lab(folder, *words, **environment))


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"outputs/{name}/*/result.json"))]


def jobs(state: str) -> list[str]:
    """The numbers of those in a state."""
    command = ["squeue", "--noheader", "--array", f"--states={state}", "--format=%i"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def told_of(folder: Path, group: str) -> list[Line]:
    """What was told of a group of the sweep, by the number of the job that was submitted for it."""
    return Mailbox(folder / "outputs/s", group).new()


def timed_in(folder: Path) -> list[str]:
    """The jobs of the sweep that time their own group now."""
    return [job for job in jobs("RUNNING") if {line.text for line in told_of(folder, job)} >= {"time", job}]


@pytest.fixture(autouse=True)
def _no_jobs_are_left(slurm_cluster: cluster.Cluster) -> Iterator[None]:
    """A job of one test would keep the next waiting."""
    yield
    left = [*jobs("RUNNING"), *jobs("PENDING")]
    subprocess.run(["scancel", "--quiet", *left], check=True) if left else None
    becomes_true(lambda: not [*jobs("RUNNING"), *jobs("COMPLETING"), *jobs("PENDING")])


@pytest.mark.slow
def test_a_sweep_runs_in_jobs(tmp_path: Path) -> None:
    """Two at once take five groups. The record says where each ran and on which CPUs."""
    code, said = run(tmp_path, "-m", *SMALL, "batch=1,2,3,4,5", "sweep.slots.cpu=2")
    assert code == 0, said
    found = records(tmp_path, "s")
    assert [record["status"] for record in found] == ["ok"] * 5
    for record in found:
        assert record["environment"]["cpus"] == 1
        job = record["environment"]["job"]
        assert (tmp_path / f"outputs/s/.slurm/{job}_0_log.out").is_file()
    assert len({record["environment"]["job"] for record in found}) <= 3  # a worker's imports take longer than a group
    assert jobs("RUNNING") == jobs("PENDING") == []


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
    assert sweep.n_run_twice == 0


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
    assert cluster_kills.KILLS["slurm"][kill](sweep, random.Random(0)) != cluster_kills.NOTHING
    n_commands = 1
    while sweep.ends() != 0:
        n_commands += 1
        assert n_commands < 4, (tmp_path / "log").read_text()
        sweep.start()
    said = (tmp_path / "log").read_text()
    assert cluster_kills.complaints(sweep.results(), expected) == [], said
    assert sweep.n_run_twice == 0
    assert kill != "scancel" or n_commands == 1 or "was cancelled" in said


@pytest.mark.slow
def test_jobs_of_a_killed_driver_go_on(tmp_path: Path) -> None:
    """`moe-lab status` shows them, and the next start takes them over: nothing is cancelled, no cell has two jobs."""
    words = ["-m", *LONG, "measure.max_time_s=8", "batch=1,2,3,4,5,6"]
    process = moe_lab(tmp_path, *words)
    becomes_true(lambda: jobs("PENDING") and len(timed_in(tmp_path)) == 2)
    process.kill()
    process.communicate()
    before = {*jobs("RUNNING"), *jobs("PENDING")}
    status = [*MOE_LAB, "status", "outputs/s"]
    told = subprocess.run(status, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.splitlines()
    assert {line.split()[0] for line in told[1:3]} == {"node1", "node2"}
    assert "; its driver is gone, but 2 of its jobs run and 4 wait; to go on with them, run: " in told[-1]
    code, said = run(tmp_path, *words)
    assert code == 0, said
    assert "groups are in jobs of an earlier start; these go on" in said
    found = records(tmp_path, "s")
    assert [record["status"] for record in found] == ["ok"] * 6
    assert {record["environment"]["job"] for record in found} <= before
    assert not list(tmp_path.rglob("stale-*"))


@pytest.mark.slow
def test_a_cancelled_job_is_told_from_a_failed_one(tmp_path: Path) -> None:
    """Its cell has no row that says failed, the others run, and the same command runs what is missing."""
    words = ["-m", *LONG, "measure.max_time_s=6", "batch=1,2,3", "sweep.slots.cpu=1"]
    process = moe_lab(tmp_path, *words)
    becomes_true(lambda: timed_in(tmp_path))
    (cancelled,) = timed_in(tmp_path)
    subprocess.run(["scancel", cancelled], check=True)
    code, said = ended(process)
    assert code == 2
    assert f"job {cancelled} was cancelled" in said
    assert "1 cells were not run" in said.splitlines()[-1] and "to continue, run: " in said.splitlines()[-1]
    reasons = [record["reason"] for record in records(tmp_path, "s")]
    assert reasons.count(None) == 2 and {*reasons} <= {None, "interrupted"}
    code, said = run(tmp_path, *words)
    assert code == 0 and "2 done; 1 to run" in said


@pytest.mark.slow
def test_jobs_that_run_take_the_groups_of_one_that_was_cancelled(tmp_path: Path) -> None:
    """A job that waits is a place for groups, and not the only one for its own."""
    process = moe_lab(tmp_path, "-m", *LONG, "measure.max_time_s=4", "batch=1,2,3", "sweep.slots.cpu=1")
    becomes_true(lambda: timed_in(tmp_path))
    subprocess.run(["scancel", jobs("PENDING")[-1]], check=True)
    code, said = ended(process)
    assert code == 0, said
    assert [record["status"] for record in records(tmp_path, "s")] == ["ok"] * 3


@pytest.mark.slow
def test_all_jobs_are_cancelled(tmp_path: Path) -> None:
    """None is left for the groups that wait: each says so, and nobody waits for ever."""
    process = moe_lab(tmp_path, "-m", *LONG, "measure.max_time_s=100", "batch=1,2,3", "sweep.slots.cpu=1")
    becomes_true(lambda: timed_in(tmp_path))
    subprocess.run(["scancel", *jobs("PENDING"), *jobs("RUNNING")], check=True)
    code, said = ended(process)
    assert code == 2 and said.count("was cancelled") >= 3 and "3 cells were not run" in said


@pytest.mark.slow
def test_a_job_that_is_cancelled_while_it_runs(tmp_path: Path) -> None:
    """Its cell was not run: it is not called failed, and a job in which it was timed is not started again."""
    process = moe_lab(tmp_path, "-m", *LONG, "measure.max_time_s=100", "batch=1")
    becomes_true(lambda: timed_in(tmp_path))
    (job,) = timed_in(tmp_path)
    subprocess.run(["scancel", job], check=True)
    code, said = ended(process)
    assert code == 2 and f"job {job} was cancelled" in said and "1 cells were not run" in said
    assert all(record["reason"] == "interrupted" for record in records(tmp_path, "s"))  # if there was time to write it
    assert jobs("RUNNING") == jobs("PENDING") == []


@pytest.mark.slow
def test_a_crash_is_a_row_as_on_one_machine(slurm_cluster: cluster.Cluster, tmp_path: Path) -> None:
    """A worker that is killed while it times: exit code 1, and nothing says that a cell was not run."""
    process = moe_lab(tmp_path, "-m", *LONG, "measure.max_time_s=100", "batch=1")
    becomes_true(lambda: timed_in(tmp_path))
    assert cluster_kills.Sweep("slurm", slurm_cluster, tmp_path).worker(random.Random(0)) == "killed"
    code, said = ended(process)
    assert code == 1, said
    (record,) = records(tmp_path, "s")
    assert record["reason"].startswith("crash: SIGKILL") and "not run" not in said


@pytest.mark.slow
def test_ctrl_c_lets_groups_end_that_run_and_cancels_those_that_wait(tmp_path: Path) -> None:
    """Exit code 130, and no job is left."""
    process = moe_lab(tmp_path, "-m", *LONG, "measure.max_time_s=5", "batch=1,2,3,4", "sweep.slots.cpu=1")
    becomes_true(lambda: timed_in(tmp_path))
    process.send_signal(signal.SIGINT)
    code, said = ended(process)
    assert code == 130 and "to continue, run: " in said
    assert [record["status"] for record in records(tmp_path, "s")] == ["ok"]
    assert jobs("RUNNING") == jobs("PENDING") == []


@pytest.mark.slow
def test_ctrl_c_twice_stops_the_groups_that_run(tmp_path: Path) -> None:
    """What was timed until then is in the record; nothing is left in the queue, and the cell will run again."""
    words = [*LONG, "measure.max_time_s=100", "batch=1"]
    process = moe_lab(tmp_path, "-m", *words)
    becomes_true(lambda: timed_in(tmp_path))
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    code, said = ended(process)
    assert code == 130 and "to continue, run: " in said
    (record,) = records(tmp_path, "s")
    assert record["reason"] == "interrupted"
    assert jobs("RUNNING") == jobs("PENDING") == []
    done = subprocess.run([*MOE_LAB, "plan", "-m", *words], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert "1 to run" in done.stdout


@pytest.mark.slow
def test_a_job_that_makes_place_for_another_goes_on_later(tmp_path: Path) -> None:
    """The signal of a preemption while a cell is timed: the job is put back into the queue, and its cell ends once."""
    process = moe_lab(tmp_path, "-m", *LONG, "measure.max_time_s=5", "batch=1")
    becomes_true(lambda: timed_in(tmp_path))
    (job,) = timed_in(tmp_path)
    subprocess.run(["scancel", f"--signal={slurm.LIMIT}", job], check=True)
    code, said = ended(process)
    assert code == 0, said
    kinds = [line.kind for line in told_of(tmp_path, job) if line.kind != "step"]
    assert kinds == ["begun", "preempted", "begun", "cell", "end"]
    (record,) = records(tmp_path, "s")
    assert record["status"] == "ok" and record["environment"]["job"] == job


@pytest.mark.slow
def test_a_limit_that_is_too_short_is_a_row(tmp_path: Path) -> None:
    """A minute for a cell that is timed for five: two jobs, and then it failed, with the key that says how long."""
    code, said = run(tmp_path, "-m", *LONG, "measure.max_time_s=300", "batch=1", "sweep.slurm.time=00:01:00")
    assert code == 1, said
    (record,) = records(tmp_path, "s")
    assert record["status"] == "failed"
    assert record["reason"] == (
        "timeout: its group takes longer than sweep.slurm.time: 2 jobs met that limit and no cell ended; "
        "set a longer one, or a shorter measure.max_time_s"
    )


@pytest.mark.slow
def test_at_most_so_many_jobs_run_at_once_in_the_whole_sweep(slurm_cluster: cluster.Cluster, tmp_path: Path) -> None:
    """Also when a group is given to another job, because its own was killed."""
    process = moe_lab(tmp_path, "-m", *LONG, "measure.max_time_s=3", "batch=1,2,3,4", "sweep.slots.cpu=1")
    becomes_true(lambda: timed_in(tmp_path))
    assert cluster_kills.Sweep("slurm", slurm_cluster, tmp_path).holder(random.Random(0)) == "killed"
    most = 0
    while process.poll() is None:
        most = max(most, len(jobs("RUNNING")))
        time.sleep(0.2)
    code, said = ended(process)
    assert code == 0, said
    assert "was lost" in said and most == 1
    assert [record["status"] for record in records(tmp_path, "s")] == ["ok"] * 4


# ---- what is wrong is one line


@pytest.mark.slow
def test_the_login_node_needs_no_torch(tmp_path: Path) -> None:
    """The driver cannot import it; plan, sweep, tables and status do their work."""
    script = "import sys; sys.modules['torch'] = None; from moe_lab.cli.main import main; sys.exit(main(sys.argv[1:]))"
    for words, expected in (
        (["plan", "-m", *SMALL, "batch=1,2"], "2 to run"),
        (["-m", *SMALL, "batch=1,2"], None),
        (["plan", "-m", *SMALL, "batch=1,2"], "0 to run"),
        (["status", "outputs/s"], "2 ok"),
    ):
        done = subprocess.run([sys.executable, "-c", script, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert expected is None or expected in done.stdout, done.stdout
        assert [path.name for path in tmp_path.rglob("*") if path.parent.name in (tmp_path.name, "outputs")] in (
            [],
            ["outputs", "s"],
        )


def python_that_finds(folder: Path, name: str, source: str) -> str:
    """A command for `sweep.slurm.python` that imports a module of the folder before any other."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(source)
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={folder}:$PYTHONPATH exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.slow
def test_a_node_without_torch_is_one_line(tmp_path: Path) -> None:
    """It names the node and what is missing there; the log, unless it is removed with all that a plan wrote."""
    python = python_that_finds(tmp_path / "broken", "torch", "raise ImportError('planted: no torch here')")
    for words in (("-m",), ("plan", "-m")):
        code, said = run(tmp_path, *words, *SMALL, "batch=1,2", f"sweep.slurm.python={python}")
        assert code == 2
        (line,) = said.splitlines()
        assert "no worker could start on node" in line and "planted: no torch here" in line
        assert ("; see " in line) is ("plan" not in words)


@pytest.mark.slow
def test_a_node_with_another_version_is_one_line(tmp_path: Path) -> None:
    """Its results would be stale at once."""
    source = "from moe_lab.records import identity\nidentity.code_id = lambda folders: 'other'\n"
    python = python_that_finds(tmp_path / "other", "sitecustomize", source)
    code, said = run(tmp_path, "-m", *SMALL, "batch=1,2", f"sweep.slurm.python={python}")
    assert code == 2
    (line,) = said.splitlines()
    assert "has another version of moe-lab than this machine" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gres", "nodes", "visible"),
    [pytest.param("gpu:1", {"node2"}, "0", id="a_gpu"), pytest.param("null", {"node1", "node2"}, "", id="no_gpu")],
)
def test_a_worker_sees_the_gpu_that_slurm_gave_it(gres: str, nodes: set[str], visible: str, tmp_path: Path) -> None:
    """It is one in name only, on one of the nodes. Without it the worker sees none."""
    source = "import os, sys\nif 'moe_lab.sweep.worker' in sys.orig_argv:\n    with open('seen', 'a') as file:\n"
    source += "        print(os.environ['SLURMD_NODENAME'], os.environ.get('CUDA_VISIBLE_DEVICES'), file=file)\n"
    python = python_that_finds(tmp_path / "watched", "sitecustomize", source)
    words = ["batch=1,2,3,4", f"sweep.slurm.gres={gres}", f"sweep.slurm.python={python}"]
    code, said = run(tmp_path, "-m", *SMALL, *words)
    assert code == 0, said
    seen = [line.split(" ") for line in (tmp_path / "seen").read_text().splitlines()]
    assert {node for node, _ in seen} == nodes
    assert {devices for _, devices in seen} == {visible}


@pytest.mark.slow
def test_nodes_of_another_kind_than_was_asked_run_nothing(tmp_path: Path) -> None:
    """If no node is of the kind that the plan asked, each cell has a row that says which key chooses one."""
    source = "import os\nfrom moe_lab.records import identity\n"
    source += "if os.path.exists('outputs/s/plan.json'):\n    identity.env_id = lambda environment: 'other'\n"
    python = python_that_finds(tmp_path / "other", "sitecustomize", source)
    code, said = run(tmp_path, "-m", *SMALL, "batch=1,2", f"sweep.slurm.python={python}")
    assert code == 2, said
    found = records(tmp_path, "s")
    assert [record["status"] for record in found] == ["skipped"] * 2
    for record in found:
        for node in ("node1", "node2"):
            assert f"unavailable: {node} is of another kind than the node that the plan asked" in record["reason"]
        assert "sweep.slurm.constraint" in record["reason"]


@pytest.mark.slow
def test_a_node_with_a_full_disk_gets_no_more_jobs(tmp_path: Path) -> None:
    """One line; the other node runs all."""
    source = "import os\nfrom moe_lab.sweep import slots\n"
    source += "def full(*arguments):\n    raise OSError(28, 'No space left on device')\n"
    source += "if 'SLURM_ARRAY_JOB_ID' in os.environ and os.environ['SLURMD_NODENAME'] == 'node1':\n"
    source += "    slots.Claim.__init__ = full\n"
    python = python_that_finds(tmp_path / "full", "sitecustomize", source)
    code, said = run(tmp_path, "-m", *SMALL, "batch=1,2,3,4,5", f"sweep.slurm.python={python}")
    assert code == 0, said
    assert [record["status"] for record in records(tmp_path, "s")] == ["ok"] * 5
    told = [line for line in said.splitlines() if "No space left on device" in line]
    assert told and all(line.startswith("node1 is out of service: ") for line in told)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hide a folder from a process")
def test_a_folder_that_nodes_do_not_share_is_one_line(slurm_cluster: cluster.Cluster, tmp_path: Path) -> None:
    """Each node has a disk of its own in its place."""
    for node in slurm_cluster.nodes:
        slurm_cluster.kill(node)
        slurm_cluster.start(
            node, before=["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {tmp_path}; "$@"', "sh"]
        )
    try:
        code, said = run(tmp_path, "-m", *SMALL, "batch=1,2")
    finally:
        for node in slurm_cluster.nodes:
            slurm_cluster.kill(node)
            slurm_cluster.start(node)
    assert code == 2
    (line,) = said.splitlines()
    assert f"does not see {tmp_path}/outputs/s; set hydra.sweep.dir to a folder that all nodes share" in line


@pytest.mark.slow
def test_what_cannot_be_submitted_is_one_line(tmp_path: Path) -> None:
    """Exit code 2. Slurm's own words, behind the key."""
    code, said = run(tmp_path, "-m", *SMALL, "batch=1,2", "sweep.slurm.partition=nowhere")
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith("moe-lab: sweep.slurm: ") and "invalid partition specified: nowhere" in line


# ---- parts


@pytest.mark.parametrize(
    ("environment", "slot"),
    [
        pytest.param({}, ("cpu", 1, ""), id="one_cpu"),
        pytest.param({"SLURM_CPUS_ON_NODE": "1000"}, ("cpu", len(os.sched_getaffinity(0)), ""), id="all_cpus"),
        pytest.param({"SLURM_JOB_GPUS": "3", "CUDA_VISIBLE_DEVICES": "3"}, ("cuda", 1, "3"), id="a_gpu"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "0,1"}, ("cpu", 1, ""), id="gpus_that_slurm_did_not_give"),
    ],
)
def test_the_slot_is_what_slurm_gave(
    environment: dict[str, str], slot: tuple[str, int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job without a GPU sees none, even where the node has some."""
    for name in ("SLURM_CPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = slurm_job.slot_here("7_1")
    assert (found.device, found.n_cpus, found.gpu) == slot
    assert found.name == "slurm-7_1"


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


def test_a_job_takes_its_own_group_and_then_those_that_no_other_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once; what was not submitted wholly is left. A job that was put back has the one that it did not end."""
    from submitit.core.utils import DelayedSubmission

    folder = tmp_path / slurm_job.FOLDER
    folder.mkdir()
    job = GroupJob(Task(1, (), None, 600, False), Setup(str(tmp_path), True, "/", (), {}), 60, 5, {})
    for group in ("7_0", "7_1", "7_2", "7_3"):
        DelayedSubmission(slurm_job.run_groups, job).dump(folder / f"{group}{slurm_job.PICKLE}")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm_job.take(tmp_path, "7_0", "7_1") and not slurm_job.take(tmp_path, "7_0", "7_2")
    assert [group for group, _ in slurm_job._taken(job)] == ["7_2", "7_1", "7_3"]
    for group in ("7_2", "7_1"):
        Mailbox(tmp_path, group).put(Line("end"))
    assert [group for group, _ in slurm_job._taken(job)] == ["7_3"]
    assert slurm_job.taken_by(tmp_path, "7_3") == "7_2" and slurm_job.taken_by(tmp_path, "7_4") is None
