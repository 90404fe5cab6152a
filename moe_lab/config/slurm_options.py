"""What the keys of `sweep.slurm` may be. Slurm checks the rest when a job is submitted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_OURS = ("array", "error", "job-name", "no-requeue", "open-mode", "output", "requeue", "signal", "time", "wrap")
"""Options of sbatch that a sweep sets itself."""


def check(sweep: Mapping[str, Any]) -> None:
    """Raise `ValueError` for what a sweep with `sweep.engine=slurm` cannot have."""
    slurm, slots = sweep["slurm"], sweep["slots"]
    seconds_of(slurm["time"])
    texts = {key: slurm[key] for key in ("partition", "account", "qos", "constraint", "gres", "mem")}
    for key, value in {**texts, **{f"options.{key}": value for key, value in slurm["options"].items()}}.items():
        if not re.fullmatch(r"[a-zA-Z0-9_.-]+", key) or not str(value).isprintable():
            raise ValueError(f"sweep.slurm.{key!s}={value!r}: must be one line of text; it stands in a script.")
    if not sweep["shared"]:
        raise ValueError(
            "sweep.shared=false: jobs of Slurm write to the sweep's folder; set hydra.sweep.dir to one that all nodes "
            "share."
        )
    gpus = [entry.split(":") for entry in (slurm["gres"] or "").split(",") if entry.split(":")[0] == "gpu"]
    if any(parts[-1].isdecimal() and int(parts[-1]) != 1 for parts in gpus):
        raise ValueError(f"sweep.slurm.gres={slurm['gres']}: a job times one group on one GPU; use gpu:1.")
    for kind, has in (("cuda", bool(gpus)), ("cpu", not gpus)):
        if slots[kind] is not None and not has:
            remedy = "set sweep.slurm.gres=gpu:1 too" if kind == "cuda" else "use sweep.slots.cuda beside a GPU in gres"
            raise ValueError(f"sweep.slots.{kind}={slots[kind]}: the most jobs at once; {remedy}.")
    for option in slurm["options"]:
        if str(option).replace("_", "-").lstrip("-") in _OURS:
            raise ValueError(f"sweep.slurm.options: {option} is set by the sweep; remove it.")


def seconds_of(time: str) -> int:
    """Of HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS. Raises `ValueError`."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", str(time))
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    if not (total := 86400 * days + 3600 * hours + 60 * minutes + seconds):
        raise ValueError(
            f"sweep.slurm.time={time}: must be HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, such as 01:30:00; "
            "in a YAML file in quotes."
        )
    return total
