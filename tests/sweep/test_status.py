"""sweep/status.py, sweep/slurm_left.py: where a sweep is, from its folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from moe_lab.sweep import slurm_job, status
from moe_lab.sweep.lock import Lock
from moe_lab.sweep.plan import Plan
from moe_lab.sweep.slurm_job import Line, Mailbox
from moe_lab.sweep.standing import Board
from tests.sweep import test_plan


def planned(folder: Path) -> Plan:
    """Six cells, of which one is excluded."""
    words = ("router=torch,sinkhorn", "batch=1,2,3", "sweep.exclude=[{router: torch, batch: 3}]")
    plan = test_plan.make(folder, *words)
    folder.mkdir(exist_ok=True)
    plan.write()
    return plan


def test_cells_are_counted_as_their_records_say(tmp_path: Path) -> None:
    """What has no record, or that of other code, another machine or an interrupted run, is to run."""
    plan = planned(tmp_path / "s")
    assert status.read(tmp_path / "s").counts == {"excluded": 1, "to run": 5}
    first, second, third, fourth, _ = plan.to_run()
    test_plan.leave(first)
    test_plan.leave(second, status="failed", reason="out_of_memory")
    test_plan.leave(third, env_id="0" * 12)
    test_plan.leave(fourth, status="failed", reason="interrupted")
    found = status.read(tmp_path / "s")
    assert (found.n_cells, found.counts) == (6, {"ok": 1, "failed": 1, "excluded": 1, "to run": 3})
    assert [record.cell_id for record in found.failed] == [second.cell_id]
    assert (found.owner, found.slots, found.left_s) == (None, [], None)
    assert found.command[:2] == ["moe-lab", "-m"]


def test_a_result_that_was_kept_is_done(tmp_path: Path) -> None:
    """`sweep.stale=keep`: the plan says so, whatever the record's machine."""
    plan = planned(tmp_path / "s")
    for cell in plan.to_run():
        test_plan.leave(cell, env_id="0" * 12)
    kept = test_plan.make(tmp_path / "s", "router=torch,sinkhorn", "batch=1", "sweep.stale=keep")
    kept.write()
    assert status.read(tmp_path / "s").counts == {"ok": 2}


def test_while_it_runs_slots_and_the_rest_of_the_time_are_known(tmp_path: Path) -> None:
    """Two of five cells in ten seconds: fifteen are left."""
    plan = planned(tmp_path / "s")
    lock = Lock(tmp_path / "s")
    with Board(tmp_path / "s") as board:
        board._begun -= 10
        board.at("a", 1, "x", "time")
        for cell in plan.to_run()[:2]:
            test_plan.leave(cell)
            board.ended("a", is_failed=False)
        found = status.read(tmp_path / "s")
    lock.release()
    assert found.owner is not None and re.fullmatch(r" \(process \d+ on .* since .*\)", found.owner)
    assert found.left_s == pytest.approx(15, abs=3)
    assert [(slot.slot, slot.n_done) for slot in found.slots] == [("a", 2)]
    assert found.slots[0].updated <= time.time()


def killed(folder: Path, engine: str) -> Plan:
    """A sweep whose driver was killed while a slot verified the first cell."""
    plan = planned(folder)
    content = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**content, "engine": engine}))
    Board(folder).at("node1", 1, "x", "verify")
    return plan


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(engine, id=engine, marks=() if engine == "worker" else pytest.mark.slow)
        for engine in ("worker", "ray", "slurm")
    ],
)
def test_slots_of_a_killed_driver_are_not_shown(engine: str, tmp_path: Path) -> None:
    """They ended with it: what it wrote of them is old."""
    killed(tmp_path / "s", engine)
    found = status.read(tmp_path / "s")
    assert (found.owner, found.slots, found.jobs) == (None, [], "")


def test_jobs_that_go_on_without_their_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Slurm cannot be asked it is said what they told last, and not that nobody runs them."""
    monkeypatch.setenv("PATH", "")
    first, second, *_ = killed(tmp_path / "s", "slurm").to_run()
    (tmp_path / "s" / slurm_job.FOLDER).mkdir()
    for group in ("7_0", "7_1", "7_2"):
        Mailbox(tmp_path / "s", group + slurm_job.CELLS).put(Line("cells", content={}))
    for group, cell in (("7_0", first), ("7_1", second)):  # one job took both, and the first has ended
        assert slurm_job.take(tmp_path / "s", group, "7_0")
        for line in (Line("begun", None, "7_0", "node2"), Line("step", cell.cell_id, "time", "node2")):
            Mailbox(tmp_path / "s", group).put(line)
    Mailbox(tmp_path / "s", "7_0").put(Line("end"))
    found = status.read(tmp_path / "s")
    assert [(slot.slot, slot.cell, slot.step, slot.note) for slot in found.slots] == [
        ("node2", second.directory.name, "time", "job 7_0")
    ]
    assert found.jobs.startswith("its driver is gone; whether its jobs go on is not known here (")
    for group in ("7_1", "7_2"):
        slurm_job.take(tmp_path / "s", group, slurm_job.DRIVER)
        Mailbox(tmp_path / "s", group).put(Line("end"))
    assert status.read(tmp_path / "s").jobs == ""


@pytest.mark.parametrize("content", [pytest.param(None, id="none"), pytest.param('{"cells": 3}', id="of-another-kind")])
def test_another_folder_is_one_line(content: str | None, tmp_path: Path) -> None:
    """With what to give."""
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"not the folder of a sweep \(plan.json cannot be read: .*; give outputs/NAME"
    ):
        status.read(tmp_path)


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(name, id=name, marks=() if name == "cell" else pytest.mark.slow)
        for name in ("plan", "cell", "record")
    ],
)
def test_what_may_not_be_read_is_not_taken_for_missing(what: str) -> None:
    """One line with its path. Root may read all, so another user looks then."""
    folder = Path(tempfile.mkdtemp())  # that of pytest is for its user only
    folder.chmod(0o755)
    cell = planned(folder / "s").to_run()[0]
    test_plan.leave(cell)
    path = {"plan": folder / "s" / "plan.json", "cell": cell.directory, "record": cell.directory / "result.json"}[what]
    path.chmod(0)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)
        with pytest.raises(ValueError, match=rf"^{path}.*: permission denied; its owner has to let you read"):
            status.read(folder / "s")
    finally:
        if is_root:
            os.seteuid(0)
        path.chmod(0o700)
        shutil.rmtree(folder)
