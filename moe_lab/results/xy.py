"""Two columns of a folder of results against each other, as a figure for a paper or a page."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from moe_lab.errors import nearest
from moe_lab.results import columns
from moe_lab.results.look import Look
from moe_lab.results.panels import NO_INTERVAL, log_ticks
from moe_lab.results.style import variant_style

_MOST_TICKS, _WRAP = 12, 36  # ticks of an axis, characters of a name beside the axes
_SIZES = ((7.0, 4.5), (8.0, 6.0), (10.0, 8.0), (14.0, 12.0), (20.0, 20.0))
"""The first in which the text has room, unless the look has a width."""
_SHARES = (0.7, 1.0, 1.4)
"""The height of a figure as a share of the width that was asked for: the first in which the text has room."""
_BY_NAME = ("variant", "model", "router", "experts", "workload", "device", "dtype", "execution")
"""Columns whose values say by themselves what they are."""
_UNITS = {field.name: field.unit for field in columns.TABLES["runs"]}
_BESIDE_X = ("model", "workload", "device", "dtype", "execution", "experts", "batch", "seq_len", "seed")


def column(name: str, runs: pd.DataFrame) -> str:
    """The column of that name, or of that key of the configuration. Raises `ValueError` with the nearest names."""
    for found in (name, f"config.{name}"):
        if found in runs:
            return found
    names = [str(one) for one in runs.columns]
    short = [one.removeprefix("config.") for one in names]
    raise ValueError(
        f"{name}: unknown column; a key of the configuration is one where the runs differ in it."
        f"{nearest(name, [*short, *names])}"
    )


def _lines(runs: pd.DataFrame, x: str, by: str | None) -> list[str]:
    """The columns whose values make a line: those given, else the variant and what else differs at one place of x.

    If x is itself what the variants differ in, the option stands in their place: a line for each router.
    """
    if by is not None:
        return [column(name.strip(), runs) for name in by.split(",")]
    group = x.removeprefix("config.").split(".")[0]
    is_of_variant = x.startswith("config.") and group in runs and runs.groupby("variant")[x].nunique().max() <= 1
    first = group if is_of_variant else "variant"
    place = (
        [x] if x.startswith("config.") or x in (*_BESIDE_X, *_BY_NAME) else []
    )  # a measured value does not place a point
    others: list[str] = []
    for name in (*_BESIDE_X, *(str(one) for one in runs if str(one).startswith("config."))):
        if name not in runs or name in (x, first) or not runs.duplicated([first, *place, *others]).any():
            continue
        if runs.groupby([first, *place, *others], dropna=False)[name].nunique(dropna=False).max() > 1:
            others.append(name)
    return [first, *others]


def _interval(y: str, runs: pd.DataFrame) -> tuple[str, str] | None:
    """The columns with the ends of the 95 % interval of `y`."""
    for start in (f"{y.removesuffix('.p50')}.", f"{y}_"):
        ends = f"{start}ci95_low", f"{start}ci95_high"
        if all(end in runs for end in ends):
            return ends
    return None


def draw(
    runs: pd.DataFrame, x: str, y: str, by: str | None = None, log: bool = False, look: Look | None = None
) -> tuple[Figure, int]:
    """The figure, and how many runs are missing in it.

    Raises:
        ValueError: there is no such column, or `y` is not numeric, or every run lacks one of them.
    """
    look = look or Look()
    names = x, y
    x, y = column(x, runs), column(y, runs)
    if not pd.api.types.is_numeric_dtype(runs[y]):
        raise ValueError(f"{y}: not a column of numbers; only X and --by can be text.")
    has_both = runs[runs[[x, y]].notna().all(axis=1)]
    lines = _lines(has_both, x, by)
    known = has_both[has_both[lines].notna().all(axis=1)] if by is not None else has_both
    known = known.sort_values(x)
    if known.empty:
        raise ValueError(f"no run has {', '.join((x, y, *lines)[:-1])} and {lines[-1]}.")
    if log:
        _refuse_logarithms(known, x, y)
    with rc_context(_settings(look)):
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        ends = _interval(y, known)
        for index, (values, rows) in enumerate(known.groupby(lines, dropna=False)):
            _curve(axes, rows, x, y, ends, index, _label(lines, values))
        _ticks(axes, known[x], log)
        for axis, name, shown in ((axes.xaxis, x, names[0]), (axes.yaxis, y, names[1])):
            unit = _UNITS.get(name) or ""
            axis.set_label_text(shown + (f" ({unit})" if unit not in ("", "1", "as configured") else ""))
        axes.grid(alpha=0.25)
        hollow = ends is not None and known[list(ends)].isna().any(axis=None)
        title = ", ".join(name.removeprefix("config.") for name in lines) + (f"\n{NO_INTERVAL}" if hollow else "")
        figure.legend(title=title, fontsize="small", title_fontsize="small", loc="outside right upper")
    return figure, len(runs) - len(known)


def _refuse_logarithms(known: pd.DataFrame, x: str, y: str) -> None:
    for name in (x, y):
        if pd.api.types.is_numeric_dtype(known[name]) and (known[name].astype(float) <= 0).any():
            raise ValueError(f"--log: {name} has values that are not above 0; leave out --log.")


def _label(lines: Sequence[str], values: Any) -> str:
    """`sinkhorn, seq_len=128`."""
    values = values if isinstance(values, tuple) else (values,)
    named = zip(lines, values, strict=True)
    texts = (str(one) if name in _BY_NAME else f"{name.rsplit('.', 1)[-1]}={_text(one)}" for name, one in named)
    return fill(", ".join(texts), _WRAP)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _curve(
    axes: Axes, rows: pd.DataFrame, x: str, y: str, ends: tuple[str, str] | None, index: int, label: str
) -> None:
    """One line with its error bars; points that have none are hollow."""
    style = variant_style(index)
    is_text = not pd.api.types.is_numeric_dtype(rows[x])
    places: Any = rows[x].map(str).tolist() if is_text else rows[x].astype(float).tolist()
    heights = rows[y].astype(float).to_numpy()
    dashes: Any = (0, style.dashes) if style.dashes else "-"
    if is_text or rows[x].duplicated().any():  # no order, or several runs at one place: no line
        dashes = ""
    (line,) = axes.plot(places, heights, color=style.colour, marker=style.marker, ls=dashes, label=label, zorder=3)
    if ends is None:
        return
    low, high = (rows[end].astype(float).to_numpy() for end in ends)
    has = np.isfinite(low) & np.isfinite(high)
    if not has.any():
        line.set_markerfacecolor("white")
        return
    chosen = [place for place, one in zip(places, has, strict=True) if one]
    errors = np.maximum(0, np.array([heights - low, high - heights])[:, has])
    axes.errorbar(chosen, heights[has], yerr=errors, fmt="none", ecolor=style.colour, capsize=3)
    if not has.all():
        hollow = [place for place, one in zip(places, has, strict=True) if not one]
        axes.plot(hollow, heights[~has], color=style.colour, marker=style.marker, linestyle="", mfc="white", zorder=4)


def _ticks(axes: Axes, x: pd.Series, log: bool) -> None:
    """A few values of x, often powers of two, are the ticks; with logarithms every axis has numbers at its ticks."""
    if not pd.api.types.is_numeric_dtype(x):
        axes.tick_params(axis="x", rotation=30)
        for text in axes.get_xticklabels():
            text.set_horizontalalignment("right")
    places = sorted(set(x)) if pd.api.types.is_numeric_dtype(x) else []
    if log:
        axes.set_yscale("log")
        _number(axes, "y")
        if places:
            axes.set_xscale("log")
            _number(axes, "x")
    if 0 < len(places) <= _MOST_TICKS and (log or len(places) <= 6):
        axes.set_xticks([float(place) for place in places], [f"{place:g}" for place in places])
        axes.xaxis.set_minor_locator(NullLocator())


def _number(axes: Axes, which: str) -> None:
    """Round numbers of each power of ten where there are enough of them, else even steps."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    ticks = log_ticks(*axis.get_view_interval())
    axis.set_major_locator(FixedLocator(ticks) if len(ticks) > 2 else MaxNLocator(5))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _fits(figure: Figure) -> bool:
    """Whether all text lies on the page, and leaves room for the axes."""
    canvas: Any = FigureCanvasAgg(figure)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it does not
        canvas.draw()
    page, drawn = figure.get_size_inches(), figure.get_tightbbox(canvas.get_renderer())
    axes = figure.axes[0].get_window_extent(canvas.get_renderer())
    is_off = min(drawn.x0, drawn.y0, page[0] - drawn.x1, page[1] - drawn.y1) < -0.05
    return not is_off and min(axes.width, axes.height) / figure.dpi >= 0.5


def save(figure: Figure, look: Look) -> bytes:
    """The content of the file. Raises `ValueError` if the figure's text does not fit its size."""
    sizes: Sequence[tuple[float, float]] = _SIZES
    if look.width is not None:
        heights = [look.width * share for share in _SHARES] if look.height is None else [look.height]
        sizes = [(look.width, height) for height in heights]
    with rc_context(_settings(look)):
        for size in sizes:
            figure.set_size_inches(size)
            if _fits(figure):
                return look.content(figure)
    width, height = sizes[-1]
    raise ValueError(
        f"--size={width:g}x{height:g}: too small for the text of this figure; use a larger --size, a smaller "
        "--font-size, or --by with fewer lines."
    )


def _settings(look: Look) -> Any:
    """A dollar in a name is a dollar."""
    return {**look.settings(), "text.parse_math": False}
