"""Draw two columns of a folder of runs against each other.

    python scripts/plot.py outputs/my_sweep batch latency_ms.p50 --by variant --log -o latency.png

The columns are those of `moe_lab.load` (docs/results-format.md); runs that lack one of them are left out, and counted.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

import moe_lab
from moe_lab.results.style import variant_style


def draw(runs: pd.DataFrame, x: str, y: str, by: str, log: bool) -> tuple[Figure, int]:
    """The picture, and how many runs are not in it. Raises `ValueError` for a column that is not there or no number."""
    for name in (x, y, by):
        if name not in runs:
            near = difflib.get_close_matches(name, map(str, runs.columns), n=1, cutoff=0)
            hint = f"; the nearest name is {near[0]}" if near else ": there are no runs"
            raise ValueError(f"there is no column {name!r}{hint}.")
    if not pd.api.types.is_numeric_dtype(runs[y]):
        raise ValueError(f"column {y!r} holds no numbers; only X and --by may be text.")
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
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        places = sorted(set(known[x]))
        if pd.api.types.is_numeric_dtype(known[x]):
            axes.set_xscale("log")
            if len(places) <= 12:  # sizes: powers of two rather than of ten
                axes.set_xticks(places, [f"{place:g}" for place in places])
                axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.legend(title=by, fontsize=8)
    return figure, len(runs) - len(known)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("x", help="a column, for example batch")
    parser.add_argument("y", help="a column of numbers, for example latency_ms.p50")
    parser.add_argument("--by", default="variant", help="a line for each value of this column (default: %(default)s)")
    parser.add_argument("--log", action="store_true", help="logarithmic axes")
    parser.add_argument("-o", "--output", type=Path, help="default: plots/<Y>_over_<X>.png in DIRECTORY")
    given = parser.parse_args(arguments)
    output = given.output or given.directory / "plots" / f"{given.y}_over_{given.x}.png"
    try:
        figure, missing = draw(moe_lab.load(given.directory), given.x, given.y, given.by, given.log)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
    except (ValueError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    print(f"{output}" + (f" (without {missing} runs that lack one of these columns)" if missing else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
