"""A sweep from its plan to its last record: failures, Ctrl-C, progress."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from moe_lab.records import store
from moe_lab.records.schema import Record
from moe_lab.sweep import plan as planning
from moe_lab.sweep import timing
from moe_lab.sweep.engine import Engine
from moe_lab.sweep.plan import Cell, Plan
from moe_lab.sweep.progress import Reporter


def announce(plan: Plan, how: str | None = None) -> None:
    """Write the plan and the rows of what will not run, and say in a line what is going to happen.

    Raises:
        OSError: the folder cannot be written.
    """
    plan.write()
    for cell in plan.cells:
        if cell.status in ("skipped", "excluded"):
            timing.write(cell, "skipped", cell.reason or cell.status)
    console = Console(stderr=True, soft_wrap=True)
    console.print(escape(_first_line(plan, how)), highlight=False)
    reasons = Counter(cell.reason for cell in plan.cells if cell.status == "skipped")
    for reason, number in reasons.items():
        console.print(escape(f"skipped ({number} cells): {reason}"), style="yellow", highlight=False)


def _first_line(plan: Plan, how: str | None) -> str:
    groups = planning.groups(plan)
    counts = [f"{len(plan.cells)} cells"]
    if plan.n_equal:
        counts.append(f"{plan.n_equal} more equal one of them")
    for status in ("done", "stale", "skipped", "excluded"):
        if number := sum(cell.status == status for cell in plan.cells):
            counts.append(f"{number} {status}")
    if how is None:
        together = sum(len(group) > 1 for group in groups)
        how = f" in {len(groups)} groups" + (f", {together} of them interleaved" if together else "")
    n_to_run = len(plan.to_run())
    return f"{plan.directory}: {', '.join(counts)}; {n_to_run} to run{how if n_to_run else ''}"


def execute(plan: Plan, engine: Engine) -> list[Record]:
    """Run what is to be run and return a record for each cell of the plan that has one.

    Raises:
        OSError: a record cannot be written.
        KeyboardInterrupt: Ctrl-C, after what was there was written.
    """
    with Reporter(len(plan.to_run())) as reporter:
        for group in planning.groups(plan):
            _run_group(plan, group, engine, reporter)
            if plan.sweep["fail_fast"] and reporter.n_failed:
                left = reporter.n_cells - reporter.n_done
                reporter.say(f"sweep.fail_fast=true: {left} cells were not run", "red")
                break
    return records(plan.cells)


def _run_group(plan: Plan, cells: Sequence[Cell], engine: Engine, reporter: Reporter) -> None:
    anchor = plan.anchor_of(cells[0].setting_id) if plan.sweep["interleave"] else None
    group = timing.Group(
        cells,
        anchor,
        engine,
        timeout_s=plan.sweep["timeout_s"],
        on_step=lambda cell, step: reporter.step(_short_name(cell), step),
        on_end=lambda cell: reporter.end(cell.directory.name, store.read_record(cell.directory)),
    )
    try:
        group.run()
    except KeyboardInterrupt:
        group.interrupted()
        reporter.say(f"interrupted; to go on: {shlex.join(plan.command)}", "yellow")
        raise


def _short_name(cell: Cell) -> str:
    sizes = [f"{key}={cell.content[key]}" for key in ("batch", "seq_len") if key in cell.content]
    return " ".join([cell.variant, *sizes])


def records(cells: Sequence[Cell]) -> list[Record]:
    """The records of those cells that have one."""
    found = []
    for cell in cells:
        try:
            found.append(store.read_record(cell.directory))
        except (FileNotFoundError, ValueError):
            continue  # not run: fail_fast, or what an earlier reader set aside
    return found
