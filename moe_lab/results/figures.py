"""The charts as Plotly's figures, plain dicts: for each panel its traces, and of the layout what is not a colour."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from textwrap import wrap
from typing import Any

from moe_lab.results.charts import Charts
from moe_lab.results.numbers import four, interval
from moe_lab.results.panels import (
    MARGIN,
    NO_INTERVAL,
    Chart,
    Map,
    Panel,
    Series,
    Staircase,
    Texts,
    is_log,
    log_ticks,
    staircase,
)
from moe_lab.results.style import phase_style, variant_style

HEAT_NUMBERS = 400_000
"""As many counts of experts as a page carries: some 2 MB."""
_WRAP = 20  # characters of a name beside an axis

Figure = dict[str, Any]


def figures(found: Charts) -> tuple[list[Figure], list[str]]:
    """For each chart a dict that `report.html.jinja` draws, and a sentence for what would make the page too large."""
    left_out = []
    result = []
    for chart in found.drawn:
        panels: list[Figure]
        if chart.kind in ("heat", "pairs", "texts"):
            kept, n_maps = _within(HEAT_NUMBERS, [panel for panel in chart.panels if not isinstance(panel, Panel)])
            panels = [_map(panel) for panel in kept]
            shown, name = sum(len(panel.layers) for panel in kept), chart.title.split(" (")[0]
            if shown < n_maps:
                left_out.append(
                    f"{name}: {shown} of {n_maps} layers of different cells are shown, to limit the size of the page; "
                    "the other layers are in routing.npz of the cells."
                )
        else:
            panels = [_panel(panel, chart, found) for panel in chart.panels if isinstance(panel, Panel)]
        if panels:
            result.append({"name": chart.name, "kind": chart.kind, "title": chart.title, "panels": panels})
    return result, left_out


def _within(limit: int, maps: Sequence[Map]) -> tuple[list[Map], int]:
    """The first layers of the first panels that have no more numbers than this, and how many layers there are."""
    kept: list[Map] = []
    for panel in maps:
        title, variants, layers, counts, *rest = panel
        fit = min(len(layers), limit // counts[0].size)
        limit -= fit * counts[0].size
        if fit:
            kept.append(type(panel)(title, variants, layers[:fit], counts[:fit], *rest))
    return kept, sum(len(panel.layers) for panel in maps)


def _map(panel: Map) -> Figure:
    """The page turns counts by expert into a map of all layers or bars of one, those of pairs into a map of one.

    Those by text become a map of all layers or of one, with a row for each text.
    """
    title, variants, layers, counts, *_ = panel
    figure = {"title": title, "place": dict(panel.place), "variants": ", ".join(variants), "layers": layers}
    figure["counts"] = counts.tolist()
    return figure | ({"texts": [_plain(text) for text in panel.texts]} if isinstance(panel, Texts) else {})


def _panel(panel: Panel, chart: Chart, found: Charts) -> Figure:
    data = (
        _dots(panel, chart, found)
        if chart.kind == "dots"
        else [(_bar if chart.kind == "stack" else _curve)(series, chart, found) for series in panel.series]
    )
    x: Figure = {"title": {"text": _plain(chart.x_label)}}
    y: Figure = {"title": {"text": _plain(chart.y_label)}}
    if chart.kind == "stack":
        y |= {"autorange": "reversed", "automargin": True, "type": "category"}
        x |= {"rangemode": "tozero"}
    elif chart.kind == "dots":
        y |= {"range": [len(panel.bars) - 0.5, -0.5], "automargin": True, "zeroline": False}
        y |= {"tickvals": [*range(len(panel.bars))], "ticktext": [_bar_name(name) for name in panel.bars]}
        x |= _axis([value for series in panel.series for value in series.value])
    else:
        y |= _axis([value for series in panel.series for value in series.value])
        x |= (
            {}
            if chart.kind in ("points", "front")
            else _axis([at for series in panel.series for at in series.at], ticks=True)
        )
    if chart.kind == "front":
        x |= _axis([at for series in panel.series for at in series.at]) | {"rangemode": "normal"}  # none is near 0
    if (best := staircase(panel, chart.kind)) is not None:
        data.append(_steps(best))
    if chart.lacks(panel):
        data.append(_no_interval())
    bars = panel.rows if chart.kind == "dots" else len(panel.bars)
    layout = {"xaxis": x, "yaxis": y, "barmode": "stack", "bars": bars}
    return {"title": panel.title, "place": dict(panel.place), "data": data, "layout": layout}


def _axis(values: Sequence[float], ticks: bool = False) -> Figure:
    axis: Figure = {"type": "log"} if is_log(values) else {"type": "linear", "rangemode": "tozero"}
    if ticks:
        places = sorted(set(values))
        axis |= {"tickvals": places, "ticktext": [f"{place:,}" for place in places]}
    elif is_log(values):
        places = log_ticks(min(values) / MARGIN, max(values) * MARGIN)
        axis |= {"tickvals": places, "ticktext": [f"{place:,g}" for place in places]}
    return axis


def _steps(best: Staircase) -> Figure:
    line = {"color": "#7a828e", "dash": "dot", "width": 1.5, "shape": "hv"}
    trace = {"type": "scatter", "mode": "lines", "name": best.name, "hoverinfo": "skip", "line": line}
    return trace | {"x": [_short(number) for number in best.at], "y": [_short(number) for number in best.value]}


def _error(series: Series) -> Figure:
    """The interval, as lengths above and below; none of a value without."""
    if all(end is None for end in series.low):
        return {"visible": False}
    above = [None if end is None else _short(end - value) for value, end in zip(series.value, series.high, strict=True)]
    below = [None if end is None else _short(value - end) for value, end in zip(series.value, series.low, strict=True)]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.2, "width": 3}


def _curve(series: Series, chart: Chart, found: Charts) -> Figure:
    style = variant_style(found.variants.index(series.name))
    return {
        "type": "scatter",
        "mode": "lines+markers" if chart.kind == "lines" else "markers",
        "name": _plain(series.name),
        "x": [_short(at) for at in series.at],
        "y": [_short(value) for value in series.value],
        "error_y": _error(series),
        "line": {"color": style.colour, "dash": style.plotly_dash, "width": 2},
        "marker": {"color": style.colour, "symbol": _symbols(style.plotly_symbol, series, chart), "size": 8},
        "text": _notes(series),
        "hovertemplate": f"%{{fullData.name}}<br>%{{text}}<br>%{{y:,.4g}} {_unit(chart.y_label)}<extra></extra>",
    }


def _symbols(symbol: str, series: Series, chart: Chart) -> str | list[str]:
    """Hollow where a value lacks its interval."""
    if not chart.has_intervals or None not in series.low:
        return symbol
    return [f"{symbol}-open" if low is None else symbol for low in series.low]


def _no_interval() -> Figure:
    """An entry of the legend, which is then shown for a single variant too."""
    marker = {"color": "#7a828e", "symbol": "circle-open", "size": 8}
    nowhere = {"x": [None], "y": [None], "showlegend": True}
    return {"type": "scatter", "mode": "markers", "name": NO_INTERVAL, "marker": marker, **nowhere}


def _dots(panel: Panel, chart: Chart, found: Charts) -> list[Figure]:
    """A row for each name; side by side in it where several have a value there."""
    rows = {name: row for row, name in enumerate(panel.bars)}
    dots = []
    for series, offset in zip(panel.series, panel.offsets(), strict=True):
        curve = _curve(series._replace(at=series.value), chart, found)
        names = [f"{_plain(name)}<br>{note}" for name, note in zip(series.at, curve["text"], strict=True)]
        curve |= {"y": [_short(rows[name] + offset) for name in series.at], "error_x": curve.pop("error_y")}
        hover = f"%{{text}}<br>%{{x:,.4g}} {_unit(chart.x_label)}<extra></extra>"
        if panel.crowd > 1:
            hover = f"%{{fullData.name}}<br>{hover}"
        dots.append(curve | {"text": names, "showlegend": panel.crowd > 1, "hovertemplate": hover})
    return dots


def _bar(series: Series, chart: Chart, found: Charts) -> Figure:
    style = phase_style(found.phases.index(series.name))
    return {
        "type": "bar",
        "orientation": "h",
        "name": _plain(series.name),
        "x": [_short(value) for value in series.value],
        "y": [_bar_name(name) for name in series.at],
        "marker": {"color": style.colour, "pattern": {"shape": style.plotly_pattern, "solidity": 0.35}},
        "hovertemplate": f"%{{fullData.name}}<br>%{{x:,.4g}} {_unit(chart.x_label)}<extra>%{{y}}</extra>",
    }


def _notes(series: Series) -> list[str]:
    return [
        size if low is None or high is None else f"{size} {interval(low, high, four)}"
        for size, low, high in zip(series.size, series.low, series.high, strict=True)
    ]


def _bar_name(name: str) -> str:
    return "<br>".join(_plain(line) for line in wrap(name, _WRAP))


def _plain(text: str) -> str:
    """Plotly reads a little HTML in names, but knows no quotes in it."""
    return escape(text, quote=False)


def _unit(label: str) -> str:
    return "ms" if "(ms)" in label or label.startswith("ms ") else label


def _short(value: float) -> float:
    """Five digits: more than a picture can show, and a third of the size of all."""
    return float(f"{value:.5g}")
