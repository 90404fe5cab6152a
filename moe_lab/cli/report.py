"""`moe-lab report`: what is made of a folder of results, and its table on the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

from moe_lab.cli.arguments import Parser
from moe_lab.config.schemas import PLOTLY


def tables(directory: Path) -> int:
    """Write the tables alone, and print which files could not be read and how many records there are; return that."""
    from moe_lab.results.aggregate import OUTPUTS, aggregate

    runs, _, unreadable = aggregate(directory)
    counts = ", ".join(f"{number} {status}" for status, number in runs["status"].value_counts().items())
    print(f"{directory}: {len(runs)} records{f' ({counts})' if counts else ''} in {', '.join(OUTPUTS)}")
    if copies := int((runs["n_records"] > 1).sum()):
        print(f"{copies} records have the same cell_id as another record (column n_records)", file=sys.stderr)
    for path, error in unreadable.itertuples(index=False):
        print(f"not read: {path}: {error}", file=sys.stderr)
    return len(runs)


def main(arguments: list[str]) -> int:
    """`moe-lab report`. Returns the exit code."""
    parser = Parser(
        prog="moe-lab report",
        description="Write the tables, plots and report page of a folder of results, and print its table.",
    )
    parser.add_argument("directory", type=Path, help="a sweep's folder, or any folder of runs")
    parser.add_argument("--tables", action="store_true", help="write only the tables")
    parser.add_argument(
        "--plotly",
        choices=PLOTLY,
        help="where the 5 MB of JavaScript are that draw the page's plots: inline in the page, in plotly.min.js in the "
        "same directory, or none: the page shows pictures (default: the sweep's sweep.plotly)",
    )
    given = parser.parse_args(arguments)
    if given.tables and given.plotly:
        raise ValueError("--plotly: only used for the page; remove it or --tables.")
    from moe_lab.cli import table
    from moe_lab.results import load, outputs

    if not any(load.search(load.folder(given.directory))):  # before tables of nothing are written
        raise ValueError(f"{given.directory}: no readable records; give the folder of a run or a sweep.")
    n_records = tables(given.directory) if given.tables else outputs.write(given.directory, plotly=given.plotly)
    if not n_records:
        raise ValueError(f"{given.directory}: no readable records; give the folder of a run or a sweep.")
    records, plan = load.records(given.directory)
    table.print_sweep(records, plan.compare, plan.anchor, f"{given.directory}/runs.csv has them")
    outputs.say(given.directory)
    return 0
