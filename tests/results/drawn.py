"""A sweep whose plots are drawn once for the tests of the plots and of the report: they take seven seconds."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks import synthetic
from moe_lab.results import plots
from moe_lab.results.aggregate import Aggregate, aggregate


class Drawn(NamedTuple):
    """Its folder, its tables, and what `plots.draw` said."""

    directory: Path
    found: Aggregate
    drawn: plots.Drawn


@cache
def sweep() -> Drawn:
    """48 cells over batch and seq_len for two models. Among the plots there was one of an earlier sweep, and `mine`."""
    directory = Path(tempfile.mkdtemp(prefix="drawn-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    synthetic.sweep(directory, 48)
    found = aggregate(directory)
    (directory / "plots").mkdir()
    (directory / "plots" / "latency.png").write_bytes(b"of an earlier sweep")
    (directory / "plots" / "mine.png").write_bytes(b"of somebody else")
    return Drawn(directory, found, plots.draw(directory, found.runs, found.summary))
