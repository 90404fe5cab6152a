"""`moe-lab clean`: list, or remove, the runs that nobody needs."""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

from moe_lab.cli.arguments import Parser
from moe_lab.records import leftovers, store
from moe_lab.records.held import held
from moe_lab.records.leftovers import Leftover
from moe_lab.sweep.lock import Lock
from moe_lab.terminal import Console

_HELP = """\
List the runs below DIRECTORY that failed, and the earlier results that were set
aside. Nothing is removed without --remove.
"""
_EXAMPLES = """\
kinds:
  --failed          runs without a result: failed, interrupted, killed
  --stale           earlier results of other code or another machine, set aside
                    when their cell ran again (stale-*), and unreadable files;
                    only where the present result is ok
  --older-than DAYS runs that began more than DAYS days ago, whatever came of them
Without one of these it is --failed --stale.

examples:
  moe-lab clean                               what could go from outputs/
  moe-lab clean --remove                      remove it
  moe-lab clean outputs/nightly --older-than 30 --remove
"""

_MOST_NAMED = 10  # folders that cannot be read


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = math.nan
    if not 0 <= days < 100_000:
        raise argparse.ArgumentTypeError(f"{text}: must be a number of days, 0 or more; write --older-than 30")
    return days


def main(arguments: list[str]) -> int:
    """`moe-lab clean`. Returns the exit code."""
    parser = Parser(
        prog="moe-lab clean",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directory", nargs="?", default="outputs", type=Path, help="a folder of results (default: %(default)s)"
    )
    parser.add_argument("--failed", action="store_true", help="only runs without a result")
    parser.add_argument("--stale", action="store_true", help="only earlier results that were set aside")
    parser.add_argument("--older-than", type=_days, metavar="DAYS", help="only runs that began longer ago")
    parser.add_argument("--remove", action="store_true", help="remove what is listed")
    given = parser.parse_args(arguments)
    days = given.older_than
    if not given.directory.is_dir():
        raise ValueError(f"{given.directory}: folder not found.")
    everything = not given.failed and not given.stale and days is None
    unreadable: list[OSError] = []
    found = leftovers.find(
        given.directory,
        failed=given.failed or everything,
        stale=given.stale or everything,
        before=None if days is None else datetime.now(UTC) - timedelta(days=days),
        unreadable=unreadable.append,
    )
    _go(list(found), given.directory, remove=given.remove)
    _say_unreadable(unreadable)
    return 0


def _say_unreadable(errors: list[OSError]) -> None:
    """The folders in which nobody looked, each in a line, or of many some and how many others there are."""
    for error in errors[:_MOST_NAMED]:
        print(f"moe-lab clean: {error.filename}: not looked into ({error.strerror})", file=sys.stderr)
    if len(errors) > _MOST_NAMED:
        print(f"moe-lab clean: {len(errors) - _MOST_NAMED} more folders not looked into", file=sys.stderr)


def _go(found: list[Leftover], root: Path, *, remove: bool) -> None:
    console = Console(soft_wrap=True, highlight=False)
    n_bytes = n_found = n_removed = 0
    sweeps: set[Path] = set()
    for leftover in found:
        try:
            here = leftover.n_bytes
        except OSError as error:
            console.print(f"{leftover.folder}: left out ({_why(error)})", style="yellow", markup=False)
            continue
        line = f"{leftover.kind:6}  {leftover.when:%Y-%m-%d}  {size(here):>8}  {leftover.folder}: "
        if not remove:
            n_found, n_bytes = n_found + 1, n_bytes + here
            console.print(line + leftover.why, markup=False)
            continue
        sweep = next((above for above in leftover.folder.parents if (above / store.PLAN).is_file()), None)
        try:
            with ExitStack() as locks:
                if sweep is not None:
                    locks.callback(Lock(sweep).release)
                locks.enter_context(held(leftover.folder))
                stays = leftovers.remove(leftover)
        except ValueError:
            console.print(f"{line}kept: it is in use", style="yellow", markup=False)
            continue
        except OSError as error:
            console.print(f"{line}not removed ({_why(error)})", style="yellow", markup=False)
            continue
        n_removed, n_bytes = n_removed + 1, n_bytes + here
        sweeps |= {sweep} if sweep is not None else set()
        others = [name for name in stays if name != store.RESULT] if leftover.kind != "stale" else []
        console.print(line + "removed" + (f"; left there: {', '.join(others)}" if others else ""), markup=False)
    if not remove:
        how = "; --remove removes them" if n_found else ""
        console.print(f"{root}: {n_found} could go, {size(n_bytes)}{how}", markup=False)
        return
    console.print(f"{root}: {n_removed} of {len(found)} removed, {size(n_bytes)}", markup=False)
    for sweep in sorted(sweeps):
        if leftovers.remove_empty_sweep(sweep):
            console.print(f"{sweep}: no run is left, so its tables and page went too", markup=False)
        else:
            console.print(f"moe-lab report {sweep} makes its tables and page again", markup=False)


def _why(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}"


def size(n_bytes: float) -> str:
    """In the largest unit of which there is one."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            return f"{n_bytes:.3g} {unit}" if unit != "B" else f"{n_bytes:.0f} B"
        n_bytes /= 1000
    raise AssertionError("the last unit takes all")
