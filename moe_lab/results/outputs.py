"""All that is made of a folder's records: tables, plots, the report page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console


def write(directory: Path) -> None:
    """Write them, and print where the two that people open lie.

    Raises:
        ValueError: there is no such folder.
        OSError: one of them cannot be written; the message names it.
    """
    from moe_lab.results import aggregate, plots, report

    tables = aggregate.aggregate(directory)
    plots.draw(directory, tables.runs, tables.summary)
    page = report.write(directory, tables)
    console = Console(soft_wrap=True, highlight=False)
    if len(tables.unreadable):
        console.print(f"{len(tables.unreadable)} files could not be read: {directory}/unreadable.csv", markup=False)
    console.print(f"{directory}/runs.csv", markup=False)
    console.print(f"{page}", markup=False)
