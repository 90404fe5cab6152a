"""What makes a result stale, and sweeps that are killed, run out of disk or find broken files."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moe_lab
from moe_lab.records.store import read_record, write_record
from tests import quick
from tests.sweep import faulty

ROUTERS_AND_BATCHES = ("router=torch,sinkhorn", "batch=1,2,3")


def kill_and_resume(tmp_path: Path, seed: int) -> int:
    """kill -9 the parent three times at random points of a sweep of six cells; then let it end, and look.

    Returns how often it was killed before it ended by itself.
    """
    rng = random.Random(seed)
    done: dict[str, tuple[str | None, int]] = {}  # ok cells: when they were started, and their file's time
    kills = 0
    while True:
        before = len(list(tmp_path.glob("outputs/s/*/result.json")))
        process = subprocess.Popen(
            faulty.command_of(*ROUTERS_AND_BATCHES), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if kills < 3:
            wait_for_results(tmp_path, process, rng.randint(min(before, 5), min(before + 1, 5)))
            time.sleep(rng.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
        process.wait(timeout=300)
        kills += process.returncode == -signal.SIGKILL
        for record in faulty.records_list(tmp_path) if (tmp_path / "outputs/s").exists() else []:
            assert record.status == "ok"
            path = tmp_path / str(record.directory) / "result.json"
            seen = (record.started, path.stat().st_mtime_ns)
            assert done.setdefault(record.cell_id, seen) == seen, "a cell that was ok ran again"
        if process.returncode == 0:
            break
    cells = [cell["cell_id"] for cell in faulty.plan(tmp_path)["cells"]]
    assert sorted(done) == sorted(cells)
    assert len(set(cells)) == 6
    rows = moe_lab.load(tmp_path / "outputs" / "s")
    assert sorted(rows["cell_id"]) == sorted(cells)
    csv = (tmp_path / "outputs" / "s" / "runs.csv").read_text()
    assert all(csv.count(f"-{cell}") == 1 for cell in cells)
    return kills


def wait_for_results(tmp_path: Path, process: subprocess.Popen[bytes], n: int) -> None:
    """Until the sweep has its plan and `n` results, or has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        results = len(list(tmp_path.glob("outputs/s/*/result.json")))
        if (tmp_path / "outputs/s/plan.json").exists() and results >= n:
            return
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, id=f"seed-{seed}", marks=[pytest.mark.slow] if seed else []) for seed in range(3)]
)
def test_a_killed_sweep_resumes(seed: int, tmp_path: Path) -> None:
    """Every cell once, none lost, none run again after it was ok."""
    assert kill_and_resume(tmp_path, seed) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"seed-{seed}") for seed in range(3, 20)])
def test_a_killed_sweep_resumes_again_and_again(seed: int, tmp_path: Path) -> None:
    """As above, with other points of time."""
    assert kill_and_resume(tmp_path, seed) >= 1


def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    """No process of a killed sweep is left that could write into the folder of the next."""
    process = subprocess.Popen(
        faulty.command_of("measure.max_time_s=60", "measure.target_ci=1e-9"), cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    children: list[int] = []
    deadline = time.monotonic() + 60
    task = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not task.exists():
        process.kill()
        pytest.skip("the kernel does not list children")
    while not children and time.monotonic() < deadline:
        children = [int(text) for text in task.read_text().split()]
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(_runs(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children
    assert not any(_runs(child) for child in children)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


@pytest.mark.slow
def test_a_truncated_record_is_set_aside_and_its_cell_runs_again(tmp_path: Path) -> None:
    """The broken file stays beside the new one and is listed in unreadable.csv."""
    assert faulty.sweep("router=torch,sinkhorn", cwd=tmp_path).returncode == 0
    path = tmp_path / str(faulty.records(tmp_path)["sinkhorn"].directory) / "result.json"
    half = path.read_text()[:500]
    path.write_text(half)
    done = faulty.sweep("router=torch,sinkhorn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert faulty.records(tmp_path)["sinkhorn"].status == "ok"
    assert (path.parent / "result.unreadable.json").read_text() == half
    assert "result.unreadable.json" in (tmp_path / "outputs/s/unreadable.csv").read_text()


def installed_copy(tmp_path: Path) -> dict[str, str]:
    """A copy of the package that can be edited, and the environment that imports it first."""
    package = Path(moe_lab.__file__).parent
    root = package.parent
    copy = tmp_path / "copy"
    shutil.copytree(package, copy / "moe_lab", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conf", "kernels"):
        shutil.copytree(root / name, copy / "moe_lab" / name)
    shutil.copytree(root / "hydra_plugins", copy / "hydra_plugins", ignore=shutil.ignore_patterns("__pycache__"))
    return {**os.environ, "PYTHONPATH": str(copy)}


def plan_of(tmp_path: Path, environment: dict[str, str], *more: str) -> str:
    """What `moe-lab plan` prints."""
    command = [*faulty.MOE_LAB, "plan", *quick.overrides("moe_layer", "router=torch", "sweep.name=s", *more)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_edit_of_what_a_cell_runs_makes_it_stale_and_a_commit_does_not(tmp_path: Path) -> None:
    """An edit of a router's source: stale, and the older result stays beside the new one. Of the report: not."""
    environment = installed_copy(tmp_path)
    assert faulty.sweep("router=torch", cwd=tmp_path, env=environment).returncode == 0
    package = tmp_path / "copy" / "moe_lab"
    git = ["git", "-C", str(tmp_path / "copy"), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "all"], check=True)
    with open(package / "results" / "report.py", "a") as file:
        file.write("# another word\n")
    assert " done" in plan_of(tmp_path, environment)
    with open(package / "routers" / "softmax_topk.py", "a") as file:
        file.write("# another word\n")
    assert "stale: different code" in plan_of(tmp_path, environment)
    assert " done" in plan_of(tmp_path, environment, "sweep.stale=keep")
    command = [*faulty.MOE_LAB, "-m", *quick.overrides("moe_layer", "router=torch", "sweep.name=s")]
    refused = subprocess.run([*command, "sweep.stale=refuse"], cwd=tmp_path, env=environment, capture_output=True)
    assert refused.returncode == 2
    assert b"sweep.stale=refuse" in refused.stderr
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
    (folder,) = tmp_path.glob("outputs/s/moe_layer*")
    assert len(list(folder.glob("stale-*.result.json"))) == 1
    assert len(list(folder.glob("stale-*.samples.npz"))) == 1
    assert len(moe_lab.load(tmp_path / "outputs" / "s")) == 1


@pytest.mark.slow
def test_a_result_of_another_machine_is_stale_here_and_joins_in_compare(tmp_path: Path) -> None:
    """Same cell_id, another env_id."""
    assert faulty.sweep("router=torch", cwd=tmp_path).returncode == 0
    (folder,) = tmp_path.glob("outputs/s/moe_layer*")
    shutil.copytree(tmp_path / "outputs" / "s", tmp_path / "there")
    record = read_record(folder)
    record.env_id = "0" * 12
    record.environment["device_name"] = "another"
    write_record(folder, record)
    assert "stale: different machine" in plan_of(tmp_path, dict(os.environ))
    done = subprocess.run(
        [*faulty.MOE_LAB, "compare", "outputs/s", "there"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "another" in done.stdout


@pytest.mark.slow
def test_a_full_disk_ends_the_sweep_in_one_line_and_loses_nothing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE lets no file grow beyond 2 kB: exit code 2, no half record; with space again the sweep goes on."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    done = faulty.sweep("router=torch,sinkhorn", cwd=tmp_path, preexec_fn=limited)
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("outputs/s/*/result.json"))
    done = faulty.sweep("router=torch,sinkhorn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {record.status for record in faulty.records(tmp_path).values()} == {"ok"}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="only root can mount a tmpfs")
def test_a_small_disk_that_fills_up(tmp_path: Path) -> None:
    """On a tmpfs of 100 kB the sweep stops in one line; what was written whole before stays readable."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        done = faulty.sweep("router=torch,sinkhorn", "batch=1,2,3,4,5,6", cwd=disk)
        assert done.returncode == 2, done.stderr
        assert "No space left" in done.stderr
        assert "Traceback" not in done.stderr
        for path in disk.glob("outputs/s/*/result.json"):
            assert json.loads(path.read_text())["status"] == "ok"
    finally:
        subprocess.run(["umount", str(disk)], check=True)
