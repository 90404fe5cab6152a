"""Measures the overhead of a sweep, compared with a no-op multirun of plain Hydra in alternating rounds.

    python -m benchmarks.sweep_overhead --cells 100 --rounds 3

The overhead is the wall time of `moe-lab -m` over tiny `minimal` cells minus the time of building, verifying, timing
and observing in its records. It includes imports, the start of the device, tables, plots and the report page. What a
cell takes beside its timed iterations (build, verify, observe, record) is compared with a no-op job, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_NO_OP = """
import hydra

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    pass

main()
"""


def no_op(cells: int, folder: Path) -> float:
    """Seconds of a multirun of plain Hydra whose jobs do nothing."""
    (folder / "no_op.py").write_text(_NO_OP)
    axis = ",".join(map(str, range(cells)))
    return _seconds([sys.executable, "no_op.py", "-m", f"+batch={axis}"], folder)


def sweep(cells: int, folder: Path) -> tuple[float, float, float]:
    """(wall seconds of a moe-lab sweep, seconds of it that went into the cells, and of those into timed iterations)."""
    axis = ",".join(str(1 + batch) for batch in range(cells))
    short = ["measure.max_time_s=0.02", "measure.warmup_s=0"]
    command = [sys.executable, "-m", "moe_lab", "-m", "model=minimal", "model.hidden=64", "device=cpu", *short]
    wall = _seconds([*command, f"batch={axis}", "sweep.name=s"], folder)
    results = [json.loads(path.read_text()) for path in folder.glob("outputs/s/*/result.json")]
    assert len(results) == cells
    assert all(result["status"] == "ok" for result in results)
    timed_s = sum(result["latency_ms"]["n"] * result["latency_ms"]["mean"] / 1e3 for result in results)
    return wall, sum(result["elapsed_s"] for result in results), timed_s


def _seconds(command: list[str], folder: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print("| round | no-op Hydra, s | sweep, s | in the cells, s | of it timed, s | overhead / no-op | cell / no-op |")
    print("|---|---|---|---|---|---|---|")
    overheads, own = [], []
    for round_ in range(given.rounds):
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            idle_s = no_op(given.cells, Path(one))
            wall_s, cells_s, timed_s = sweep(given.cells, Path(other))
        overheads.append((wall_s - cells_s) / idle_s)
        own.append((cells_s - timed_s) / idle_s)
        times = f"{idle_s:.2f} | {wall_s:.2f} | {cells_s:.2f} | {timed_s:.2f}"
        print(f"| {round_} | {times} | {overheads[-1]:.2f} | {own[-1]:.2f} |", flush=True)
    print(f"\nmedian overhead / no-op: {statistics.median(overheads):.2f}")
    print(f"median cell beside its timing / no-op: {statistics.median(own):.2f}")


if __name__ == "__main__":
    main()
