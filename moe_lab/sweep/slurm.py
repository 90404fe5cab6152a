"""Slurm's commands: what a sweep asks of the scheduler. submitit writes and submits the scripts. Imports no torch."""

from __future__ import annotations

import contextlib
import getpass
import io
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.config.slurm_options import seconds_of
from moe_lab.errors import UnavailableError
from moe_lab.records import identity

WAITS = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
RUNS = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED", "RESIZING"}
LOG = "{job}_0_log.out"
"""What submitit calls the log of a job."""
LIMIT, STOP = "USR2", "HUP"
"""Signals to a job: its time is nearly over, or it is to make place for another; the driver stops it.

All its processes get them. SIGUSR1 has a meaning in workers.
"""
_COMMAND_S = 60.0
_SQUEUE = ("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%r")


class State(NamedTuple):
    """What the scheduler says of a job."""

    name: str
    node: str
    reason: str

    @property
    def is_over(self) -> bool:
        """Whether it will not run any more."""
        return self.name not in WAITS | RUNS


def require_commands() -> None:
    """Raise `UnavailableError` unless jobs can be submitted from here."""
    missing = [command for command in ("sbatch", "squeue", "scancel", "srun") if shutil.which(command) is None]
    if missing:
        raise UnavailableError(
            f"sweep.engine=slurm: {missing[0]} is not on the PATH; start the sweep on a login node of the cluster."
        )
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise UnavailableError("sweep.engine=slurm: needs submitit; run pip install 'moe-lab[slurm]'.") from error


def job_name(directory: Path) -> str:
    """What the jobs of a sweep are called; by its folder, so that a driver finds those of one that was killed."""
    name = re.sub(r"[^\w.-]", "_", directory.name)  # it stands in a script, and in a list for squeue
    return f"moe-lab:{name}:{identity.digest(str(directory.resolve()))[:8]}"


def submit(
    folder: Path,
    name: str,
    options: Mapping[str, Any],
    function: Callable[..., Any],
    calls: Sequence[Any],
    *,
    at_once: int | None = None,
    cpus: int | None = None,
) -> list[str]:
    """Submit an array job: `function(call)` of each call.

    Args:
        folder: where submitit's scripts, calls and logs lie; nodes must see it.
        options: the node `sweep.slurm`.
        calls: at most `largest_array`.
        at_once: the most jobs that run at once; None: as many as there is place for.

    Returns:
        the number of each job.

    Raises:
        UnavailableError: Slurm refuses it; its line.
    """
    import submitit

    executor = submitit.SlurmExecutor(folder, python=options["python"])
    seconds = seconds_of(options["time"])
    parameters = {key: options[key] for key in ("partition", "account", "qos", "constraint", "gres", "mem")}
    executor.update_parameters(
        job_name=name,
        time=-(-seconds // 60),
        cpus_per_task=cpus,
        setup=["export PYTHONSAFEPATH=1", *options["setup"]],  # the current folder is not a place to import from
        signal_delay_s=warning_s(seconds),
        stderr_to_stdout=True,
        array_parallelism=at_once or len(calls),
        additional_parameters={"requeue": True, **dict(options["options"])},
        **{key: value for key, value in parameters.items() if value is not None},
    )
    with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises, too
        try:
            jobs = executor.map_array(function, calls)
        except submitit.core.utils.FailedJobError as error:
            raise UnavailableError(f"sweep.slurm: {_one_line(str(error))}") from error
    return [str(job.job_id) for job in jobs]


def array_of(job: str) -> str:
    """The array job of a number."""
    return job.partition("_")[0]


def states(name: str) -> dict[str, State]:
    """Of each job of this name that Slurm remembers (minutes after its end: MinJobAge).

    Raises:
        UnavailableError: it does not answer.
    """
    answer = _run(*_SQUEUE, f"--user={getpass.getuser()}", f"--name={name}")
    rows = (line.split("|", 3) for line in answer.splitlines() if line.count("|") >= 3)
    return {job: State(state, node, reason) for job, state, node, reason in rows}


def nodes(partition: str | None) -> list[str]:
    """The nodes on which jobs of this partition may run."""
    where = [f"--partition={partition}"] if partition else []
    return sorted({*_run("sinfo", "--noheader", "--Node", "--format=%N", *where).split()})


def cancel(jobs: Iterable[str], only_waiting: bool = False) -> None:
    """Cancel jobs; those that are over are none."""
    if jobs := list(jobs):
        _run("scancel", "--quiet", *(["--state=PENDING"] if only_waiting else []), *jobs)


def cancel_waiting(name: str) -> None:
    """Cancel the jobs of this name that wait."""
    _run("scancel", "--quiet", "--state=PENDING", f"--user={getpass.getuser()}", f"--name={name}")


def signal_running(name: str, signal: str) -> None:
    """Send a signal to the processes of the jobs of this name that run."""
    _run("scancel", "--quiet", f"--signal={signal}", "--state=RUNNING", f"--user={getpass.getuser()}", f"--name={name}")


def exclude(jobs: Iterable[str], excluded: Iterable[str]) -> None:
    """Keep jobs that wait from these nodes."""
    for array in {array_of(job) for job in jobs}:
        with contextlib.suppress(UnavailableError):  # they have begun meanwhile
            _run("scontrol", "update", f"JobId={array}", f"ExcNodeList={','.join(sorted(excluded))}")


def requeue(job: str) -> None:
    """Put a running job back into the queue. It is ended, so this may be the last thing that it does."""
    _run("scontrol", "requeue", job)


def warning_s(limit_s: int) -> int:
    """How long before its limit a job is told, so that it can end what it is doing."""
    return min(90, max(10, limit_s // 10))


def largest_array() -> int:
    """How many jobs an array may have."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run("scontrol", "show", "config"), re.MULTILINE)
    return int(found[1]) if found else 1000


def _run(*command: str) -> str:
    """What a command prints. Raises `UnavailableError` with its complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMMAND_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"sweep.engine=slurm: {command[0]}: {error}") from error
    if done.returncode:
        raise UnavailableError(f"sweep.engine=slurm: {command[0]}: {_one_line(done.stderr)}")
    return done.stdout


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
