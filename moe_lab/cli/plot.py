"""`moe-lab plot`: two columns of a folder of results against each other."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from moe_lab.cli.arguments import Parser
from moe_lab.errors import nearest
from moe_lab.results.load import load
from moe_lab.results.style import variant_style

_MOST_TICKS = 12
_EXAMPLES = """\
The columns are described in docs/results-format.md. Runs without one of them are left out and counted.

example:
  moe-lab plot outputs/my_sweep batch latency_ms.p50 --by variant --log -o latency.png
"""


def draw(runs: pd.DataFrame, x: str, y: str, by: str, log: bool) -> tuple[Figure, int]:
    """The figure, and how many runs are missing in it.

    Raises:
        ValueError: there is no such column, or `y` is not numeric, or no run has all three.
    """
    for name in (x, y, by):
        if name not in runs:
            raise ValueError(f"{name}: unknown column.{nearest(name, map(str, runs.columns))}")
    if not pd.api.types.is_numeric_dtype(runs[y]):
        raise ValueError(f"{y}: not a column of numbers; only X and --by can be text.")
    known = runs[runs[[x, y, by]].notna().all(axis=1)].sort_values(x)
    if known.empty:
        raise ValueError(f"no run has {x}, {y} and {by}.")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, rows) in enumerate(known.groupby(by)):
        style = variant_style(index)
        dashes = (0, style.dashes) if style.dashes else "-"
        axes.plot(
            rows[x].tolist(),
            rows[y].astype(float).tolist(),
            color=style.colour,
            marker=style.marker,
            linestyle="" if rows[x].duplicated().any() else dashes,  # several runs at one x make no line
            label=str(name).replace("$", r"\$"),
        )
    if log:
        _use_logarithms(axes, known[x])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.legend(title=by, fontsize=8)
    return figure, len(runs) - len(known)


def _use_logarithms(axes: Axes, x: pd.Series) -> None:
    """Of y, and of x if it is numeric; a few values of x, often powers of two, are the ticks."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    if not pd.api.types.is_numeric_dtype(x):
        return
    axes.set_xscale("log")
    places = sorted(set(x))
    if len(places) <= _MOST_TICKS:
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.xaxis.set_minor_locator(NullLocator())


def parser() -> Parser:
    """The options of `moe-lab plot`."""
    options = Parser(
        prog="moe-lab plot",
        description="Draw two columns of a folder of results against each other.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("directory", type=Path, help="a sweep's folder, or any folder of runs")
    options.add_argument("x", metavar="X", help="a column, for example batch")
    options.add_argument("y", metavar="Y", help="a column of numbers, for example latency_ms.p50")
    options.add_argument("--by", default="variant", help="a line for each value of this column (default: %(default)s)")
    options.add_argument("--log", action="store_true", help="logarithmic axes")
    options.add_argument("-o", "--output", type=Path, help="the output file (default: plots/Y_over_X.png in DIRECTORY)")
    return options


def main(arguments: list[str]) -> int:
    """`moe-lab plot`. Returns the exit code."""
    given = parser().parse_args(arguments)
    output = given.output or given.directory / "plots" / f"{given.y}_over_{given.x}.png"
    figure, missing = draw(load(given.directory), given.x, given.y, given.by, given.log)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    print(f"{output}" + (f" ({missing} runs without one of these columns are left out)" if missing else ""))
    return 0
