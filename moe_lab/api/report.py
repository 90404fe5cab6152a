"""`moe_lab.report`: the tables, plots and page of a folder of results."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

from moe_lab.results import outputs


def report(directory: str | Path) -> Path:
    """Write the tables, plots and report page of a sweep's folder, or of any folder of runs. Returns the page's path.

    Raises:
        ValueError: the folder does not exist, or has no record that can be read.
        OSError: a file cannot be written.
    """
    with redirect_stdout(sys.stderr):  # what could not be read is said there
        n_records = outputs.write(Path(directory))
    if not n_records:
        raise ValueError(f"{directory}: no readable records.")
    return Path(directory) / "report.html"
