"""Writes the tables, the plots and the report page of a folder of records."""

from __future__ import annotations

from pathlib import Path

from moe_lab.terminal import Console


def write(directory: Path, *, with_report: bool = True, plotly: str | None = None) -> int:
    """Write the tables, and with `with_report` the plots and the page; print the paths of the main files.

    `plotly` is that of `report.write`.

    Returns the number of records.

    Raises:
        ValueError: the folder does not exist.
        OSError: a file cannot be written; the message names it.
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
        console.print(f"{report.write(directory, tables, plotly)}", markup=False)
    return len(tables.runs)


def say(directory: Path) -> None:
    """Print what to take of a folder of records, and how sure that is: what its report begins with."""
    from moe_lab.results import aggregate, search
    from moe_lab.results.answers import answers

    tables = aggregate.aggregate(directory)
    found, _ = search.find(directory, tables.runs)
    shown = answers(tables.runs, tables.summary, search.sentences(found) if found else ()).shown
    take, unsure = ([each for each in shown if each.question in of] for of in (("search", "take"), ("not sure",)))
    console = Console(highlight=False)
    for answer in [*take, *unsure[:1]] if take else ():
        style = "bold" if answer in take else "yellow"
        # A terminal is given whole words, for it would break a number at its edge; a file a line for each sentence.
        console.print(f"{answer.text}.", style=style, markup=False, soft_wrap=not console.is_terminal)
