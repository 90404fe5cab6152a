"""What a sweep and the hosts of its slots send each other. Plain data, pickled: hosts may be other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from moe_lab.sweep.plan import Cell

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that say how many threads torch uses. A cluster's own values for them do not count."""


@dataclass(frozen=True)
class Setup:
    """What all hosts of a sweep have in common."""

    directory: str
    """The sweep's folder as the driver sees it, absolute."""
    shared: bool
    """Whether hosts see that folder too, and write there."""
    cwd: str
    """The driver's current folder, from which relative paths of checkpoints and texts count."""
    trusted: tuple[str, ...]
    """The plug-in folders, as they lie where the host is."""
    variables: Mapping[str, str]
    """The driver's numbers of threads (`OMP_NUM_THREADS` ...); without one a worker has as many as its CPUs."""


@dataclass(frozen=True)
class Task:
    """A group of cells that one slot times together, or what is left of one."""

    number: int
    cells: tuple[Cell, ...]
    anchor: Cell | None
    timeout_s: float
    wait: bool
    wanted: str | None = None
    """The `env_id` of those of its setting that are done: it goes to such a slot, while there is one."""
    n_lost: int = 0
    """How many slots were lost while they ran it."""
    not_on: Mapping[str, str] = field(default_factory=dict)
    """The nodes that cannot run it, and why."""

    @property
    def all_cells(self) -> tuple[Cell, ...]:
        """The cells, and the anchor that runs along."""
        return self.cells if self.anchor is None else (*self.cells, self.anchor)

    def runs_on(self, env_ids: set[str | None]) -> bool:
        """Whether a slot with these `env_id`s can run all of it."""
        return all(env_ids & set(cell.env_ids) for cell in self.cells)


class Event(NamedTuple):
    """What a host tells the driver."""

    kind: Literal["begun", "step", "cell", "end", "stopped", "refused", "broken", "lost"]
    """
    begun: the slot starts the task; `text` may say as what (a job's number).
    step: a cell comes to the step `text`.
    cell: its record is written, or stands in `files`.
    end: every cell of the task has a record.
    stopped: after `stop`, when what was there is written.
    refused: the task cannot run on this node, another may: `text` is the reason of its row if none can.
    broken: the slot cannot go on (a full disk), because of `text`.
    lost: the slot's process or node is gone, because of `text`.
    """
    slot: str
    node: str
    task: int | None = None
    cell_id: str | None = None
    text: str = ""
    files: dict[str, bytes] | None = None
    """Of a cell's folder, by name, where the host does not see the sweep's folder."""
