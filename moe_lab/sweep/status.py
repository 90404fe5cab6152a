"""Where a sweep is, read from its folder alone: plan.json, the records, and what its slots wrote. Imports no torch.

So it is known on any machine that sees the folder, whether the sweep runs or not.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lab.records import files, store
from moe_lab.records.schema import NOT_ENDED, Record
from moe_lab.sweep import lock, standing
from moe_lab.sweep.plan import read_commands
from moe_lab.sweep.standing import Standing


@dataclass
class Status:
    """What `read` found."""

    n_cells: int
    counts: dict[str, int]
    """ok, failed, skipped, excluded, to run: cells, in this order; no zeros."""
    failed: list[Record]
    slots: list[Standing]
    owner: str | None
    """Which process runs the sweep; None: none does."""
    elapsed_s: float | None
    """Since that began, if a slot has said."""
    left_s: float | None
    """Until all has run, at the rate until now."""
    command: list[str] = field(default_factory=list)
    """The last one."""
    jobs: str = ""
    """Of jobs that go on without the process that runs the sweep."""


def read(directory: Path) -> Status:
    """Where the sweep in a folder is. Raises `ValueError` if that is not the folder of a sweep, or may not be read."""
    try:
        plan = files.read_json(directory / store.PLAN)
        cells = plan["cells"]
        found = [_status(directory, cell) for cell in cells]
    except PermissionError as error:
        raise ValueError(
            f"{error.filename}: permission denied; its owner has to let you read the whole folder."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else repr(error)
        raise ValueError(
            f"{directory}: not the folder of a sweep ({store.PLAN} cannot be read: {why}); give outputs/NAME."
        ) from error
    numbers = Counter(name for name, _ in found)
    counts = {name: numbers[name] for name in ("ok", "failed", "skipped", "excluded", "to run") if numbers[name]}
    owner, slots, jobs = lock.owner(directory), standing.read(directory), ""
    if owner is None:  # slots of this machine and of Ray end with it, and what it wrote of them is old
        slots = []
        if plan.get("engine") == "slurm":
            from moe_lab.sweep import slurm_left

            slots, jobs = slurm_left.read(directory, {cell["cell_id"]: cell["directory"] for cell in cells})
    elapsed_s = time.time() - min(slot.begun for slot in slots) if slots and owner is not None else None
    n_done = sum(slot.n_done for slot in slots)
    return Status(
        n_cells=len(cells),
        counts=counts,
        failed=[record for name, record in found if name == "failed" and record is not None],
        slots=slots,
        owner=owner,
        elapsed_s=elapsed_s,
        left_s=elapsed_s / n_done * counts.get("to run", 0) if elapsed_s is not None and n_done else None,
        command=(read_commands(directory) or [[]])[-1],
        jobs=jobs,
    )


def _status(directory: Path, cell: dict[str, Any]) -> tuple[str, Record | None]:
    """What is known of a cell of the plan now, and its record if that is current."""
    if cell["status"] in ("skipped", "excluded"):
        return cell["status"], None
    record = store.find_record(directory / cell["directory"])
    if record is None:
        _require_permission(directory / cell["directory"] / store.RESULT)
        return "to run", None
    is_current = (
        record.cell_id == cell["cell_id"]
        and record.code_id == cell["code_id"]
        and (record.env_id is None or record.env_id in cell["env_ids"])
    )
    if cell["status"] != "done" and (not is_current or (record.reason or "").startswith(NOT_ENDED)):
        return "to run", None
    return record.status, record


def _require_permission(path: Path) -> None:
    """Raise `PermissionError` for a file that may not be read: it is not to count as missing."""
    with suppress(FileNotFoundError):
        path.stat()
        if not os.access(path, os.R_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
