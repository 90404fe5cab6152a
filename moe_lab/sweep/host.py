"""One slot, where it is: runs a group at a time in a worker process, and tells the driver what happens.

The group is timed wholly here (`timing.Group`), so nothing goes to the driver while a block is timed but a word at a
time. A host is a thread of the driver, an actor of Ray or a job of Slurm. Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from moe_lab.config import targets
from moe_lab.records import identity, inputs, store
from moe_lab.sweep import timing
from moe_lab.sweep.capped_log import last_line
from moe_lab.sweep.engine import START_S, Worker, WorkerLostError
from moe_lab.sweep.plan import Cell
from moe_lab.sweep.scratch import Scratch
from moe_lab.sweep.slots import VISIBLE, Claim, Slot
from moe_lab.sweep.standing import FOLDER
from moe_lab.sweep.tasks import THREADS, Event, Setup, Task


class Host:
    """The slot's side. All work is done by one thread, pinned to the slot's CPUs, as is the worker that it starts."""

    def __init__(self, slot: Slot, setup: Setup, tell: Callable[[Event], None]):
        """Claim the slot and start its worker, without waiting for it.

        Raises:
            UnavailableError: another slot has its CPUs or its GPU.
            ValueError: the sweep's folder cannot be seen here.
        """
        self.slot, self.setup, self._tell = slot, setup, tell
        directory = Path(setup.directory)
        if setup.shared and not directory.is_dir():
            raise ValueError(
                f"sweep.shared=true: {slot.node} does not see {directory}; set sweep.shared=false, or "
                "hydra.sweep.dir to a folder that all nodes share."
            )
        for folder in setup.trusted:
            targets.trust(folder)
        self._claim = Claim(slot)
        self._seen: dict[str, dict[str, Any]] = {}
        self._scratch = Scratch()  # where the sweep's folder is not seen
        self._log = (store.own_folder(directory / FOLDER) if setup.shared else self._scratch.path) / f"{slot.name}.log"
        self._worker = _Stoppable(self._log, self._environment())
        self._said = ("", "")
        self._ended: set[str] = set()
        self._thread = ThreadPoolExecutor(1, slot.name, initializer=self._claim.pin)
        self._thread.submit(self._worker.start)

    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name not in THREADS}
        if self.slot.gpu is not None:
            environment[VISIBLE] = self.slot.gpu
        return {**environment, **self.setup.variables}

    def ask(self, step: str, *arguments: Any) -> Any:
        """The answer of the worker to a question of the plan. Raises `WorkerLostError` with what it printed last."""
        try:
            return self._thread.submit(self._worker.call, step, *arguments, timeout_s=START_S).result()
        except WorkerLostError as lost:
            raise WorkerLostError(f"{lost} ({last_line(self._log)})") from lost

    def start(self, task: Task) -> None:
        """Run the task; what comes of it is told."""
        self._thread.submit(self._run, task)

    def stop(self) -> None:
        """End the task at the end of its present step, and write what is there."""
        self._worker.stopped.set()

    def close(self) -> None:
        """End the worker and give the slot free; what is being done is lost."""
        self._worker.end()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._worker.close()
        self._claim.release()
        if self._log.is_file() and not self._log.stat().st_size:
            with suppress(OSError):
                self._log.unlink()
                store.remove_empty([self._log.parent])
        self._scratch.close()

    # ---- in the thread

    def _run(self, task: Task) -> None:
        self._tell(self._event("begun", task))
        try:
            self._tell(self._timed(task))
        except OSError as error:
            self._tell(self._event("broken", task, text=str(error)))
        except Exception as error:  # the driver must not wait for ever, whatever it is
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self._tell(self._event("broken", task, text=f"{kind}{error}"))

    def _timed(self, task: Task) -> Event:
        """Time the group; the event with which it ended."""
        first = task.cells[0]
        if identity.code_id(targets.folders_of(OmegaConf.create(first.config))) != first.code_id:
            raise ValueError(f"{self.slot.node} has other code of moe-lab or of a plug-in; install this version there.")
        missing = next(filter(None, map(self._missing, task.cells)), None)
        if missing is not None:
            return self._event("refused", task, text=missing)
        self._ended = set()
        cells = [self._here(cell) for cell in task.cells]
        anchor = next((cell for cell in cells if task.anchor is not None and cell.cell_id == task.anchor.cell_id), None)
        if anchor is None and task.anchor is not None:
            anchor = self._here(task.anchor)
        group = timing.Group(
            cells,
            anchor,
            self._worker,
            timeout_s=task.timeout_s,
            wait=task.wait,
            on_step=lambda cell, step: self._on_step(task, cell, step),
            on_end=lambda cell: self._on_end(task, cell),
        )
        try:
            group.run()
        except KeyboardInterrupt:
            self._worker.stopped.clear()
            group.interrupted()
            for cell in cells:
                if cell.cell_id not in self._ended and _is_interrupted(cell.directory):
                    self._on_end(task, cell)
            return self._event("stopped", task)
        return self._event("end", task)

    def _missing(self, cell: Cell) -> str | None:
        """Why the cell would be another one here: what it reads is not here, or holds something else."""
        try:
            inputs.require(cell.config)
        except ValueError as error:
            return f"unavailable: on {self.slot.node}: {error}"
        if identity.cell_id(cell.config) != cell.cell_id:
            keys = ["workload.trace" if cell.config["workload"].get("trace") else ""]
            keys += [f"{group}.path" if cell.config[group].get("path") else "" for group in ("model", "workload")]
            named = " or ".join(filter(None, keys))
            return f"unavailable: on {self.slot.node}: {named} holds something else than where the sweep was started"
        return None

    def _here(self, cell: Cell) -> Cell:
        """The cell with what is known of it on this slot."""
        name = cell.config["device"]["name"]
        if name not in self._seen:
            (self._seen[name],) = self._worker.call("look", [cell.config], False)
        seen = self._seen[name]
        available = seen["available_bytes"]
        if available is not None and seen["env"].get("device") == "cpu":
            available //= self.slot.n_on_node  # a group is not to take what the others' need
        return replace(
            cell,
            environment=seen["env"],
            env_id=seen["env_id"],
            device_id=seen["device_id"],
            available_bytes=available,
            directory=cell.directory if self.setup.shared else self._scratch.path / cell.cell_id,
        )

    def _on_step(self, task: Task, cell: Cell, step: str) -> None:
        if self._said != (cell.cell_id, step):  # not at every round
            self._said = cell.cell_id, step
            self._tell(self._event("step", task, cell, step))

    def _on_end(self, task: Task, cell: Cell) -> None:
        self._ended.add(cell.cell_id)
        files = None
        if not self.setup.shared:
            files = _files(cell.directory)
            shutil.rmtree(cell.directory)
        self._tell(self._event("cell", task, cell, files=files))

    def _event(self, kind: Any, task: Task, cell: Cell | None = None, text: str = "", files: Any = None) -> Event:
        return Event(kind, self.slot.name, self.slot.node, task.number, cell.cell_id if cell else None, text, files)


class _Stoppable(Worker):
    """A worker whose group can be stopped, and which can be ended, from another thread."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.stopped = threading.Event()
        self.is_ended = False

    def call(self, step: str, *arguments: Any, timeout_s: float = START_S) -> Any:
        """See `Engine.call`. Raises `KeyboardInterrupt` after it was stopped or ended; no cell is to blame."""
        if self.stopped.is_set() or self.is_ended:
            raise KeyboardInterrupt
        try:
            return super().call(step, *arguments, timeout_s=timeout_s)
        except WorkerLostError:
            if self.is_ended:
                raise KeyboardInterrupt from None
            raise

    def end(self) -> None:
        """Kill the process and start no other. A call that waits for its reply raises `KeyboardInterrupt`."""
        self.is_ended = True
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def _is_interrupted(directory: Path) -> bool:
    record = store.find_record(directory)
    return record is not None and record.reason == "interrupted"


def _files(directory: Path) -> dict[str, bytes]:
    """What lies in a cell's folder, by its name there."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
