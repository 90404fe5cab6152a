"""`moe-lab status`: where a sweep is, from another terminal or another machine."""

from __future__ import annotations

import argparse
import shlex
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from moe_lab.cli.arguments import Parser
from moe_lab.cli.reporter import clock
from moe_lab.cli.table import print_table
from moe_lab.records import store
from moe_lab.sweep import status
from moe_lab.sweep.status import Status

_HELP = """\
Show where a sweep is: cells done, running where, failed, and when it will end.
It reads the folder alone, so it works in another terminal, and on any machine
that sees the folder.
"""


def main(arguments: list[str]) -> int:
    """`moe-lab status`. Returns the exit code."""
    parser = Parser(prog="moe-lab status", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="the folder of a sweep: outputs/NAME")
    given = parser.parse_args(arguments)
    found = status.read(given.directory)
    now = time.time()
    rows = [
        (
            slot.slot,
            str(slot.group or "-"),
            slot.cell or "-",
            slot.step or "-",
            clock(now - slot.updated),
            str(slot.n_done),
            str(slot.n_failed),
            slot.note or "-",
        )
        for slot in found.slots
    ]
    columns = ("slot", "group", "cell", "step", "since", "done", "failed", "job")
    n_columns = len(columns) - (not any(slot.note for slot in found.slots))  # only schedulers have jobs
    if rows:
        print_table(columns[:n_columns], [row[:n_columns] for row in rows])
    for record in found.failed:
        assert record.directory is not None
        print(f"failed: {record.reason} ({Path(record.directory) / store.LOG})")
    print(f"{given.directory}: {_counts(found)}{_when(found, now)}")
    return 0


def _counts(found: Status) -> str:
    return f"{found.n_cells} cells: " + ", ".join(f"{number} {name}" for name, number in found.counts.items())


def _when(found: Status, now: float) -> str:
    """How long it runs and will run, or how to continue."""
    if found.owner is None:
        if "to run" not in found.counts:
            return ""
        if found.jobs:
            return f"; {found.jobs}; to go on with them, run: {shlex.join(found.command)}"
        return f"; nobody runs them; to continue, run: {shlex.join(found.command)}"
    text = f"; runs{found.owner}"
    if found.elapsed_s is not None:
        text += f", {clock(found.elapsed_s)}"
    if found.left_s is not None:
        end = datetime.fromtimestamp(now, UTC) + timedelta(seconds=found.left_s)
        text += f", about {clock(found.left_s)} left (until {end:%Y-%m-%d %H:%M} UTC)"
    return text
