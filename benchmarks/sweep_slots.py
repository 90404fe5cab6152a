"""Measures what slots cost and gain: two slots against one, the overhead of a group, and a sweep of many groups.

    python -m benchmarks.sweep_slots two --engines worker ray           # with OMP_NUM_THREADS=1
    python -m benchmarks.sweep_slots overhead --engines worker ray      # the same
    python -m benchmarks.sweep_slots many --engines ray --groups 2000   # the same

two: wall time of 24 groups whose cells take four seconds of one core each, on two slots and on one, in alternating
rounds.
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

from benchmarks import aggregate
from moe_lab.results.aggregate import OUTPUTS
from moe_lab.results.kept import CACHE

_TRIVIAL = ["model=minimal", "model.hidden=64", "device=cpu", "measure.roofline=false", "measure.warmup_s=0"]
_DONE = re.compile(r"\[(\d+)/\d+\]")


def command(groups: int, seconds: float, more: list[str]) -> list[str]:
    """A sweep of so many groups of one cell, each timed for so long."""
    timed = [f"measure.max_time_s={seconds}", "measure.target_ci=1e-9", "sweep.report=false", "sweep.name=s"]
    return [sys.executable, "-m", "moe_lab", "-m", *_TRIVIAL, *timed, f"seed=range({groups})", *more]


def wall(groups: int, seconds: float, more: list[str]) -> float:
    """Seconds that it takes, after which every cell has its record."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        quiet = subprocess.DEVNULL
        subprocess.run(command(groups, seconds, more), cwd=folder, check=True, stdout=quiet, stderr=quiet)
        taken = time.perf_counter() - begun
        assert len(list(Path(folder).glob("outputs/s/*/result.json"))) == groups
    return taken


def on(engine: str, slots: int) -> list[str]:
    return [f"sweep.engine={engine}", f"sweep.slots.cpu={slots}", "sweep.slots.cpus_each=1"]


def two(engines: list[str], rounds: int) -> None:
    print("| engine | round | one slot, s | two slots, s | two / one |")
    print("|---|---|---|---|---|")
    for engine in engines:
        ratios = []
        for round_ in range(rounds):
            one_s, two_s = (wall(24, 4.0, on(engine, slots)) for slots in (1, 2))
            ratios.append(two_s / one_s)
            print(f"| {engine} | {round_} | {one_s:.1f} | {two_s:.1f} | {ratios[-1]:.2f} |", flush=True)
        print(f"| {engine} | median | | | {statistics.median(ratios):.2f} |", flush=True)


def overhead(engines: list[str], rounds: int, few: int = 20, many: int = 120) -> None:
    print("| where | round | seconds for each group | more than one worker without slots |")
    print("|---|---|---|---|")
    for round_ in range(rounds):
        alone = None
        for name, more in (("one worker", []), *((f"one slot, {engine}", on(engine, 1)) for engine in engines)):
            each = (wall(many, 0.02, more) - wall(few, 0.02, more)) / (many - few)
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
    parser.add_argument("--groups", type=int, default=2000)
    given = parser.parse_args()
    if given.what == "many":
        for engine in given.engines:
            many(engine, given.groups)
    else:
        {"two": two, "overhead": overhead}[given.what](given.engines, given.rounds)


if __name__ == "__main__":
    main()
