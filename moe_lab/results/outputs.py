"""All that is made of a folder's records: tables, plots, the report page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console


def write(directory: Path, *, with_report: bool = True) -> None:
    """Write them, or the tables alone, and print where those that people open lie.

    Raises:
        ValueError: there is no such folder.
        OSError: one of them cannot be written; the message names it.
    """
    from moe_lab.results import aggregate

    tables = aggregate.aggregate(directory)
    console = Console(soft_wrap=True, highlight=False)
    if len(tables.unreadable):
        console.print(f"{len(tables.unreadable)} files could not be read; see {directory}/unreadable.csv", markup=False)
    console.print(f"{directory}/runs.csv", markup=False)
    if with_report:
        from moe_lab.results import plots, report  # matplotlib takes half a second to import

        plots.draw(directory, tables.runs, tables.summary)
        console.print(f"{report.write(directory, tables)}", markup=False)
