"""sweep/spread.py: a sweep over several slots, with hosts that do what a test says, and then real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import moe_lab
from moe_lab.cli.progress import Terminal
from moe_lab.errors import UnavailableError
from moe_lab.records import store
from moe_lab.records.schema import Record
from moe_lab.records.store import RESULT, read_record
from moe_lab.sweep import spread, standing
from moe_lab.sweep.plan import Plan
from moe_lab.sweep.slots import Slot, usable_cpus
from moe_lab.sweep.tasks import Event, Task
from tests import quick
from tests.sweep import faulty, test_plan
from tests.sweep.test_pool import ActedPool


def planned(tmp_path: Path, *more: str) -> Plan:
    """Three groups of two cells that both kinds of slots can run."""
    plan = test_plan.make(tmp_path / "s", "router=torch,sinkhorn", "batch=1,2,3", *more)
    for cell in plan.cells:
        cell.env_ids, cell.env_id = ["a", "b"], "a"
    return plan


def cells_of(slot: Slot, task: Task) -> Iterator[Event]:
    """Each cell is measured."""
    for cell in task.cells:
        yield Event("step", slot.name, slot.node, task.number, cell.cell_id, "verify")
        test_plan.leave(cell, env_id=slot.name[0])
        yield Event("cell", slot.name, slot.node, task.number, cell.cell_id)


def end(slot: Slot, task: Task) -> Event:
    return Event("end", slot.name, slot.node, task.number)


def works(slot: Slot, task: Task) -> list[Event]:
    """All is well."""
    return [Event("begun", slot.name, slot.node, task.number), *cells_of(slot, task), end(slot, task)]


def executed(plan: Plan, pool: ActedPool) -> dict[str, Record]:
    """The records, by router and batch."""
    records = spread.execute(plan, pool, Terminal())
    return {f"{one.config['router']['name']}-{one.config['batch']}": one for one in records}


def tasks_of(pool: ActedPool, name: str) -> list[Task]:
    return pool.seats[name].host.tasks  # type: ignore[attr-defined]


def test_every_cell_runs_once_and_a_group_on_one_slot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three groups on two slots; the lines name the slots; nothing says of a slot that it runs afterwards."""
    plan = planned(tmp_path)
    pool = ActedPool(["a1", "b1"], works)
    records = executed(plan, pool)
    assert {name: record.status for name, record in records.items()} == {
        f"{router}-{batch}": "ok" for router in ("torch", "sinkhorn") for batch in (1, 2, 3)
    }
    sizes = [[len(task.cells) for task in tasks_of(pool, name)] for name in ("a1", "b1")]
    assert sorted(map(sum, sizes)) == [2, 4]
    for batch in (1, 2, 3):
        assert records[f"torch-{batch}"].env_id == records[f"sinkhorn-{batch}"].env_id
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("[6/6]") and " on " in lines[-1]
    assert standing.read(plan.directory) == []


def test_what_a_lost_slot_had_not_done_goes_to_another(tmp_path: Path) -> None:
    """One when both cells were written and one of them was told; another when both were told."""
    plan = planned(tmp_path)
    lost: list[str] = []

    def act(slot: Slot, task: Task) -> list[Event]:
        if slot.name.startswith("a") and len(lost) < 2:
            lost.append(slot.name)
            told = list(cells_of(slot, task))[: 2 if slot.name == "a1" else 4]
            return [*told, Event("lost", slot.name, slot.node, text="its node is gone")]
        return works(slot, task)

    pool = ActedPool(["a1", "a2", "b1"], act)
    records = executed(plan, pool)
    assert lost == ["a1", "a2"] and pool.names() == ["b1"]
    assert len(records) == 6 and {record.status for record in records.values()} == {"ok"}
    assert sum(len(task.cells) for task in tasks_of(pool, "b1")) == 2, "what was written is not run again"


def test_what_is_left_of_a_group_goes_where_the_rest_ran(tmp_path: Path) -> None:
    """A kind that is still there, though another is free first."""
    plan = planned(tmp_path, "batch=1")
    seen: list[str] = []

    def act(slot: Slot, task: Task) -> list[Event]:
        seen.append(slot.name)
        if seen == ["a1"]:
            first = list(cells_of(slot, Task(task.number, task.cells[:1], None, 1, False)))
            return [*first, Event("lost", slot.name, slot.node, text="gone")]
        return works(slot, task)

    pool = ActedPool(["a1", "b1", "a2"], act)
    executed(plan, pool)
    assert seen == ["a1", "a2"]
    (again,) = tasks_of(pool, "a2")
    assert (again.wanted, again.n_lost) == ("a", 1)
    assert again.anchor is not None and again.anchor.cell_id not in {cell.cell_id for cell in again.cells}


def test_a_cell_that_takes_slots_with_it_is_given_up(tmp_path: Path) -> None:
    """Three slots; its row says so, and the rest of the sweep is measured."""
    plan = planned(tmp_path)

    def act(slot: Slot, task: Task) -> list[Event]:
        deadly = [cell for cell in task.cells if cell.content["batch"] == 2 and "torch" in cell.variant]
        if not deadly:
            return works(slot, task)
        step = Event("step", slot.name, slot.node, task.number, deadly[0].cell_id, "verify")
        return [step, Event("lost", slot.name, slot.node, text="its node is gone")]

    records = executed(plan, ActedPool(["a1", "a2", "a3", "a4"], act))
    assert (records["torch-2"].status, records["torch-2"].reason) == (
        "failed",
        "crash: 3 slots were lost with it (its node is gone)",
    )
    assert [name for name, record in records.items() if record.status != "ok"] == ["torch-2"]


def test_full_disks_are_no_cells_fault(tmp_path: Path) -> None:
    """Three slots that cannot write are out of service; the fourth measures everything."""
    plan = planned(tmp_path, "batch=1")

    def act(slot: Slot, task: Task) -> list[Event]:
        if slot.name == "a4":
            return works(slot, task)
        return [Event("broken", slot.name, slot.node, task.number, text="No space left on device")]

    pool = ActedPool(["a1", "a2", "a3", "a4"], act)
    assert {record.status for record in executed(plan, pool).values()} == {"ok"}
    assert pool.names() == ["a4"]


def test_without_a_slot_the_sweep_ends_with_a_line(tmp_path: Path) -> None:
    """How many cells were not run, why, and how to continue."""
    plan = planned(tmp_path)

    def full(slot: Slot, task: Task) -> list[Event]:
        return [Event("broken", slot.name, slot.node, task.number, text="[Errno 28] No space left on device")]

    with pytest.raises(UnavailableError) as raised:
        spread.execute(plan, ActedPool(["a1", "b1"], full), Terminal())
    assert "6 cells were not run: " in str(raised.value) and "No space left on device" in str(raised.value)
    assert "to continue, run: moe-lab -m " in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_missing_on_a_node_runs_on_another_or_is_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused by one node, which is said once; refused by all it is skipped with every reason; others are measured."""
    plan = planned(tmp_path)

    def act(slot: Slot, task: Task) -> list[Event]:
        batch = task.cells[0].content["batch"]
        if batch == 3 or (batch == 2 and slot.node == "a"):
            text = f"unavailable: on {slot.node}: no checkpoint"
            return [Event("refused", slot.name, slot.node, task.number, text=text)]
        return works(slot, task)

    pool = ActedPool(["a1", "a2", "b1"], act)
    records = executed(plan, pool)
    assert records["torch-2"].env_id == "b"
    for router in ("torch", "sinkhorn"):
        assert records[f"{router}-3"].status == "skipped"
        assert set(str(records[f"{router}-3"].reason).split("; ")) == {
            "unavailable: on a: no checkpoint",
            "unavailable: on b: no checkpoint",
        }
    said = capsys.readouterr().err.splitlines()
    for node in "ab":
        assert said.count(f"unavailable: on {node}: no checkpoint; the group goes to another node") == 1
    assert pool.names() == ["a1", "a2", "b1"]


def test_a_group_that_no_node_is_left_for_does_not_go_to_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its row has the reason."""

    def refuses(slot: Slot, task: Task) -> list[Event]:
        return [Event("refused", slot.name, slot.node, task.number, text="unavailable: on a: no checkpoint")]

    records = executed(planned(tmp_path, "batch=1"), ActedPool(["a1"], refuses))
    assert {record.reason for record in records.values()} == {"unavailable: on a: no checkpoint"}
    assert "another node" not in capsys.readouterr().err


def test_a_record_that_is_seen_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over a network file system; one that never comes is an error that names it and the remedy."""
    plan = planned(tmp_path, "batch=1")
    monkeypatch.setattr(spread, "_LOOK_S", 0.01)

    def late(slot: Slot, task: Task) -> list[Event]:
        threading.Timer(0.2, lambda: list(cells_of(slot, task))).start()
        return [
            *(Event("cell", slot.name, slot.node, task.number, cell.cell_id) for cell in task.cells),
            end(slot, task),
        ]

    assert len(executed(plan, ActedPool(["a1"], late))) == 2
    monkeypatch.setattr(spread, "_VISIBLE_S", 0.05)
    never = planned(tmp_path / "never", "batch=2")

    def unseen(slot: Slot, task: Task) -> list[Event]:
        return [Event("cell", slot.name, slot.node, task.number, task.cells[0].cell_id)]

    with pytest.raises(OSError, match=r"result.json: a host wrote it, .*; set sweep.shared=false"):
        spread.execute(never, ActedPool(["a1"], unseen), Terminal())


def test_fail_fast_starts_nothing_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What runs is finished; the rest is not run, and that is said."""
    plan = planned(tmp_path, "sweep.fail_fast=true")

    def fails(slot: Slot, task: Task) -> list[Event]:
        events = works(slot, task)
        test_plan.leave(task.cells[0], status="failed", reason="out_of_memory")
        return events

    records = executed(plan, ActedPool(["a1"], fails))
    assert len(records) == 2
    assert "sweep.fail_fast=true: 4 cells were not run" in capsys.readouterr().err


@pytest.mark.parametrize("n_times", [pytest.param(1, id="once-drains"), pytest.param(2, id="twice-stops")])
def test_ctrl_c_ends_the_sweep(n_times: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once: what runs ends, nothing is started. Twice: hosts are told to stop."""
    plan = planned(tmp_path)
    pool = ActedPool(["a1"], lambda slot, task: [])
    before = signal.getsignal(signal.SIGINT)
    told: list[int] = []

    def receive(timeout_s: float) -> list[Event]:
        seat = pool.seats["a1"]
        assert seat.task is not None
        if len(told) < n_times:
            told.append(1)
            os.kill(os.getpid(), signal.SIGINT)
            return []
        if n_times == 1:
            return works(seat.slot, seat.task)
        found = list(pool.told)
        pool.told.clear()
        return found

    pool.receive = receive  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        spread.execute(plan, pool, Terminal())
    assert len(list(plan.directory.glob(f"*/{RESULT}"))) == (2 if n_times == 1 else 0)
    assert len(tasks_of(pool, "a1")) == 1 and pool.seats["a1"].host.is_stopped == (n_times == 2)  # type: ignore[attr-defined]
    error = capsys.readouterr().err
    assert "Ctrl-C again stops them" in error and "interrupted; to continue, run: moe-lab -m" in error
    assert signal.getsignal(signal.SIGINT) is before


def test_records_that_come_back_are_written_as_they_were(tmp_path: Path) -> None:
    """All files of the folder; an earlier result is kept beside the new one; what a failed run left goes."""
    plan = planned(tmp_path, "batch=1")
    torch, sinkhorn = plan.cells
    test_plan.leave(torch, env_id="v100")
    test_plan.leave(sinkhorn, status="failed", reason="out_of_memory", env_id="a")
    (sinkhorn.directory / "samples.npz").write_bytes(b"old")
    for cell in plan.cells:
        cell.status = "to do"
    far = tmp_path / "node"

    def act(slot: Slot, task: Task) -> list[Event]:
        events = []
        for cell in task.cells:
            record = {"status": "ok", "env_id": "a", "config": cell.config, "code_id": cell.code_id}
            content = store.as_json(Record(cell_id=cell.cell_id, **record).to_dict())  # type: ignore[arg-type]
            files = {RESULT: json.dumps(content).encode(), "run.log": b"log", "export/model.onnx": b"\0onnx"}
            events.append(Event("cell", slot.name, slot.node, task.number, cell.cell_id, files=files))
        return [*events, end(slot, task)]

    records = executed(plan, ActedPool(["a1"], act))
    assert not far.exists() and [record.env_id for record in records.values()] == ["a", "a"]
    for cell in plan.cells:
        assert (cell.directory / "export" / "model.onnx").read_bytes() == b"\0onnx"
        assert (cell.directory / "run.log").read_bytes() == b"log"
    assert len(list(torch.directory.glob("stale-*-v100.result.json"))) == 1
    assert not list(sinkhorn.directory.glob("stale-*")) and not (sinkhorn.directory / "samples.npz").exists()


def in_a_thread(act: Callable[[], Any]) -> list[Any]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    thread.join()
    return found


def test_it_runs_where_ctrl_c_does_not_come(tmp_path: Path) -> None:
    """In another thread than the main one, as a notebook may have it."""
    plan = planned(tmp_path, "batch=1")
    (records,) = in_a_thread(lambda: spread.execute(plan, ActedPool(["a1"], works), Terminal()))
    assert len(records) == 2


@pytest.mark.slow
@pytest.mark.skipif(len(usable_cpus()) < 2, reason="one CPU")
def test_two_slots_of_this_machine_measure_what_one_worker_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real workers: the same cells, verified; each on a CPU of its own, said in the record; both slots had work."""
    monkeypatch.chdir(tmp_path)
    overrides = quick.overrides("moe_layer", "router=torch,sinkhorn", "batch=1,2,3", "sweep.report=false")
    done = moe_lab.multirun([*overrides, "sweep.slots.cpu=2", "sweep.slots.cpus_each=1"], directory="slots")
    plan = test_plan.make(tmp_path / "one", "router=torch,sinkhorn", "batch=1,2,3")
    assert [record.cell_id for record in done] == [cell.cell_id for cell in plan.cells]
    assert all(record.status == "ok" and record.check.passed for record in done)
    assert {record.environment["cpu_set"] for record in done} == {f"{cpu}-{cpu}" for cpu in usable_cpus()[:2]}
    assert all(record.environment["cpus"] == 1 and record.environment["node"] for record in done)
    again = moe_lab.multirun([*overrides, "sweep.slots.cpu=2", "sweep.slots.cpus_each=1"], directory="slots")
    assert [record.started for record in again] == [record.started for record in done], "nothing was run again"
    assert read_record(Path(str(done[0].directory))).cell_id == done[0].cell_id


@pytest.mark.slow
@pytest.mark.skipif(len(usable_cpus()) < 2, reason="one CPU")
def test_a_driver_that_is_killed_takes_its_slots_with_it_and_is_resumed(tmp_path: Path) -> None:
    """No worker is left; the same command at once gets the same CPUs and runs what is missing, each cell once."""
    slow = ("measure.max_time_s=0.3", "measure.target_ci=1e-9", "sweep.slots.cpu=2")
    words = ("router=torch,sinkhorn", "batch=1,2,3,4,5,6", *slow)
    process = subprocess.Popen(faulty.command_of(*words), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[3/12]"):
            break
    workers = [one for one in children_of(process.pid) if "moe_lab.sweep.worker" in command_line(one)]
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    n_done = len(faulty.records_list(tmp_path))
    assert 3 <= n_done < 12
    again = faulty.sweep(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"12 cells, {n_done} done; " in again.stderr
    assert not any(command_line(one) for one in workers)
    assert [record.status for record in faulty.records_list(tmp_path)] == ["ok"] * 12
    assert not list(tmp_path.rglob("stale-*"))


def children_of(process: int) -> list[int]:
    return [int(one) for file in Path(f"/proc/{process}/task").glob("*/children") for one in file.read_text().split()]


def command_line(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
