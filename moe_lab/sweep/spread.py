"""A sweep on several slots: each takes a group, then the next; what is lost goes to another. Imports no torch."""

from __future__ import annotations

import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.errors import UnavailableError
from moe_lab.records import store
from moe_lab.records.files import parse_json
from moe_lab.records.schema import NOT_ENDED, Record
from moe_lab.sweep import plan as planning
from moe_lab.sweep import session
from moe_lab.sweep.plan import Cell, Plan
from moe_lab.sweep.session import Progress, Reporter
from moe_lab.sweep.standing import Board
from moe_lab.sweep.tasks import Event, Task

if TYPE_CHECKING:
    from moe_lab.sweep.pool import Pool

_LOOK_S = 0.5  # how long a Ctrl-C may go unnoticed
_GRACE_S = 10.0  # how long a step may take to end after the second one
_VISIBLE_S = 90.0  # NFS remembers for up to a minute that a file is not there
_MOST_LOST = 3  # slots that one cell may take with it


def execute(plan: Plan, pool: Pool, progress: Progress) -> list[Record]:
    """Run what is to be run and return a record for each cell of the plan that has one.

    Raises:
        UnavailableError: no slot is left that can run the rest.
        OSError: a record cannot be written.
        KeyboardInterrupt: Ctrl-C, when the groups that ran have ended; after a second one, when what was there was
            written.
    """
    if plan.to_run():
        with (
            progress.reporter(len(plan.to_run()), pool.names()) as reporter,
            Board(plan.directory) as board,
            _counted_interrupts() as interrupts,
        ):
            for name in pool.names():
                board.at(name, None, None, None)
            _Spread(plan, pool, reporter, board).run(interrupts)
    return session.records(plan.cells)


class _Spread:
    """The groups that wait and those that run."""

    def __init__(self, plan: Plan, pool: Pool, reporter: Reporter, board: Board):
        self.plan, self.pool, self.reporter, self.board = plan, pool, reporter, board
        self._numbers = count(1)
        self.running: dict[int, Task] = {}
        self._left: dict[str, Cell] = {cell.cell_id: cell for cell in plan.to_run()}
        self._at_work: dict[int, str] = {}  # the cell of a task that came to a step last
        self._stood = {cell_id: store.mark(cell.directory) for cell_id, cell in self._left.items()}
        self._env_ids = _env_ids_of_done(plan)  # of a setting's cells
        self._last_loss = "no slot can run them"
        self._said: set[str] = set()
        self.waiting = [task for cells in planning.groups(plan) for task in self._tasks_of(cells)]

    def run(self, interrupts: list[int]) -> None:
        """Until all is done, or nothing can go on."""
        ends_at, said, is_drained = None, False, False
        while self.waiting or self.running:
            fails = self.plan.sweep["fail_fast"] and self.reporter.n_failed
            if not interrupts and not fails:
                for task in self.pool.start(self.waiting):
                    self.waiting.remove(task)
                    self.running[task.number] = task
            elif not is_drained:
                self.pool.drain()
                is_drained = True
            if not self.running and (interrupts or fails or not self._can_go_on()):
                break
            for event in self.pool.events(_LOOK_S):
                self._take(event)
            if interrupts and not said:
                said = True
                self.reporter.say("interrupted: groups that run end first; Ctrl-C again stops them", "yellow")
            if len(interrupts) > 1 and ends_at is None:
                self.pool.stop()
                ends_at = time.monotonic() + _GRACE_S
            if ends_at is not None and time.monotonic() > ends_at:
                break
        self._end(interrupted=bool(interrupts))

    def _end(self, *, interrupted: bool) -> None:
        command = shlex.join(self.plan.command)
        if interrupted:
            self.reporter.say(f"interrupted; to continue, run: {command}", "yellow")
            raise KeyboardInterrupt
        if self._left and self.plan.sweep["fail_fast"] and self.reporter.n_failed:
            self.reporter.say(f"sweep.fail_fast=true: {len(self._left)} cells were not run", "red")
        elif self._left:
            why = self._last_loss.rstrip(".")
            raise UnavailableError(
                f"sweep.engine={self.plan.sweep['engine']}: {len(self._left)} cells were not run: {why}; "
                f"to continue, run: {command}"
            )

    def _can_go_on(self) -> bool:
        """Whether a waiting task can still be started; what no node can run gets its row."""
        for task in [task for task in self.waiting if not self.pool.may_start(task)]:
            if task.not_on and self.pool.names():
                self.waiting.remove(task)
                for cell in task.cells:
                    self._write(cell, "skipped", "; ".join(dict.fromkeys(task.not_on.values())))
        return any(self.pool.may_start(task) for task in self.waiting)

    def _tasks_of(self, cells: list[Cell], **more: Any) -> Iterator[Task]:
        """A task of those that run on the same kinds of slots; members that need another are timed there."""
        by_kinds: dict[tuple[str | None, ...], list[Cell]] = {}
        for cell in cells:
            by_kinds.setdefault(tuple(sorted(map(str, cell.env_ids))), []).append(cell)
        setting = cells[0].setting_id
        anchor = self.plan.anchor_of(setting) if self.plan.sweep["interleave"] else None
        for together in by_kinds.values():
            yield Task(
                number=next(self._numbers),
                cells=tuple(map(_absolute, together)),
                anchor=_absolute(anchor) if anchor is not None else None,
                timeout_s=self.plan.sweep["timeout_s"],
                wait=self.plan.sweep["wait"],
                wanted=self._env_ids.get(setting),
                **more,
            )

    # ---- what the hosts tell

    def _take(self, event: Event) -> None:
        task = self.running.get(event.task) if event.task is not None else None
        if event.kind in ("broken", "lost"):
            self._last_loss = f"{event.slot}: {event.text}"
            what = "is out of service" if event.kind == "broken" else "was lost"
            self.reporter.say(f"{event.slot} {what}: {event.text}", "yellow")
            self.board.gone(event.slot)
            self.reporter.gone(event.slot)
            if task is not None:
                self._again(task, event)
        elif task is None:
            return  # of a task that was given up
        elif event.kind == "begun":
            self.board.at(event.slot, task.number, None, None, event.text)
        elif event.kind == "step":
            cell = _cell_of(task, event)
            self._at_work[task.number] = cell.cell_id
            self.board.at(event.slot, task.number, cell.directory.name, event.text)
            self.reporter.step(session.short_name(cell), event.text, event.slot, task.number)
        elif event.kind == "cell":
            if (left := self._left.get(event.cell_id or "")) is not None:
                self._has_ended(left, event)
        else:
            del self.running[task.number]
            if event.slot:  # no slot had begun it, if none is named
                self.board.at(event.slot, None, None, None)
                self.reporter.idle(event.slot)
            if event.kind == "stopped" and event.text:  # from outside
                self._last_loss = event.text
                self.reporter.say(f"group {task.number}: {event.text}", "yellow")
            if event.kind == "refused":
                again = replace(task, not_on={**task.not_on, event.node: event.text})
                if self.pool.may_start(again):  # else its rows say so
                    self._say_once(f"{event.text.rstrip('.')}; the group goes to another node")
                self.waiting.insert(0, again)

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.reporter.say(line, "yellow")

    def _has_ended(self, cell: Cell, event: Event | None) -> None:
        if event is not None and event.files is not None:
            _keep(cell, event.files)
        record = _read_soon(cell.directory)
        self._env_ids[cell.setting_id] = record.env_id
        del self._left[cell.cell_id]
        slot = event.slot if event is not None else None
        self.reporter.end(cell.directory.name, record, slot)
        if slot is not None:
            self.board.ended(slot, is_failed=record.status == "failed")

    def _again(self, task: Task, event: Event) -> None:
        """Give what is left of a task to another slot; a cell that takes slot after slot with it is given up."""
        del self.running[task.number]
        for cell in task.cells:  # the host may have written a record and not have lived to tell
            if (
                cell.cell_id in self._left
                and store.mark(cell.directory) != self._stood[cell.cell_id]
                and _has_record(cell)
            ):
                self._has_ended(self._left[cell.cell_id], None)
        n_lost = task.n_lost + (event.kind == "lost")  # a cell is not to blame for a full disk
        if n_lost == _MOST_LOST:
            for cell in self._guilty(task):
                self._write(cell, "failed", f"crash: {n_lost} slots were lost with it ({event.text})")
            n_lost = 0
        left = [self._left[cell.cell_id] for cell in task.cells if cell.cell_id in self._left]
        if left:
            self.waiting[:0] = self._tasks_of(left, n_lost=n_lost, not_on=task.not_on)

    def _guilty(self, task: Task) -> list[Cell]:
        """The cell at work; if none had begun, or one that is done and ran along, all of them."""
        left = [self._left[cell.cell_id] for cell in task.cells if cell.cell_id in self._left]
        return [cell for cell in left if cell.cell_id == self._at_work.get(task.number)] or left

    def _write(self, cell: Cell, status: Any, reason: str) -> None:
        from moe_lab.sweep import timing

        timing.write(cell, status, reason)
        self._has_ended(cell, None)


def _cell_of(task: Task, event: Event) -> Cell:
    return next(cell for cell in task.all_cells if cell.cell_id == event.cell_id)


def _absolute(cell: Cell) -> Cell:
    """Hosts may have another current folder."""
    return replace(cell, directory=cell.directory.absolute())


def _keep(cell: Cell, files: dict[str, bytes]) -> None:
    """Write a cell's folder as its host had it; the record last: with it the run is complete."""
    folder = store.own_folder(cell.directory)
    record = files.pop(store.RESULT)
    new = Record.from_dict(parse_json(record.decode()))
    store.set_aside_unreadable(folder)
    store.set_aside_stale(folder, new.cell_id, new.code_id, new.env_id)
    store.remove(folder)  # what is left is of a run that failed
    for name, content in files.items():
        path = folder / name
        store.own_folder(path.parent)
        store.write_atomic(path, content)
    store.write_atomic(folder / store.RESULT, record)


def _read_soon(directory: Path) -> Record:
    """The record that a host has just written; another machine's file system may show it late."""
    ends_at = time.monotonic() + _VISIBLE_S
    while True:
        try:
            return store.read_record(directory)
        except FileNotFoundError:
            if time.monotonic() > ends_at:
                raise OSError(
                    f"{directory / store.RESULT}: a host wrote it, but it cannot be seen here after {_VISIBLE_S:.0f} "
                    "s; set sweep.shared=false."
                ) from None
            list(directory.parent.iterdir())  # what a network file system remembers of a folder is asked for anew
            time.sleep(_LOOK_S)


def _has_record(cell: Cell) -> bool:
    record = store.find_record(cell.directory)
    return record is not None and record.cell_id == cell.cell_id and not (record.reason or "").startswith(NOT_ENDED)


def _env_ids_of_done(plan: Plan) -> dict[str, str | None]:
    """Of each setting that has cells to run and others that are done: where the latter ran."""
    settings = {cell.setting_id for cell in plan.to_run()}
    found: dict[str, str | None] = {}
    for cell in plan.cells:
        if cell.is_ok and cell.setting_id in settings and cell.setting_id not in found:
            found[cell.setting_id] = store.read_record(cell.directory).env_id
    return found


@contextmanager
def _counted_interrupts() -> Iterator[list[int]]:
    """Ctrl-C raises nothing inside, so that no record is half written: each is one more in the list."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where Ctrl-C does not come
        yield seen
        return
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
