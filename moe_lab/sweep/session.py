"""A sweep from its plan to its last record: failures, Ctrl-C, progress."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any, Protocol

from moe_lab.records import store
from moe_lab.records.schema import Record
from moe_lab.sweep import plan as planning
from moe_lab.sweep.engine import Engine
from moe_lab.sweep.plan import Cell, Plan
from moe_lab.sweep.standing import Board
from moe_lab.trackers.outbox import Outbox

_SLOT = "worker"


class Reporter(Protocol):
    """Is told of the cells that run; a context manager around them."""

    n_cells: int
    n_done: int
    n_failed: int

    def __enter__(self) -> Reporter: ...
    def __exit__(self, *error: Any) -> None: ...
    def say(self, text: str, style: str | None = None) -> None:
        """Show a line."""

    def step(self, name: str, step: str, slot: str | None = None, group: int | None = None) -> None:
        """A cell of a group comes to a step; the slot, where there are several."""

    def idle(self, slot: str) -> None:
        """A slot has nothing to do."""

    def gone(self, slot: str) -> None:
        """A slot is out of service."""

    def end(self, name: str, record: Record, slot: str | None = None) -> None:
        """A cell ended, one way or another."""


class Progress(Protocol):
    """Tells a person where a sweep is. The command line's is `cli.progress.Terminal`."""

    def announce(self, plan: Plan, how: str | None = None) -> None:
        """Say what is going to happen; `how` of another launcher."""

    def say(self, text: str) -> None:
        """Show a line."""

    def reporter(self, n_cells: int, slots: Sequence[str] = ()) -> Reporter:
        """Who is told of this many cells, and of these slots where there are several."""
        ...


def write_plan(plan: Plan) -> None:
    """Write the plan and the records of what will not run.

    Raises:
        OSError: the folder cannot be written.
    """
    plan.write()
    from moe_lab.sweep import timing

    for cell in plan.cells:
        if cell.status in ("skipped", "excluded") and not _is_finished(cell):
            timing.write(cell, "skipped", cell.reason or cell.status)


def _is_finished(cell: Cell) -> bool:
    """Whether its folder has the result of an earlier run, which stays until the cell is run again."""
    record = store.find_record(cell.directory)
    return record is not None and record.status != "skipped"


def execute(plan: Plan, engine: Engine, progress: Progress, outbox: Outbox | None = None) -> list[Record]:
    """Run what is to be run and return a record for each cell of the plan that has one.

    Between two groups, when this sweep times nothing, the `outbox` sends the records of the last one to the trackers.

    Raises:
        OSError: a record cannot be written.
        KeyboardInterrupt: Ctrl-C, after what was there was written.
    """
    with progress.reporter(len(plan.to_run())) as reporter, Board(plan.directory) as board:
        for number, group in enumerate(planning.groups(plan), start=1):
            _run_group(plan, number, group, engine, reporter, board)
            if outbox is not None and outbox.names:
                reporter.step(", ".join(outbox.names), "send to")
                outbox.send([cell.directory for cell in group], lambda text: reporter.say(text, "yellow"))
            if plan.sweep["fail_fast"] and reporter.n_failed:
                left = reporter.n_cells - reporter.n_done
                reporter.say(f"sweep.fail_fast=true: {left} cells were not run", "red")
                break
    return records(plan.cells)


def _run_group(
    plan: Plan, number: int, cells: Sequence[Cell], engine: Engine, reporter: Reporter, board: Board
) -> None:
    from moe_lab.sweep import timing  # imports numpy, for which `moe-lab plan` does not wait

    def on_step(cell: Cell, step: str) -> None:
        board.at(_SLOT, number, cell.directory.name, step)
        reporter.step(short_name(cell), step)

    def on_end(cell: Cell) -> None:
        record = store.read_record(cell.directory)
        board.ended(_SLOT, is_failed=record.status == "failed")
        reporter.end(cell.directory.name, record)

    anchor = plan.anchor_of(cells[0].setting_id) if plan.sweep["interleave"] else None
    group = timing.Group(
        cells,
        anchor,
        engine,
        timeout_s=plan.sweep["timeout_s"],
        wait=plan.sweep["wait"],
        on_step=on_step,
        on_end=on_end,
    )
    try:
        group.run()
    except KeyboardInterrupt:
        group.interrupted()
        reporter.say(f"interrupted; to continue, run: {shlex.join(plan.command)}", "yellow")
        raise


def short_name(cell: Cell) -> str:
    """What tells a cell from others at a glance."""
    sizes = [f"{key}={cell.content[key]}" for key in ("batch", "seq_len") if key in cell.content]
    return " ".join([cell.variant, *sizes])


def records(cells: Sequence[Cell]) -> list[Record]:
    """The records of those cells that have one."""
    found = (store.find_record(cell.directory) for cell in cells)
    return [record for record in found if record is not None]  # not run: fail_fast, or what a reader set aside
