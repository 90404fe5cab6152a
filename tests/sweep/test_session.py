"""Sweeps in real processes: what fails is a row, the rest goes on, and the next start does what is missing.

Under other launchers of Hydra's too (cli/foreign.py).
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Collection
from pathlib import Path

import pytest

from moe_lab.records.store import read_record
from tests.sweep import faulty

REASONS = {
    "raise": "error: RuntimeError: planted",
    "exit": "crash: exit code 3",
    "exit_at_once": "crash: exit code 3",
    "segfault": "crash: SIGSEGV",
    "memory": "out_of_memory",
    "wrong": "mismatch: route",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "faults"),
    [
        pytest.param("", REASONS.keys() - {"exit"}, id="at-once"),  # a worker that is lost costs seconds
        pytest.param("", REASONS.keys(), id="all-at-once", marks=[pytest.mark.slow]),
        pytest.param("late_", REASONS.keys(), id="while-timed", marks=[pytest.mark.slow]),
    ],
)
def test_every_way_to_fail_is_a_row_and_the_others_are_measured(
    when: str, faults: Collection[str], tmp_path: Path
) -> None:
    """One group of some routers: all but one name the cause, the good one is timed, the exit code is 1."""
    plugin = faulty.plugin(tmp_path / "mine")
    routers = [f"{when}{fault}" for fault in REASONS if fault in faults]
    more = ["measure.max_time_s=2", "measure.target_ci=1e-9"] if when else []
    done = faulty.sweep(f"router={','.join(routers)},torch", *more, cwd=tmp_path, plugin=plugin)
    assert done.returncode == 1, done.stderr
    records = faulty.records(tmp_path)
    if when:  # a late wrong answer is nobody's to see: it was right when it was verified
        del records["late_wrong"]
        routers.remove("late_wrong")
    for router in routers:
        assert records[router].status == "failed"
        reason = re.sub(r" \(faulty_router\.py:\d+\)$", "", str(records[router].reason))
        assert reason == REASONS[router.removeprefix("late_")], router
        assert (reason == records[router].reason) != router.endswith("raise")  # an exception names its line
        assert f"{router}-" in done.stderr
        assert str(records[router].reason) in done.stderr
        assert str(records[router].reason) in done.stdout
    assert (records["torch"].status, records["torch"].reason) == ("ok", None)
    log = (tmp_path / str(records[routers[0]].directory) / "run.log").read_text()
    assert "planted" in log
    segfault = (tmp_path / str(records[f"{when}segfault"].directory) / "run.log").read_text()
    assert "faulty_router.py" in segfault


@pytest.mark.slow
def test_a_router_that_spoils_the_process_harms_only_itself(tmp_path: Path) -> None:
    """Another folder, closed streams, a fork: the others are measured. Each way to end has its reason."""
    plugin = faulty.plugin(tmp_path / "mine")
    routers = ("chdir", "close", "fork", "sys_exit", "interrupt", "kill")
    done = faulty.sweep(f"router={','.join(routers)},torch", cwd=tmp_path, plugin=plugin)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    reasons = {name: record.reason for name, record in faulty.records(tmp_path).items()}
    assert re.fullmatch(r"error: SystemExit: 0 \(faulty_router\.py:\d+\)", str(reasons.pop("sys_exit")))
    assert reasons == {
        "chdir": None,
        "close": None,
        "fork": None,
        "interrupt": "error: RuntimeError: KeyboardInterrupt was raised in the run",
        "kill": "crash: SIGKILL (killed by signal 9; out of memory?)",
        "torch": None,
    }
    again = faulty.sweep(f"router={','.join(routers)},torch", cwd=tmp_path, plugin=plugin)
    assert "7 cells, 6 done; 1 to run" in again.stderr, "what was killed runs again, what failed by itself does not"


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_is_one_line(tmp_path: Path) -> None:
    """Immutable, for root too: what was recorded stays, whole; there is no traceback."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", disk], capture_output=True).returncode:
        pytest.skip("cannot make a folder immutable here")
    subprocess.run(["chattr", "-i", disk], check=True)
    plugin = faulty.plugin(tmp_path / "mine")
    arguments = ("router=torch,readonly,sinkhorn", "sweep.interleave=false", f"hydra.sweep.dir={disk}/s")
    try:
        environment = {**os.environ, "READONLY": str(disk)}
        done = faulty.sweep(*arguments, cwd=tmp_path, plugin=plugin, env=environment)
    finally:
        subprocess.run(["chattr", "-R", "-f", "-i", disk], check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Operation not permitted" in done.stderr.splitlines()[-1]
    (record,) = (read_record(path.parent) for path in disk.glob("s/*/result.json"))
    assert (record.config["router"]["name"], record.status) == ("torch", "ok")
    again = faulty.sweep("router=torch,sinkhorn", *arguments[1:], cwd=tmp_path, plugin=plugin)
    assert again.returncode == 0, again.stderr
    assert "2 cells, 1 done; 1 to run" in again.stderr


@pytest.mark.slow
def test_a_hang_is_ended_and_its_log_says_where(tmp_path: Path) -> None:
    """The step's time-out; the stack in run.log; the next cell runs in a new worker."""
    plugin = faulty.plugin(tmp_path / "mine")
    done = faulty.sweep("router=hang,torch", "sweep.timeout_s=3", cwd=tmp_path, plugin=plugin)
    assert done.returncode == 1, done.stderr
    records = faulty.records(tmp_path)
    assert records["hang"].reason == "timeout: verify"
    assert records["torch"].status == "ok"
    assert "faulty_router.py" in (tmp_path / str(records["hang"].directory) / "run.log").read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("when", [pytest.param("", id="at-once"), pytest.param("late_", id="while-timed")])
def test_a_lost_cuda_context_is_one_cells_failure(when: str, tmp_path: Path) -> None:
    """A device-side assertion ends the context, a kernel without end the step: a new worker times the others."""
    plugin = faulty.plugin(tmp_path / "mine")
    routers = [f"{when}device_assert", f"{when}device_hang", "torch", "sinkhorn"]
    more = ["device=cuda", "measure.max_time_s=2", "measure.target_ci=1e-9", "sweep.timeout_s=30"]
    done = faulty.sweep(f"router={','.join(routers)}", *more, cwd=tmp_path, plugin=plugin)
    assert done.returncode == 1, done.stderr
    records = faulty.records(tmp_path)
    lost, hung = (records[router] for router in routers[:2])
    assert lost.status == hung.status == "failed"
    assert "CUDA" in str(lost.reason)  # its words depend on which call meets it first
    assert hung.reason == ("timeout: block" if when else "timeout: verify")
    assert records["torch"].status == records["sinkhorn"].status == "ok"
    assert records["sinkhorn"].interleaved_with == [records["torch"].cell_id]


@pytest.mark.gpu
def test_too_much_for_the_device_is_a_row(tmp_path: Path) -> None:
    """384 GB of parameters; the cell that fits is measured."""
    done = faulty.sweep("model.shape.mlp_hidden_dim=200000000,24", "device=cuda", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {
        record.config["model"]["shape"]["mlp_hidden_dim"]: (record.status, record.reason)
        for record in faulty.records_list(tmp_path)
    }
    assert found[24] == ("ok", None) and found[200000000][0] == "skipped"
    assert str(found[200000000][1]).startswith("unavailable: memory: needs at least ")


@pytest.mark.gpu
def test_every_execution_on_cuda_is_timed_in_one_group(tmp_path: Path) -> None:
    """Graphs and compiled code are parked while others are built, made and verified anew, and timed in turn."""
    axes = ("router=torch,sinkhorn", "execution=eager,cuda_graph,compile")
    more = ("device=cuda", "dtype=bf16", "measure.replicates=2", "measure.max_time_s=0.5")
    done = faulty.sweep(*axes, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = faulty.records_list(tmp_path)
    assert len(records) == 6
    for record in records:
        assert (record.status, len(record.interleaved_with)) == ("ok", 5)
        assert record.latency_ms is not None
        assert len(record.latency_ms.replicate_p50) == len(record.latency_ms.replicate_probe_ms) == 2
        assert record.memory is not None and record.memory["peak_mb"] > record.memory["parameters_mb"] > 0
    assert [record.ratio_to_anchor is None for record in records].count(True) == 1


@pytest.mark.slow
def test_memory_under_a_limit_of_the_process(tmp_path: Path) -> None:
    """RLIMIT_AS: the cell that wants more is a row that says so, the one that does not is measured."""
    limit = 16 * 2**30

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    big = "model.shape.mlp_hidden_dim=24,40000000"
    done = faulty.sweep(big, cwd=tmp_path, preexec_fn=limited)
    assert done.returncode == 0, done.stderr
    results = {
        r.config["model"]["shape"]["mlp_hidden_dim"]: (r.status, r.reason) for r in faulty.records_list(tmp_path)
    }
    assert results[24] == ("ok", None) and results[40000000][0] == "skipped"
    assert "unavailable: memory: needs at least 76.8 GB" in str(results[40000000][1])


@pytest.mark.slow
def test_members_of_a_group_name_each_other_and_have_a_ratio(tmp_path: Path) -> None:
    """The anchor has none; the others' is of paired rounds; samples.npz has rounds in shuffled order."""
    import numpy as np

    done = faulty.sweep("router=torch,sinkhorn", "measure.max_time_s=5", "measure.target_ci=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = faulty.records(tmp_path)
    torch_, sinkhorn = records["torch"], records["sinkhorn"]
    assert torch_.interleaved_with == [sinkhorn.cell_id]
    assert torch_.ratio_to_anchor is None
    assert sinkhorn.ratio_to_anchor is not None
    assert sinkhorn.ratio_to_anchor.anchor == torch_.cell_id
    assert sinkhorn.ratio_to_anchor.rounds >= 10
    orders = []
    for record in (torch_, sinkhorn):
        with np.load(tmp_path / str(record.directory) / "samples.npz") as samples:
            first = np.unique(samples["round"], return_index=True)[1]
            orders.append(samples["order"][first])
    assert set(map(tuple, np.stack(orders, 1))) == {(0, 1), (1, 0)}


@pytest.mark.slow
def test_again_runs_nothing_and_a_missing_member_runs_with_the_anchor(tmp_path: Path) -> None:
    """What is done keeps its files; the missing cell gets a ratio from rounds with the anchor timed again."""
    arguments = ("router=torch,sinkhorn", "measure.max_time_s=0.3")
    assert faulty.sweep(*arguments, cwd=tmp_path).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/s/*/result.json")}
    again = faulty.sweep(*arguments, cwd=tmp_path)
    assert again.returncode == 0
    assert "0 to run" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/s/*/result.json")}
    anchor, missing = (faulty.records(tmp_path)[name] for name in ("torch", "sinkhorn"))
    (tmp_path / str(missing.directory) / "result.json").unlink()
    assert faulty.sweep(*arguments, cwd=tmp_path).returncode == 0
    assert faulty.records(tmp_path)["torch"].started == anchor.started
    made = faulty.records(tmp_path)["sinkhorn"]
    assert made.ratio_to_anchor is not None
    assert made.ratio_to_anchor.anchor == anchor.cell_id
    assert [cell["status"] for cell in faulty.plan(tmp_path)["cells"]] == ["done", "to do"]


@pytest.mark.slow
def test_failures_stay_until_they_are_to_be_retried(tmp_path: Path) -> None:
    """sweep.retry_failed; the exit code speaks of the whole table."""
    plugin = faulty.plugin(tmp_path / "mine")
    assert faulty.sweep("router=raise", cwd=tmp_path, plugin=plugin).returncode == 1
    first = faulty.records(tmp_path)["raise"].started
    assert faulty.sweep("router=raise", cwd=tmp_path, plugin=plugin).returncode == 1
    assert faulty.records(tmp_path)["raise"].started == first
    (plugin / "router" / "raise.yaml").write_text("_target_: faulty_router.Faulty\nname: raise\nfault: raise\n")
    time.sleep(1)  # `started` is in seconds
    assert faulty.sweep("router=raise", "sweep.retry_failed=true", cwd=tmp_path, plugin=plugin).returncode == 1
    assert faulty.records(tmp_path)["raise"].started != first


@pytest.mark.slow
def test_fail_fast_stops_at_the_first_failure(tmp_path: Path) -> None:
    """The cells behind it have no record, and a line says how many."""
    plugin = faulty.plugin(tmp_path / "mine")
    more = ("sweep.fail_fast=true", "sweep.interleave=false")
    done = faulty.sweep("router=raise,torch,sinkhorn", *more, cwd=tmp_path, plugin=plugin)
    assert done.returncode == 1
    assert set(faulty.records(tmp_path)) == {"raise"}
    assert "2 cells were not run" in done.stderr


@pytest.mark.slow
def test_exclusions_and_impossible_combinations_are_records(tmp_path: Path) -> None:
    """Declared skips: exit code 0, reasons in the records and in plan.json; an exclusion is no row of the table."""
    exclude = "sweep.exclude=[{router: sinkhorn, batch: 1}]"
    done = faulty.sweep("router=torch,sinkhorn", "batch=1,2", exclude, "model.shape.top_k=2,9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [
        (r.config["router"]["name"], r.config["batch"], r.config["model"]["shape"]["top_k"], r.status, r.reason)
        for r in faulty.records_list(tmp_path)
    ]
    assert len(found) == 8
    for router, batch, top_k, status, reason in found:
        if (router, batch) == ("sinkhorn", 1):
            assert (status, reason) == ("skipped", "excluded")
        elif top_k == 9:
            assert status == "skipped"
            assert str(reason).startswith("impossible: model.shape.top_k=9")
        else:
            assert (status, reason) == ("ok", None)
    table = done.stdout.splitlines()
    assert "skipped (2 cells): excluded" in table
    rows = sorted(line.split()[0] for line in table[1:7])
    assert rows == ["sinkhorn"] * 2 + ["torch"] * 4, "what was excluded has no row"


@pytest.mark.slow
def test_cells_that_the_model_makes_equal_run_once(tmp_path: Path) -> None:
    """seq_len and router do nothing to minimal; the first line says how many cells equal another."""
    from tests import quick

    same = ("seq_len=1,2", "router=torch,sinkhorn", "sweep.name=s", "sweep.report=false")
    done = subprocess.run(
        [*faulty.MOE_LAB, "-m", *quick.overrides("minimal", *same)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "1 cells, 3 duplicates left out" in done.stderr
    assert len(faulty.records_list(tmp_path)) == 1


@pytest.mark.slow
def test_ctrl_c_writes_what_is_there_and_says_how_to_go_on(tmp_path: Path) -> None:
    """Exit code 130; the group that was timed is `interrupted` with its samples; the same command finishes."""
    arguments = ("router=torch,sinkhorn", "batch=1,2", "measure.max_time_s=30", "measure.target_ci=1e-9")
    process = subprocess.Popen(
        faulty.command_of(*arguments),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = tmp_path / "outputs" / "s" / "worker.log"
    deadline = time.monotonic() + 60
    while "verified" not in "".join(path.read_text() for path in tmp_path.glob("outputs/s/*sinkhorn*b1*/run.log")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1.5)
    faulty.interrupt(process)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, (stderr, log.read_text())
    assert "to continue, run: " in stderr
    assert "-m" in stderr
    records = faulty.records_list(tmp_path)
    assert {(record.config["batch"], record.status, record.reason) for record in records} == {
        (1, "failed", "interrupted")
    }
    assert all(record.latency_ms is not None and record.latency_ms.n > 10 for record in records)
    done = faulty.sweep("router=torch,sinkhorn", "batch=1,2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {record.status for record in faulty.records_list(tmp_path)} == {"ok"}
    assert len(faulty.records_list(tmp_path)) == 4


@pytest.mark.slow
def test_two_sweeps_at_once_in_one_folder(tmp_path: Path) -> None:
    """The second is told who is there (exit code 2); after a kill -9 the next one gets in."""
    arguments = ("router=torch,sinkhorn", "measure.max_time_s=60", "measure.target_ci=1e-9")
    first = subprocess.Popen(faulty.command_of(*arguments), cwd=tmp_path, stderr=subprocess.DEVNULL)
    owner = tmp_path / "outputs" / "s" / ".owner.json"
    deadline = time.monotonic() + 60
    while not owner.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    second = faulty.sweep(*arguments, cwd=tmp_path)
    assert second.returncode == 2
    assert f"another sweep is using this folder (process {first.pid}" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    first.send_signal(signal.SIGKILL)
    first.wait()
    third = faulty.sweep("router=torch", cwd=tmp_path)
    assert third.returncode == 0, third.stderr


@pytest.mark.slow
def test_a_sweep_in_this_process(tmp_path: Path) -> None:
    """sweep.worker=false gives the same rows; replicates are refused, for they are fresh processes.

    And sweep.report=false, as in all sweeps of this file but one, leaves tables alone.
    """
    done = faulty.sweep("router=torch,sinkhorn", "sweep.worker=false", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "outputs/s/runs.csv" in done.stdout.splitlines() and "report.html" not in done.stdout
    assert not (tmp_path / "outputs" / "s" / "report.html").exists()
    assert {record.status for record in faulty.records(tmp_path).values()} == {"ok"}
    assert faulty.records(tmp_path)["sinkhorn"].ratio_to_anchor is not None
    refused = faulty.sweep("router=torch", "sweep.worker=false", "measure.replicates=2", cwd=tmp_path)
    assert refused.returncode == 2
    assert "measure.replicates=2" in refused.stderr


@pytest.mark.slow
def test_replicates_are_fresh_processes(tmp_path: Path) -> None:
    """Three medians, the interval of their mean, and samples that say from which process they are."""
    import numpy as np

    done = faulty.sweep("router=torch,sinkhorn", "measure.replicates=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for record in faulty.records(tmp_path).values():
        assert record.latency_ms is not None
        assert len(record.latency_ms.replicate_p50) == 3
        assert record.latency_ms.ci95_low is not None
        with np.load(tmp_path / str(record.directory) / "samples.npz") as samples:
            assert set(samples["replicate"]) == {0, 1, 2}
            medians = [np.median(samples["ms"][samples["replicate"] == number]) for number in range(3)]
        np.testing.assert_allclose(medians, record.latency_ms.replicate_p50)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    ("launcher", "more"),
    [
        pytest.param("basic", (), id="basic", marks=pytest.mark.slow),
        pytest.param("joblib", ("hydra.launcher.n_jobs=1",), id="joblib", marks=pytest.mark.slow),
    ],
)
def test_other_launchers_plan_resume_and_survive(launcher: str, more: tuple[str, ...], tmp_path: Path) -> None:
    """A row per job though one dies, a plan before the first, nothing done twice, and a first line that says how."""
    plugin = faulty.plugin(tmp_path / "mine")
    arguments = ("router=segfault,torch,cuda_ext", f"hydra/launcher={launcher}", *more)
    done = faulty.sweep(*arguments, cwd=tmp_path, plugin=plugin)
    assert done.returncode == 1, done.stderr
    assert f"not interleaved (hydra/launcher={launcher})" in done.stderr.splitlines()[0]
    reasons = {name: record.reason for name, record in faulty.records(tmp_path).items()}
    assert reasons["segfault"] == "crash: SIGSEGV"
    assert reasons["torch"] is None
    assert str(reasons["cuda_ext"]).startswith("unavailable")
    assert len(faulty.plan(tmp_path)["cells"]) == 3
    started = {name: record.started for name, record in faulty.records(tmp_path).items()}
    again = faulty.sweep(*arguments, cwd=tmp_path, plugin=plugin)
    assert again.returncode == 1
    assert "0 to run" in again.stderr
    after = {name: record.started for name, record in faulty.records(tmp_path).items()}
    assert started["torch"] == after["torch"]


def test_cells_are_not_timed_at_once(tmp_path: Path) -> None:
    """joblib's default is a job for each core. Nothing is written."""
    done = faulty.sweep("router=torch", "hydra/launcher=joblib", cwd=tmp_path)
    assert done.returncode == 2 and not list(tmp_path.rglob("result.json"))
    (line,) = done.stderr.splitlines()
    assert line.startswith("moe-lab: hydra.launcher.n_jobs=-1: ") and "set hydra.launcher.n_jobs=1" in line


@pytest.mark.slow
def test_a_sweep_ends_with_a_table_and_the_paths_of_its_files(tmp_path: Path) -> None:
    """Rows with ratios, then runs.csv and report.html, then what to take."""
    from tests import quick

    command = [*faulty.MOE_LAB, "-m", *quick.overrides("moe_layer", "router=torch,sinkhorn", "sweep.name=s")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["variant", "batch", "seq_len"]
    place = lines.index("outputs/s/runs.csv")
    assert lines[place + 1] == "outputs/s/report.html"
    assert all((tmp_path / line).is_file() for line in lines[place : place + 2])
    assert list((tmp_path / "outputs/s/plots").glob("*.svg"))
    assert lines[1].split()[0] == "torch"


@pytest.mark.slow
def test_a_finished_cell_that_is_left_out_later_keeps_its_result(tmp_path: Path) -> None:
    """Excluded in a second command: the record and its samples are as they were."""
    assert faulty.sweep("router=torch,sinkhorn", cwd=tmp_path).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "outputs/s").glob("*/*")}
    assert faulty.sweep("router=torch,sinkhorn", "sweep.exclude=[{router: sinkhorn}]", cwd=tmp_path).returncode == 0
    assert {path: path.read_bytes() for path in (tmp_path / "outputs/s").glob("*/*")} == before
