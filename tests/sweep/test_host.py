"""sweep/host.py, sweep/tasks.py: one slot with a real worker, in this process."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moe_lab.records.schema import Record
from moe_lab.records.store import read_record
from moe_lab.sweep.engine import WorkerLostError
from moe_lab.sweep.host import Host
from moe_lab.sweep.plan import Plan
from moe_lab.sweep.slots import Slot, usable_cpus
from moe_lab.sweep.standing import FOLDER
from moe_lab.sweep.tasks import Event, Setup, Task
from tests import quick
from tests.sweep import test_plan

SLOT = Slot("here-cpu0", "here", "cpu", 1, "")
AXIS = "router=torch,sinkhorn"


class Slotted:
    """A host and what it told; closed whatever happens, for an open one keeps its CPUs from the tests after it."""

    def __init__(
        self, directory: Path, *, shared: bool = True, variables: dict[str, str] | None = None, n_on_node: int = 1
    ):
        self.told: queue.SimpleQueue[Event] = queue.SimpleQueue()
        directory.mkdir(parents=True, exist_ok=True)
        setup = Setup(str(directory), shared, os.getcwd(), (), variables or {})
        self.host = Host(replace(SLOT, n_on_node=n_on_node), setup, self.told.put)

    def __enter__(self) -> Slotted:
        return self

    def __exit__(self, *_: object) -> None:
        self.host.close()

    def until(self, *kinds: str) -> list[Event]:
        """What it tells until one of these."""
        found: list[Event] = []
        while not found or found[-1].kind not in kinds:
            found.append(self.told.get(timeout=180))
            assert found[-1].kind in (*kinds, "begun", "step", "cell"), found[-1].text
        return found


@pytest.fixture
def slotted(tmp_path: Path) -> Iterator[Slotted]:
    with Slotted(tmp_path / "s") as one:
        yield one


def task(plan: Plan, **more: object) -> Task:
    cells = tuple(plan.to_run())
    return replace(Task(1, cells, cells[0], 60.0, False), **more)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_group_is_timed_on_the_cpus_of_the_slot(tmp_path: Path, slotted: Slotted) -> None:
    """What is told, in order; the record says which CPUs; the next group has the same worker; nothing is left."""
    plan = test_plan.make(tmp_path / "s", AXIS)
    first, second = plan.cells
    slotted.host.start(task(plan))
    events = slotted.until("end")
    assert {(event.slot, event.node, event.task) for event in events} == {("here-cpu0", "here", 1)}
    steps = [(event.cell_id, event.text) for event in events if event.kind == "step"]
    assert steps[:4] == [(cell.cell_id, step) for cell in (first, second) for step in ("build", "verify")]
    assert [event.cell_id for event in events if event.kind == "cell"] == [first.cell_id, second.cell_id]
    assert events[0].kind == "begun" and all(event.files is None for event in events)
    records = [read_record(cell.directory) for cell in plan.cells]
    (cpu,) = {record.environment["cpu_set"] for record in records}
    assert cpu in {f"{one}-{one}" for one in usable_cpus()} and records[1].ratio_to_anchor is not None
    life, pid = slotted.host._worker.life, slotted.host._worker.pid
    slotted.host.start(task(test_plan.make(tmp_path / "s", AXIS, "batch=3"), number=2))
    assert slotted.until("end")[-1].task == 2 and (slotted.host._worker.life, slotted.host._worker.pid) == (life, pid)
    slotted.host.close()
    assert pid is not None and not Path(f"/proc/{pid}").exists()
    assert not (tmp_path / "s" / FOLDER).exists(), "the log was empty"


@pytest.mark.parametrize("shared", [pytest.param(True, id="shared"), pytest.param(False, id="not-shared")])
def test_why_a_worker_cannot_start_is_told(shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line that it printed, also where the log cannot be in the sweep's folder."""
    (tmp_path / "broken" / "torch").mkdir(parents=True)
    (tmp_path / "broken" / "torch" / "__init__.py").write_text("raise ImportError('planted: no torch here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    raised = pytest.raises(WorkerLostError, match=r"^crash: exit code 1 \(ImportError: planted: no torch here\)$")
    with Slotted(tmp_path / "s", shared=shared) as one, raised:
        one.host.ask("look", [], False)


@pytest.mark.slow
def test_without_a_shared_folder_the_files_are_told(tmp_path: Path) -> None:
    """The whole folder of each cell; nothing is written where the sweep was started; only a log stays until the end."""
    plan = test_plan.make(tmp_path / "driver", AXIS, "measure.record_routing=true")
    with Slotted(tmp_path / "s", shared=False) as one:
        one.host.start(task(plan))
        told = {event.cell_id: event.files for event in one.until("end") if event.kind == "cell"}
        assert list(told) == [cell.cell_id for cell in plan.cells]
        expected = {"result.json", "samples.npz", "routing.npz", "routes.trace", "config.yaml"}
        assert all(files is not None and expected <= files.keys() for files in told.values())
        scratch = one.host._scratch.path
        assert [path.name for path in scratch.iterdir()] == ["here-cpu0.log"] and not (tmp_path / "driver").exists()
    assert not scratch.exists()


@pytest.mark.slow
def test_slots_of_a_node_share_its_memory(tmp_path: Path) -> None:
    """A third each: what fits into that is timed together."""
    cell = test_plan.make(tmp_path, AXIS).cells[0]
    with Slotted(tmp_path / "s") as whole, Slotted(tmp_path / "s", n_on_node=3) as third:
        bytes_of = [one.host._thread.submit(one.host._here, cell).result().available_bytes for one in (whole, third)]
    assert bytes_of[1] == pytest.approx(bytes_of[0] / 3, rel=0.2)


@pytest.mark.slow
def test_the_worker_has_the_drivers_number_of_threads_or_its_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster sets a number of its own, which is not the sweep's."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    config = test_plan.make(tmp_path, AXIS).cells[0].config
    for variables, expected in (({}, 1), ({"OMP_NUM_THREADS": "2"}, 2)):
        with Slotted(tmp_path / "s", variables=variables) as one:
            (seen,) = one.host.ask("look", [config], False)
        assert (seen["env"]["threads"], seen["env"]["cpus"]) == (expected, 1)


@pytest.mark.slow
def test_a_stopped_group_keeps_what_was_timed(tmp_path: Path, slotted: Slotted) -> None:
    """`interrupted`, with samples; and the host is not harmed."""
    plan = test_plan.make(tmp_path / "s", AXIS, "measure.max_time_s=60", "measure.target_ci=1e-9")
    slotted.host.start(task(plan))
    while (event := slotted.told.get(timeout=60)).text != "time":
        assert event.kind in ("begun", "step")
    slotted.told.get(timeout=60)  # the other's warm-up
    slotted.told.get(timeout=60)  # the first round has ended
    slotted.host.stop()
    events = slotted.until("stopped")
    assert [event.cell_id for event in events if event.kind == "cell"] == [cell.cell_id for cell in plan.cells]
    records = [read_record(cell.directory) for cell in plan.cells]
    assert {record.reason for record in records} == {"interrupted"} and all(record.latency_ms for record in records)


@pytest.mark.slow
def test_closed_in_the_middle_it_blames_no_cell(tmp_path: Path, slotted: Slotted) -> None:
    """No record is written of a step that was cut off."""
    plan = test_plan.make(tmp_path / "s", AXIS, "measure.max_time_s=60", "measure.target_ci=1e-9")
    slotted.host.start(task(plan))
    while slotted.told.get(timeout=60).text != "verify":
        pass
    slotted.host.close()
    assert not list((tmp_path / "s").glob("*/result.json"))


def test_what_is_missing_here_is_refused_with_its_place(tmp_path: Path, slotted: Slotted) -> None:
    """A checkpoint that is not there, and one that holds something else; nothing is written of them."""
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for file in quick.TINY_OLMOE.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    plan = test_plan.make(tmp_path / "s", f"model.path={copy}", model="checkpoint")
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    slotted.host.start(task(plan))
    (event,) = (event for event in slotted.until("refused", "broken", "end") if event.kind != "begun")
    assert event.kind == "refused"
    assert (
        event.text
        == "unavailable: on here: model.path or workload.path holds something else than where the sweep was started"
    )
    for file in copy.iterdir():
        file.unlink()
    slotted.host.start(task(plan))
    event = slotted.until("refused", "broken", "end")[-1]
    assert event.kind == "refused" and event.text.startswith(f"unavailable: on here: model.path={copy}: ")
    assert not list((tmp_path / "s").glob("*/result.json"))


def test_other_code_breaks_the_slot(tmp_path: Path, slotted: Slotted) -> None:
    """Its results would be stale at once."""
    plan = test_plan.make(tmp_path / "s", AXIS)
    cells = tuple(replace(cell, code_id="0" * 12) for cell in plan.cells)
    slotted.host.start(task(plan, cells=cells))
    event = slotted.until("broken", "end")[-1]
    assert (event.kind, event.text) == (
        "broken",
        "here has other code of moe-lab or of a plug-in; install this version there.",
    )


@pytest.mark.slow
def test_a_disk_that_cannot_be_written_breaks_the_slot(tmp_path: Path, slotted: Slotted) -> None:
    """The folder of a cell cannot be made; what is told names it."""
    plan = test_plan.make(tmp_path / "s", AXIS)
    plan.cells[0].directory.parent.mkdir(exist_ok=True)
    plan.cells[0].directory.symlink_to(tmp_path)
    slotted.host.start(task(plan))
    event = slotted.until("broken", "end")[-1]
    assert event.kind == "broken" and "is a link, so files would be written elsewhere" in event.text


def test_a_folder_that_a_node_does_not_see_is_a_mistake(tmp_path: Path) -> None:
    """Before anything is started; with the remedy."""
    setup = Setup(str(tmp_path / "nowhere"), True, os.getcwd(), (), {})
    with pytest.raises(ValueError, match=r"sweep.shared=true: here does not see .*nowhere; set sweep.shared=false"):
        Host(SLOT, setup, lambda event: None)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_one_cells_failure(tmp_path: Path, slotted: Slotted) -> None:
    """As with one worker: the row says so, the other cell is measured in a new process."""
    plan = test_plan.make(tmp_path / "s", AXIS, "sweep.interleave=false")
    slotted.host.start(task(plan))
    while (event := slotted.told.get(timeout=60)).text != "verify":
        pass
    pid = slotted.host._worker.pid
    assert pid is not None
    os.kill(pid, 9)
    slotted.until("end")
    records: dict[str, Record] = {cell.cell_id: read_record(cell.directory) for cell in plan.cells}
    killed = records.pop(str(event.cell_id))
    assert killed.status == "failed" and str(killed.reason).startswith("crash: SIGKILL")
    assert [record.status for record in records.values()] == ["ok"]
