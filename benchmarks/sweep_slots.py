"""Measures what slots cost and gain: two slots against one, the overhead of a group, and a sweep of many groups.

    python -m benchmarks.sweep_slots two --engines worker ray           # with OMP_NUM_THREADS=1
    python -m benchmarks.sweep_slots overhead --engines worker ray      # the same
    python -m benchmarks.sweep_slots many --engines ray --groups 2000   # the same

two: wall time of 24 groups (`--groups`) whose cells take four seconds of one core each, on one slot and on two, in
alternating rounds. Beside it, what two slots do not shorten: from the command to the first group (the start of a
cluster, of slots, of workers) and from the last cell to the end.
overhead: seconds that each further group of a trivial cell takes, by the slope between two sizes of a sweep; of a slot
minus of one worker without slots. many: the driver's resident memory while groups of a trivial cell run on two slots,
the files that the sweep leaves, and how long its tables take.
Ray's cluster is that of RAY_ADDRESS, or one that each sweep starts here, whose start is in the wall time of `two`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import aggregate
from moe_lab.results.aggregate import OUTPUTS
from moe_lab.results.kept import CACHE

_TRIVIAL = ["model=minimal", "model.hidden=64", "device=cpu", "measure.roofline=false", "measure.warmup_s=0"]
_DONE = re.compile(r"\[(\d+)/\d+\]")
_BEGINS = " to run in "  # in the line before the first group


def command(groups: int, seconds: float, more: list[str]) -> list[str]:
    """A sweep of so many groups of one cell, each timed for so long."""
    timed = [f"measure.max_time_s={seconds}", "measure.target_ci=1e-9", "sweep.report=false", "sweep.name=s"]
    return [sys.executable, "-m", "moe_lab", "-m", *_TRIVIAL, *timed, f"seed=range({groups})", *more]


class Wall(NamedTuple):
    """Seconds of a sweep."""

    all_s: float
    fixed_s: float
    """Before the first group and after the last cell."""


def wall(groups: int, seconds: float, more: list[str]) -> Wall:
    """What it takes, after which every cell has its record."""
    with tempfile.TemporaryDirectory() as folder:
        begun = last = time.perf_counter()
        start_s = 0.0
        words = command(groups, seconds, more)
        with subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as sweep:
            assert sweep.stderr is not None
            for line in sweep.stderr:
                if _BEGINS in line:
                    start_s = time.perf_counter() - begun
                elif _DONE.match(line):
                    last = time.perf_counter()
        ended = time.perf_counter()
        assert sweep.returncode == 0 and start_s
        assert len(list(Path(folder).glob("outputs/s/*/result.json"))) == groups
    return Wall(ended - begun, start_s + ended - last)


def on(engine: str, slots: int) -> list[str]:
    return [f"sweep.engine={engine}", f"sweep.slots.cpu={slots}", "sweep.slots.cpus_each=1"]


def two(engines: list[str], rounds: int, groups: int) -> None:
    print("| engine | round | one slot, s | of that start and end | two slots, s | of that start and end | two / one |")
    print("|---|---|---|---|---|---|---|")
    for engine in engines:
        ratios = []
        for round_ in range(rounds):
            one, both = (wall(groups, 4.0, on(engine, slots)) for slots in (1, 2))
            ratios.append(both.all_s / one.all_s)
            seconds = " | ".join(f"{each:.1f}" for each in (*one, *both))
            print(f"| {engine} | {round_} | {seconds} | {ratios[-1]:.3f} |", flush=True)
        print(f"| {engine} | median | | | | | {statistics.median(ratios):.3f} |", flush=True)


def overhead(engines: list[str], rounds: int, few: int = 20, many: int = 120) -> None:
    print("| where | round | seconds for each group | more than one worker without slots |")
    print("|---|---|---|---|")
    for round_ in range(rounds):
        alone = None
        for name, more in (("one worker", []), *((f"one slot, {engine}", on(engine, 1)) for engine in engines)):
            each = (wall(many, 0.02, more).all_s - wall(few, 0.02, more).all_s) / (many - few)
            alone = each if alone is None else alone
            print(f"| {name} | {round_} | {each:.3f} | {each - alone:+.3f} |", flush=True)


def many(engine: str, groups: int) -> None:
    print(f"\n{engine}\n\n| groups done | driver's memory, MB | seconds |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        sweep = subprocess.Popen(
            command(groups, 0.02, on(engine, 2)),
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert sweep.stderr is not None
        for line in sweep.stderr:
            found = _DONE.match(line)
            if found and int(found[1]) % max(groups // 10, 1) == 0:
                status = Path(f"/proc/{sweep.pid}/status").read_text()
                (resident,) = re.findall(r"VmRSS:\s*(\d+) kB", status)
                print(f"| {found[1]} | {int(resident) / 1e3:.0f} | {time.perf_counter() - begun:.0f} |", flush=True)
        code = sweep.wait()
        print(f"\nexit code {code} after {time.perf_counter() - begun:.0f} s\n", flush=True)
        root = Path(folder, "outputs", "s")
        files_of(root)
        tables_of(root)


def files_of(root: Path) -> None:
    """How many files a sweep leaves, and how large: of its cells, and beside them."""
    print("| files | how many | MB |\n|---|---|---|")
    sizes: dict[str, list[int]] = {}
    for path in root.rglob("*"):
        if path.is_file():
            is_of_cell = path.parent != root and not path.parent.name.startswith(".")
            name = f"a cell's {path.name}" if is_of_cell else str(path.relative_to(root))
            sizes.setdefault(name, []).append(path.stat().st_size)
    for name, found in sorted(sizes.items()):
        print(f"| {name} | {len(found)} | {sum(found) / 1e6:.2f} |")


def tables_of(root: Path) -> None:
    """How long its tables take, against the json module, as `benchmarks.aggregate` measures it."""
    print("\n| | the call [s] |\n|---|---|")
    medians = {}
    for what in ("json", "all new", "nothing changed"):
        seconds = []
        for _ in range(3):
            if what == "all new":
                for name in (*OUTPUTS, CACHE):
                    (root / name).unlink(missing_ok=True)
            seconds.append(aggregate.measure(root, aggregate.JSON if what == "json" else aggregate.CALL)[0])
        medians[what] = statistics.median(seconds)
        print(f"| {what} | {', '.join(f'{one:.2f}' for one in seconds)} |", flush=True)
    print(f"\nall new / json: {medians['all new'] / medians['json']:.1f}")
    print(f"nothing changed / all new: {medians['nothing changed'] / medians['all new']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["two", "overhead", "many"])
    parser.add_argument("--engines", nargs="+", default=["worker", "ray"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", type=int, help="of `two` (24), or of `many` (2000)")
    given = parser.parse_args()
    if given.what == "many":
        for engine in given.engines:
            many(engine, given.groups or 2000)
    elif given.what == "two":
        two(given.engines, given.rounds, given.groups or 24)
    else:
        overhead(given.engines, given.rounds)


if __name__ == "__main__":
    main()
