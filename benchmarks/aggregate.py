"""Measures how long it takes to aggregate a sweep: all records new, one changed, none changed; each in a fresh process.

The measure is the json module in the same run: reading and parsing the same records, in a fresh process too.

    python -m benchmarks.aggregate              # 10,000 records of 50 samples

The records are synthetic (benchmarks/synthetic.py). The times are of the call, and of the process with its imports.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import synthetic
from moe_lab.records.store import RESULT
from moe_lab.results.aggregate import CACHE, OUTPUTS

CALL = """
import sys, time
from moe_lab.results.aggregate import aggregate
begin = time.perf_counter()
aggregate(sys.argv[1])
print(time.perf_counter() - begin)
"""
JSON = """
import json, sys, time
from pathlib import Path
begin = time.perf_counter()
for path in Path(sys.argv[1]).glob("*/result.json"):
    json.loads(path.read_bytes())
print(time.perf_counter() - begin)
"""


def measure(root: Path, program: str = CALL) -> tuple[float, float]:
    """Seconds of the call and of the process."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, root], check=True, capture_output=True, text=True)
    return float(done.stdout), time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=50, help="timing samples per record")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"{options.cells} records of {options.samples} samples, {len(os.sched_getaffinity(0))} CPUs\n")
    print("| | the call [s] | the process [s] |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folders = synthetic.sweep(root, options.cells, samples=options.samples)
        medians = {}
        for what in ("json", "all new", "one changed", "nothing changed"):
            seconds = []
            for _ in range(options.repeats):
                if what == "all new":
                    for name in (*OUTPUTS, CACHE):
                        (root / name).unlink(missing_ok=True)
                elif what == "one changed":
                    (folders[0] / RESULT).touch()
                seconds.append(measure(root, JSON if what == "json" else CALL))
            columns = list(zip(*seconds, strict=True))
            medians[what] = statistics.median(columns[0])
            shown = " | ".join(", ".join(f"{one:.2f}" for one in column) for column in columns)
            print(f"| {what} | {shown} |", flush=True)
    print(f"\nall new / json: {medians['all new'] / medians['json']:.1f}")
    print(f"one changed / all new: {medians['one changed'] / medians['all new']:.2f}")
    print(f"nothing changed / all new: {medians['nothing changed'] / medians['all new']:.2f}")


if __name__ == "__main__":
    main()
