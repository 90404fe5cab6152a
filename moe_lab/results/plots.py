"""A sweep's plots as files: those of its report, and for a paper. Without colour they tell as much.

from moe_lab.results import plots

look = plots.Look("pdf", width=3.3, font="DejaVu Serif", font_size=8)  # inches, points
plots.publish("outputs/router_swap", "paper", look)                    # every plot of the report
figure, _ = plots.xy(moe_lab.load("outputs/router_swap"), "batch", "latency_ms.p50", look=look)
Path("latency.pdf").write_bytes(plots.content(figure, look))
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill, shorten
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from moe_lab.records.store import own_folder, write_atomic
from moe_lab.results import aggregate, charts, load, search, search_page
from moe_lab.results.coactivation import given
from moe_lab.results.look import Look
from moe_lab.results.panels import (
    FILE_PANELS,
    MARGIN,
    NO_INTERVAL,
    Chart,
    Heat,
    Map,
    Pairs,
    Panel,
    Texts,
    is_log,
    log_ticks,
    relative_load,
    staircase,
)
from moe_lab.results.style import phase_style, variant_style
from moe_lab.results.xy import draw as xy
from moe_lab.results.xy import save as content

__all__ = ["Drawn", "Look", "content", "draw", "publish", "render", "xy"]

_COLUMNS = 3
# Inches at a font of 10 points: around the axes of a panel, the axes themselves, and above all panels.
_LEFT, _RIGHT, _TOP, _BOTTOM, _AXES, _HEAD = 0.75, 0.4, 0.5, 0.6, (3.2, 2.1), 0.3
_NARROWEST = 1.2  # inches of the axes at that font, where a width was asked for
_WRAP, _TICKS = 28, 7  # characters of a name beside an axis, ticks of an axis

_HOLLOW: dict[str, Any] = {"markerfacecolor": "white", "zorder": 3}


class Drawn(NamedTuple):
    """The files written, and a sentence for everything that is not in them."""

    paths: list[Path]
    left_out: list[str]


def draw(directory: Path, runs: pd.DataFrame, summary: pd.DataFrame) -> Drawn:
    """Write a PNG and an SVG of every plot that the data allow into `directory/plots`.

    `runs` and `summary` are those of `aggregate`. A plot of an earlier call that is not drawn now is deleted.
    """
    all_charts = search_page.with_chart(charts.charts(directory, runs, summary), search.find(directory, runs)[0])
    folder = own_folder(directory / "plots")
    left_out, paths = list(all_charts.left_out), []
    for chart in all_charts.drawn:
        figure = render(chart, all_charts.variants, all_charts.phases)
        left_out += _not_in_a_file(chart)
        for ending in ("png", "svg"):
            written = io.BytesIO()
            with rc_context({"svg.hashsalt": chart.name}):  # else its ids are random, and each file is another
                figure.savefig(written, format=ending, dpi=100, metadata={"Date": None} if ending == "svg" else None)
            paths.append(folder / f"{chart.name}.{ending}")
            write_atomic(paths[-1], written.getvalue())
    for path in folder.iterdir():
        if path.suffix in (".png", ".svg") and charts.is_name(path.stem) and path not in paths:
            path.unlink()
    return Drawn(paths, left_out)


def publish(directory: str | Path, folder: str | Path, look: Look | None = None) -> Drawn:
    """Write every plot of a report for a paper: without a title, and in one size of font.

    Args:
        directory: a folder of results, whose tables are brought up to date first.
        folder: where the files go, named like those in `directory/plots`.
        look: the format, the width in inches and the font; by default a PDF as wide as the text needs. Its height is
            not used: each plot has a height of its own.

    Raises:
        ValueError: there is no such folder or no record in it; the width is too small for the names in a plot.
        OSError: a file cannot be written.
    """
    look = look or Look()
    tables = aggregate.aggregate(Path(directory)) if any(load.search(load.folder(directory))) else None
    if tables is None or tables.runs.empty:
        raise ValueError(f"{directory}: no readable records; give the folder of a run or a sweep.")
    all_charts = charts.charts(Path(directory), tables.runs, tables.summary)
    left_out, paths = list(all_charts.left_out), []
    for chart in all_charts.drawn:
        with rc_context(look.settings()):
            figure = render(chart, all_charts.variants, all_charts.phases, look)
        left_out += _not_in_a_file(chart)
        paths.append(own_folder(Path(folder)) / f"{chart.name}.{look.format}")
        write_atomic(paths[-1], look.content(figure))
    return Drawn(paths, left_out)


def _not_in_a_file(chart: Chart) -> list[str]:
    """A sentence for what the report shows of a chart and a file does not."""
    left_out = []
    if len(chart.panels) > FILE_PANELS:
        left_out.append(
            f"{chart.title}: plots/{chart.name} has the first {FILE_PANELS} of {len(chart.panels)} panels; "
            "the report has all panels."
        )
    if chart.kind == "pairs" and any(len(panel.layers) > 1 for panel in chart.panels if isinstance(panel, Pairs)):
        left_out.append(
            f"{chart.title}: plots/{chart.name} shows the layer of each variant with the largest share; the report "
            "has all layers."
        )
    if chart.kind == "texts" and any(len(panel.layers) > 1 for panel in chart.panels if isinstance(panel, Texts)):
        left_out.append(
            f"{chart.title}: plots/{chart.name} shows the layer of each variant in which the texts differ most; the "
            "report has all layers."
        )
    return left_out


class _Grid(NamedTuple):
    """Where the panels of a figure lie, in inches."""

    points: float
    """Of the font, over 10: all text and what is left for it follow."""
    columns: int
    left: float
    """Of the axes, within their panel."""
    axes: tuple[float, float]
    head: float
    """Above all panels, for the title."""

    @property
    def panel(self) -> tuple[float, float]:
        """Width and height with what stands around the axes."""
        return self.left + self.axes[0] + _RIGHT * self.points, self.axes[1] + (_TOP + _BOTTOM) * self.points


def _grid(chart: Chart, panels: Sequence[Panel | Map], look: Look | None, scale: float) -> _Grid:
    """With as many columns as have room beside each other, at most three."""
    points = 1.0 if look is None else look.font_size / 10
    named = [panel.bars if isinstance(panel, Panel) else getattr(panel, "texts", []) for panel in panels]
    names = [line for of_panel in named for name in of_panel for line in fill(name, _WRAP).split("\n")]
    left = (_LEFT + 0.075 * max(map(len, names), default=0)) * points
    rows = [panel.rows if chart.kind == "dots" else len(panel.bars) for panel in panels if isinstance(panel, Panel)]
    columns, width = min(_COLUMNS, len(panels)), _AXES[0] * points
    if look is not None and look.width is not None:
        around = left + _RIGHT * points
        fitting = int((look.width - scale) / (around + _NARROWEST * points))
        if fitting < 1:
            raise ValueError(
                f"--size={look.width:g}: too narrow for the names in {chart.name}; use a larger --size or a smaller "
                "--font-size."
            )
        columns = min(columns, fitting)
        width = (look.width - scale) / columns - around
    height = max([width * _AXES[1] / _AXES[0], *(0.3 * points * n for n in rows)])
    return _Grid(points, columns, left, (width, height), _HEAD if look is None else 0.0)


def render(chart: Chart, variants: Sequence[str], phases: Sequence[str], look: Look | None = None) -> Figure:
    """The first panels of a chart; the sequences give each variant and phase its style.

    With a look, its width and font, and no title: that stands in the paper's caption.
    """
    panels = chart.panels[:FILE_PANELS]
    scale = 0.3 if chart.kind in ("heat", "pairs", "texts") else 0.0  # the colours' scale beside the last column
    scale *= 1.0 if look is None else look.font_size / 10
    grid = _grid(chart, panels, look, scale)
    points, (width, height), (w, h) = grid.points, grid.panel, grid.axes
    total = max(grid.columns * width, 5) if look is None or look.width is None else look.width - scale
    entries = _entries(chart, panels, variants, phases)
    per_row = max(1, int(total / points / (0.7 + 0.08 * max(map(len, entries), default=0))))
    foot = (0.25 * math.ceil(len(entries) / per_row) + 0.1) * points
    size = (total + scale, grid.head + math.ceil(len(panels) / grid.columns) * height + foot)

    figure = Figure(figsize=size)
    if look is None:
        title = _text(chart.title)
        figure.suptitle(title, x=0.15 / size[0], y=1 - 0.12 / size[1], ha="left", va="top", weight="bold")
    maps = [relative_load(panel[3]) for panel in panels if isinstance(panel, Heat | Texts)]
    heat_top = max([2.0, *(float(one.max()) for one in maps)])
    for at, panel in enumerate(panels):
        row, column = divmod(at, grid.columns)
        x, y = column * width + grid.left, size[1] - grid.head - (row + 1) * height + _BOTTOM * points
        axes = figure.add_axes((x / size[0], y / size[1], w / size[0], h / size[1]))
        axes.set_xlabel(_text(chart.x_label))
        axes.set_ylabel(_text(chart.y_label))
        axes.set_title(_title(panel), fontsize=9 * points, loc="left", y=1.0)  # a given y spares matplotlib its search
        if not isinstance(panel, Panel):
            image = _map(axes, panel, heat_top)
            if panel is panels[grid.columns - 1]:  # one scale for all panels, beside the first row
                beside = figure.add_axes(((x + w + 0.1) / size[0], y / size[1], 0.1 / size[0], h / size[1]))
                figure.colorbar(image, cax=beside).ax.tick_params(labelsize=8 * points)
        elif chart.kind == "stack":
            _stack(axes, panel, phases)
        else:
            _curves(axes, panel, chart, variants)
        if look is not None or chart.kind in ("dots", "stack", "texts"):
            axes.tick_params(axis="y" if look is None else "both", labelsize=8 * points)
    if entries:
        handles, names = list(entries.values()), map(_text, entries)
        figure.legend(handles, names, loc="lower center", ncols=per_row, frameon=False, fontsize=9 * points)
    return figure


def _entries(
    chart: Chart, panels: Sequence[Panel | Map], variants: Sequence[str], phases: Sequence[str]
) -> dict[str, Line2D | Patch]:
    """The legend; along rows of names none is needed."""
    shown = {series.name for panel in panels if isinstance(panel, Panel) for series in panel.series}
    if chart.kind == "stack":
        return {name: Patch(**_hatched(phases.index(name))) for name in phases if name in shown}
    if chart.kind == "dots" and all(panel.crowd < 2 for panel in panels if isinstance(panel, Panel)):
        shown = set()
    lines: dict[str, Line2D | Patch] = {
        name: Line2D([], [], **_line(chart, variants.index(name))) for name in variants if name in shown
    }
    lacks = any(chart.lacks(panel) for panel in panels if isinstance(panel, Panel))
    return lines | ({NO_INTERVAL: Line2D([], [], color="0.4", marker="o", linestyle="", **_HOLLOW)} if lacks else {})


def _line(chart: Chart, index: int) -> dict[str, Any]:
    style = variant_style(index)
    dashes: Any = (0, style.dashes) if style.dashes else "-"
    look = {"color": style.colour, "marker": style.marker, "markersize": 5}
    return {**look, "linestyle": dashes if chart.kind == "lines" else ""}


def _hatched(index: int) -> dict[str, Any]:
    style = phase_style(index)
    return {"facecolor": style.colour, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0.5}


def _curves(axes: Axes, panel: Panel, chart: Chart, variants: Sequence[str]) -> None:
    """Values with their intervals, upwards; for `dots` along a row per name."""
    along = chart.kind == "dots"
    for series, offset in zip(panel.series, panel.offsets(), strict=True):
        at = [panel.bars.index(name) + offset for name in series.at] if along else series.at
        reach = [
            [0.0 if end is None else abs(value - end) for value, end in zip(series.value, ends, strict=True)]
            for ends in (series.low, series.high)
        ]
        x, y, x_reach, y_reach = (series.value, at, reach, None) if along else (at, series.value, None, reach)
        line = _line(chart, variants.index(series.name))
        axes.errorbar(x, y, xerr=x_reach, yerr=y_reach, elinewidth=1.2, capsize=2.5, **line)
        if chart.has_intervals:
            bare = [(a, b) for a, b, low in zip(x, y, series.low, strict=True) if low is None]
            axes.plot(*zip(*bare, strict=True), **{**line, "linestyle": "", **_HOLLOW}) if bare else None
    values = [value for series in panel.series for value in (*series.value, *filter(None, series.high))]
    _scale(axes, "x" if along else "y", values)
    if along:
        _bar_names(axes, panel)
    elif chart.kind == "front":
        _scale(axes, "x", [at for series in panel.series for at in series.at])
    elif chart.kind == "lines":
        places = sorted({at for series in panel.series for at in series.at})
        _scale(axes, "x", places, places)
    if (best := staircase(panel, chart.kind)) is not None:
        axes.step(best.at, best.value, where="post", color="0.5", linestyle=":", zorder=0)
    axes.grid(alpha=0.25, linewidth=0.6)


def _stack(axes: Axes, panel: Panel, phases: Sequence[str]) -> None:
    ends = [0.0] * len(panel.bars)
    for series in panel.series:
        rows = [panel.bars.index(name) for name in series.at]
        axes.barh(
            rows, series.value, left=[ends[row] for row in rows], height=0.7, **_hatched(phases.index(series.name))
        )
        for row, value in zip(rows, series.value, strict=True):
            ends[row] += value
    _bar_names(axes, panel)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _bar_names(axes: Axes, panel: Panel) -> None:
    axes.yaxis.set_major_locator(FixedLocator(range(len(panel.bars))))
    axes.yaxis.set_major_formatter(FixedFormatter([_text(fill(name, _WRAP)) for name in panel.bars]))
    axes.set_ylim(len(panel.bars) - 0.5, -0.5)


def _map(axes: Axes, panel: Map, top: float) -> AxesImage:
    if isinstance(panel, Pairs):
        return _pairs(axes, panel)
    return _heat(axes, panel, top) if isinstance(panel, Heat) else _texts(axes, panel, top)


def _heat(axes: Axes, panel: Heat, top: float) -> AxesImage:
    """From 0 to `top`, which is at least 2: an even load, 1 everywhere, never has the last colour."""
    image = axes.imshow(
        relative_load(panel.counts_LE), aspect="auto", cmap="viridis", interpolation="nearest", vmin=0, vmax=top
    )
    step = math.ceil(len(panel.layers) / _TICKS)
    axes.yaxis.set_major_locator(FixedLocator(range(0, len(panel.layers), step)))
    axes.yaxis.set_major_formatter(FixedFormatter([str(layer) for layer in panel.layers[::step]]))
    axes.xaxis.set_major_locator(MaxNLocator(_TICKS, integer=True))
    return image


def _texts(axes: Axes, panel: Texts, top: float) -> AxesImage:
    """Of the layer in which an expert's loads by two texts differ most; the scale is that of `_heat`."""
    load_LGE = relative_load(panel.counts_LGE)
    index = int(np.ptp(load_LGE, axis=1).max(axis=-1).argmax())
    image = axes.imshow(load_LGE[index], aspect="auto", cmap="viridis", interpolation="nearest", vmin=0, vmax=top)
    axes.xaxis.set_major_locator(MaxNLocator(_TICKS, integer=True))
    axes.yaxis.set_major_locator(FixedLocator(range(len(panel.texts))))
    axes.yaxis.set_major_formatter(FixedFormatter([_text(fill(name, _WRAP)) for name in panel.texts]))
    axes.set_ylabel(f"layer {panel.layers[index]}")
    return image


def _pairs(axes: Axes, panel: Pairs) -> AxesImage:
    """Of the layer in which some expert's tokens use another the most."""
    shares = [given(counts_EE) for counts_EE in panel.counts_LEE]
    index = int(np.argmax([np.nanmax(share_EE) for share_EE in shares]))
    image = axes.imshow(shares[index], cmap="viridis", interpolation="nearest", vmin=0, vmax=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(_TICKS, integer=True))
    axes.set_ylabel(f"expert of layer {panel.layers[index]}")
    return image


def _scale(axes: Axes, direction: Literal["x", "y"], values: Sequence[float], ticks: Sequence[float] = ()) -> None:
    """Logarithmic over a factor of eight or more, else from 0; few ticks, the given ones where there are any."""
    low, high = min(values), max(values)
    log = is_log(values)
    if log:
        getattr(axes, f"set_{direction}scale")("log")
        getattr(axes, f"set_{direction}lim")(low / MARGIN, high * MARGIN)
        ticks = ticks or log_ticks(low / MARGIN, high * MARGIN)
    else:
        getattr(axes, f"set_{direction}lim")(0, (high or 1.0) * 1.08)
    axis = getattr(axes, f"{direction}axis")
    if ticks:
        ticks = list(ticks)[:: math.ceil(len(ticks) / (_TICKS + 1))]
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FixedFormatter([f"{tick:,g}" for tick in ticks]))
        axis.set_minor_locator(NullLocator())


def _title(panel: Panel | Map) -> str:
    lines = [panel.title] if isinstance(panel, Panel) else [panel.title, ", ".join(panel.variants)]
    return _text("\n".join(shorten(line, 110) if len(lines) == 1 else shorten(line, 55) for line in lines))


def _text(text: str) -> str:
    """Dollar signs would start a formula."""
    return text.replace("$", r"\$")
