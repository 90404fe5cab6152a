"""What jobs of Slurm do when their driver, which wrote what its slots do, is gone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moe_lab.errors import UnavailableError
from moe_lab.sweep import slurm, slurm_job
from moe_lab.sweep.slurm_job import CELLS, DRIVER, FOLDER, SUFFIX, Mailbox
from moe_lab.sweep.standing import Standing


def read(directory: Path, names: Mapping[str, str]) -> tuple[list[Standing], str]:
    """What each job of the sweep in a folder does, and a line about all of them; "" if there are none.

    `names` are those of the cells' folders, by cell_id. Where Slurm does not answer, what was said last is told.
    """
    groups = [path.name.removesuffix(CELLS + SUFFIX) for path in sorted((directory / FOLDER).glob(f"*{CELLS}{SUFFIX}"))]
    if not groups:
        return [], ""
    try:
        states = slurm.states(slurm.job_name(directory))
    except UnavailableError as error:
        found = [_standing(directory, group, names) for group in groups if _is_taken(directory, group)]
        waits = any(slurm_job.taken_by(directory, group) is None for group in groups)
        is_open = bool(found) or waits
        return found, f"its driver is gone; whether its jobs go on is not known here ({error})" if is_open else ""
    alive = {job: state for job, state in states.items() if not state.is_over and job in groups}
    running = {job for job, state in alive.items() if state.name in slurm.RUNS}
    at_work = [group for group in groups if _is_taken(directory, group)]
    found = [_standing(directory, group, names) for group in at_work if slurm_job.taken_by(directory, group) in running]
    n_waiting = len(alive) - len(running)
    return found, f"its driver is gone, but {len(running)} of its jobs run and {n_waiting} wait" if alive else ""


def _is_taken(directory: Path, group: str) -> bool:
    """Whether a job has it and did not say that it ended."""
    by = slurm_job.taken_by(directory, group)
    return by not in (None, DRIVER) and not slurm_job.has_ended(directory, group)


def _standing(directory: Path, group: str, names: Mapping[str, str]) -> Standing:
    mailbox = Mailbox(directory, group)
    lines = mailbox.new()
    step = next((line for line in reversed(lines) if line.kind == "step"), None)
    node = next((line.content for line in reversed(lines) if line.kind == "begun"), None)
    updated = mailbox.path.stat().st_mtime
    return Standing(
        slot=node or "-",
        begun=updated,
        updated=updated,
        cell=names.get(step.cell_id or "") if step is not None else None,
        step=step.text if step is not None else None,
        note=f"job {slurm_job.taken_by(directory, group)}",
        n_done=len({line.cell_id for line in lines if line.kind == "cell"}),
    )
