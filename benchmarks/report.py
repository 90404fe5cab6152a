"""Measures the size of the report page of a large sweep, the time to write it, and the time until it can be used.

    python -m benchmarks.report            # or --cells 100

The records are synthetic (benchmarks/synthetic.py). `plots` and `report` are the wall times of one call in this
process, including the import of matplotlib. The page is opened in a fresh headless Chromium. These times start with the
navigation: `table`, until the table can be sorted and filtered; `load`, until the load event; `all`, until all plots
are drawn. `sort` is the time of one click on a heading until the rows are sorted. All are medians of `--rounds`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import browser, synthetic
from moe_lab.results.aggregate import aggregate

_SORT = """
const done = arguments[0], start = performance.now();
document.querySelectorAll("#table thead button")[5].click();
requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
"""
_TIMES = """
const at = name => performance.getEntriesByName(name)[0].startTime;
return [at("table"), performance.getEntriesByType("navigation")[0].loadEventEnd, at("plots")];
"""


def opened(page: Path, rounds: int) -> list[float]:
    """Milliseconds to the table, to the load event, to the last plot, and of a sort."""
    times = []
    for _ in range(rounds):
        driver = browser.start()
        browser.show(driver, page)
        times.append([*driver.execute_script(_TIMES), driver.execute_async_script(_SORT)])
        driver.quit()
    return [statistics.median(column) for column in zip(*times, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[100, 2000])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print("| cells | plots s | report s | page MB | table ms | load ms | all ms | sort ms |")
    print("|---|---|---|---|---|---|---|---|")
    tables = {}
    for cells in arguments.cells:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            synthetic.sweep(directory, cells)
            found = aggregate(directory)
            start = time.perf_counter()
            from moe_lab.results import plots

            plots.draw(directory, found.runs, found.summary)
            drawn = time.perf_counter()
            from moe_lab.results import report

            page = report.write(directory, found)
            written = time.perf_counter()
            table, load, plotted, sort = opened(page, arguments.rounds)
            seconds = f"{drawn - start:.1f} | {written - drawn:.1f} | {page.stat().st_size / 1e6:.1f}"
        tables[cells] = table
        print(f"| {cells} | {seconds} | {table:.0f} | {load:.0f} | {plotted:.0f} | {sort:.0f} |", flush=True)
    first, *_, last = arguments.cells
    print(f"\ntable of {last} cells / of {first}: {tables[last] / tables[first]:.1f}")


if __name__ == "__main__":
    main()
