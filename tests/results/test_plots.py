"""results/charts.py, plots.py and style.py: what is drawn, what is left out and said, what can be told apart."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from moe_lab.results import charts, plots, style
from moe_lab.results.aggregate import Aggregate
from moe_lab.results.figures import figures
from moe_lab.results.panels import FILE_PANELS, Chart, Heat, Pairs, Panel, Series, Texts, front, relative_load
from tests.results import drawn

OF_THE_ROUTING = {"expert_load", "coactivation", "phases", "phase_shares"}


@pytest.fixture(scope="module")
def sweep() -> tuple[Path, Aggregate]:
    """A synthetic sweep over batch and seq_len for two models."""
    return drawn.sweep()[:2]


def kept(sweep: tuple[Path, Aggregate], **wanted: object) -> charts.Charts:
    """The charts of the cells with these values."""
    directory, found = sweep
    runs, summary = found.runs, found.summary
    for key, value in wanted.items():
        runs, summary = runs[runs[key] == value], summary[summary[key] == value]
    return charts.charts(directory, runs, summary)


def chart(found: charts.Charts, name: str) -> Chart:
    """The chart of this name."""
    return next(one for one in found.drawn if one.name == name)


def test_every_plot_is_a_png_and_an_svg() -> None:
    """Those that exist can be opened; what does not fit into them is said."""
    directory, found, made = drawn.sweep()
    names = {path.stem for path in made.paths}
    over = {"latency_over_batch", "latency_over_seq_len", "throughput_over_seq_len"}  # which has more values
    assert names == {*over, "load_against_latency", "latency_against_error", "bytes_against_error", *OF_THE_ROUTING}
    assert all(map(charts.is_name, names))
    assert {path.name for path in made.paths} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert {path.name for path in (directory / "plots").iterdir()} - {path.name for path in made.paths} == {"mine.png"}
    for path in made.paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 200
        else:
            assert "<svg" in path.read_text() and "<script" not in path.read_text()
    for one in charts.charts(directory, found.runs, found.summary).drawn:
        said = any(f"plots/{one.name} " in text and str(len(one.panels)) in text for text in made.left_out)
        assert said == (len(one.panels) > FILE_PANELS)


def test_every_timed_cell_is_in_the_charts(sweep: tuple[Path, Aggregate]) -> None:
    """With its median, and its interval around it."""
    found = kept(sweep)
    timed = sweep[1].summary["latency_ms.p50"].dropna()
    points = [s for panel in chart(found, "load_against_latency").panels for s in panel.series]
    assert sorted(value for series in points for value in series.value) == sorted(timed)
    for series in points:
        for low, value, high in zip(series.low, series.value, series.high, strict=True):
            assert low is not None and high is not None and low <= value <= high


@pytest.mark.parametrize(
    ("wanted", "missing", "present"),
    [
        pytest.param({"batch": 1}, "Latency over batch", "latency_over_seq_len", id="one_batch"),
        pytest.param({"seq_len": 8}, "Latency over seq_len", "latency_over_batch", id="one_seq_len"),
        pytest.param({"batch": 1, "seq_len": 8}, "Throughput", "latency", id="one_size"),
    ],
)
def test_what_the_data_do_not_allow_is_left_out_and_said(
    sweep: tuple[Path, Aggregate], wanted: dict[str, object], missing: str, present: str
) -> None:
    """One batch value: no plot over batch."""
    found = kept(sweep, **wanted)
    assert any(text.startswith(missing) for text in found.left_out)
    assert not any(one.title == missing for one in found.drawn)
    assert chart(found, present).panels


def test_nothing_at_all_draws_nothing(sweep: tuple[Path, Aggregate], tmp_path: Path) -> None:
    """Every kind of plot is said to be missing."""
    _, found = sweep
    drawn = plots.draw(tmp_path, found.runs.iloc[:0], found.summary.iloc[:0])
    assert drawn.paths == [] and len(drawn.left_out) == 7


def test_joined_phases_keep_their_names_and_add_up(sweep: tuple[Path, Aggregate]) -> None:
    """The loop's kernel spans three phases."""
    found = kept(sweep)
    assert "dispatch+experts+combine" in found.phases
    totals = {}
    for name in ("phases", "phase_shares"):
        panels = chart(found, name).panels
        assert all(isinstance(panel, Panel) for panel in panels)
        assert all(len(panel.bars) == len(set(panel.series[0].at)) for panel in panels)
        totals[name] = sum(v for panel in panels for series in panel.series for v in series.value)
    runs = sweep[1].runs
    agrees = (runs["phases_ms.sum_ms"] / runs["latency_ms.p50"] - 1).abs() <= 0.2
    assert 0 < agrees.sum() < runs["phases_ms.sum_ms"].notna().sum()
    assert totals["phases"] == pytest.approx(runs["phases_ms.sum_ms"][agrees].sum())
    assert totals["phase_shares"] == pytest.approx((runs["phases_ms.sum_ms"].notna() & ~agrees).sum())


@pytest.mark.parametrize("has_shares", [pytest.param(True, id="shares"), pytest.param(False, id="older_record")])
def test_phases_that_are_not_the_latency_are_shares(sweep: tuple[Path, Aggregate], has_shares: bool) -> None:
    """1034 ms of a latency of 126: no bar of milliseconds, whichever version wrote the record."""
    directory, found = sweep
    runs = found.runs[found.runs["phases_ms.sum_ms"].notna()].iloc[:2].copy()
    runs.loc[:, "phases_ms.sum_ms"], runs.loc[:, "phases_ms.router"] = 1034.0, 517.0
    runs.loc[:, "latency_ms.p50"] = [126.0, 1000.0]
    if has_shares:
        runs = runs.assign(**{"phases_share.router": 0.5})
        runs.iloc[0, runs.columns.get_loc("phases_ms.router")] = np.nan
    drawn = charts.charts(directory, runs, found.summary)
    routers = {
        name: [v for panel in chart(drawn, name).panels for s in panel.series if s.name == "router" for v in s.value]
        for name in ("phases", "phase_shares")
    }
    assert routers == {"phases": [517.0], "phase_shares": [0.5]}
    shares = chart(drawn, "phase_shares")
    assert "as shares" in shares.title and shares.x_label == "share of an eager pass"


@pytest.mark.slow
def test_cells_with_the_same_load_share_a_map(sweep: tuple[Path, Aggregate], tmp_path: Path) -> None:
    """And a file that cannot be read is named, not dropped."""
    directory, found = sweep
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    before = len(chart(charts.charts(copy, found.runs, found.summary), "expert_load").panels)
    same = found.runs[(found.runs["batch"] == 1) & (found.runs["seq_len"] == 8) & (found.runs["model"] == "moe_layer")]
    files = [copy / folder / "routing.npz" for folder in same["directory"]]
    first, second = [path for path in files if path.exists()][:2]
    shutil.copy(first, second)
    after = charts.charts(copy, found.runs, found.summary)
    assert len(chart(after, "expert_load").panels) == before - 1
    second.write_bytes(b"PK\x03\x04 cut off")
    after = charts.charts(copy, found.runs, found.summary)
    assert any(second.parent.name in text for text in after.left_out)


def panel_of(*points: tuple[float, float]) -> Panel:
    """A series per point."""
    return Panel("", [Series("v", [x], [y], [None], [None], [""]) for x, y in points])


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        pytest.param([(1, 5)], [(1, 5)], id="one"),
        pytest.param([(1, 5), (2, 4), (3, 4.5), (4, 1)], [(1, 5), (2, 4), (4, 1)], id="one_is_beaten"),
        pytest.param([(1, 1), (2, 2), (0.5, 3)], [(0.5, 3), (1, 1)], id="unsorted"),
        pytest.param([(1, 5), (1, 3), (2, 3)], [(1, 3)], id="ties"),
    ],
)
def test_the_front_is_what_nothing_beats(
    points: list[tuple[float, float]], expected: list[tuple[float, float]]
) -> None:
    """Less of both is better; a tie in one and worse in the other is beaten."""
    assert list(zip(*front(panel_of(*points)), strict=True)) == expected


def test_the_front_is_drawn_by_setting(sweep: tuple[Path, Aggregate]) -> None:
    """Only cells that were compared with another router; where none was, it is said."""
    found = kept(sweep)
    for name in ("latency_against_error", "bytes_against_error"):
        panels = chart(found, name).panels
        assert len({panel.title for panel in panels}) == len(panels) > 1
        assert {series.name for panel in panels for series in panel.series} == {"sinkhorn/grouped", "sinkhorn/loop"}
    without = kept(sweep, router="torch")
    assert sum("measure.reference_router" in text for text in without.left_out) == 2


def test_each_reference_has_a_front_of_its_own(sweep: tuple[Path, Aggregate]) -> None:
    """Errors against different routers are not compared with each other."""
    directory, found = sweep
    summary = found.summary.copy()
    there = summary["agreement.reference"].notna()
    summary.loc[there & (summary["batch"] == 1), "agreement.reference"] = "mixtral"
    panels = chart(charts.charts(directory, found.runs, summary), "latency_against_error").panels
    assert {panel.title.rsplit(" ", 1)[1] for panel in panels} == {"torch", "mixtral"}
    assert all(("batch=1," in panel.title + ",") == panel.title.endswith("mixtral") for panel in panels)


def heat(kind: Any, *shape: int) -> charts.Map:
    """Counts of this shape."""
    texts = [[f"text {place}" for place in range(shape[1])]] if kind is Texts else []
    return kind("t", ["v"], list(range(shape[0])), np.ones(shape, int), *texts)


@pytest.mark.parametrize(
    ("panels", "layers"),
    [
        pytest.param([heat(Pairs, 5, 300, 300)], [4], id="some layers of one"),
        pytest.param([heat(Pairs, 2, 300, 300), heat(Pairs, 3, 300, 300)], [2, 2], id="and of the next"),
        pytest.param([heat(Pairs, 1, 700, 700)], [], id="no layer at all"),
        pytest.param([heat(Heat, 3, 300_000)], [1], id="experts"),
        pytest.param([heat(Texts, 3, 2, 100_000)], [2], id="texts"),
    ],
)
def test_what_is_too_large_for_the_page_is_left_out_and_said(panels: list[Any], layers: list[int]) -> None:
    """Layer by layer; a chart without any is no chart, for the page could not draw it."""
    kind = {Pairs: "pairs", Heat: "heat", Texts: "texts"}[type(panels[0])]
    one = Chart("c", kind, "Co (words)", "x", "y", panels)  # type: ignore[arg-type]
    drawn, left_out = figures(charts.Charts([one], [], ["v"], []))
    assert [[len(panel["layers"]), len(panel["counts"])] for figure in drawn for panel in figure["panels"]] == [
        [n, n] for n in layers
    ]
    assert len(drawn) == bool(layers)
    assert f"Co: {sum(layers)} of {sum(len(panel.layers) for panel in panels)} layers" in left_out[0]


def test_pairs_that_cannot_be_read_are_left_out(sweep: tuple[Path, Aggregate], tmp_path: Path) -> None:
    """An older file has none; the counts of slots are still shown."""
    directory, found = sweep
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    for path in copy.glob("*/routing.npz"):
        with np.load(path) as arrays:
            np.savez(path, layer=arrays["layer"], counts_LE=arrays["counts_LE"])
    older = charts.charts(copy, found.runs, found.summary)
    assert chart(older, "expert_load").panels
    assert any(text.startswith("Co-activation") for text in older.left_out)


def test_styles_are_distinct_without_colour() -> None:
    """Marker and dashes of 35 variants, the whole look of 280, the hatches of eight phases; in both libraries."""
    looks = [style.variant_style(index) for index in range(280)]
    assert len(set(looks)) == 280
    assert len({(look.marker, look.dashes) for look in looks[:35]}) == 35
    assert len({(look.plotly_symbol, look.plotly_dash) for look in looks[:35]}) == 35
    phases = [style.phase_style(index) for index in range(8)]
    assert len({phase.hatch for phase in phases}) == len({phase.plotly_pattern for phase in phases}) == 8


@pytest.mark.parametrize("kind", ["lines", "points", "front", "stack"])
def test_variants_and_phases_differ_in_grey(kind: str) -> None:
    """The same data drawn as one series and as another give different grey pictures, and so different legends."""
    nothing = [None, None]
    pictures = []
    names = [f"v{index}" for index in range(7)]
    for name in names:
        at = ["a", "b"] if kind == "stack" else [1, 2]
        panel = Panel("t", [Series(name, at, [1.0, 2.0], nothing, nothing, ["", ""])])
        figure = plots.render(Chart("c", kind, "t", "x", "y", [panel]), names, names)  # type: ignore[arg-type]
        figure.legends[0].remove()  # it has the name
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=150)
        grey = np.asarray(Image.open(content).convert("L")).astype(int)
        pictures.append(np.where(grey > 200, 255, 0) if kind != "stack" else grey)  # black on white: shape alone
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert (abs(one - other) > 40).sum() > 10


@pytest.mark.parametrize("kind", ["lines", "front", "dots", "stack", "heat", "pairs", "texts"])
def test_any_text_can_be_drawn(kind: str) -> None:
    """Dollars would start a formula, which can fail."""
    name = r"$\frac{$ <b>&amp; \alpha$_"
    series = Series(name, [name] if kind in ("dots", "stack") else [1], [1.0], [0.9], [None], [""])
    panel = Panel(name, [series])
    heat = Heat(name, [name], [0], np.array([[0, 3]]))
    pairs = Pairs(name, [name], [0], np.array([[[1, 1], [1, 3]]]))
    texts = Texts(name, [name], [0], np.array([[[0, 3]]]), [name])
    shown = {"heat": heat, "pairs": pairs, "texts": texts}.get(kind, panel)
    one = Chart("c", kind, name, name, name, [shown])  # type: ignore[arg-type]
    figure = plots.render(one, [name], [name])
    figure.savefig(io.BytesIO(), format="svg")
    assert name in figure.axes[0].get_title(loc="left").replace(r"\$", "$")


def test_load_is_relative_to_its_layer() -> None:
    """A layer without slots is 0, not a division."""
    assert relative_load(np.array([[1, 3], [0, 0], [5, 5]])).tolist() == [[0.5, 1.5], [0, 0], [1, 1]]


@pytest.mark.parametrize("kind", ["lines", "dots", "heat"])
def test_a_look_sets_width_and_font(kind: str) -> None:
    """A column of a paper: panels below each other, all text on the page and no larger than asked for, no title."""
    look = plots.Look("png", width=3.3, font_size=8)
    series = Series("v", ["a row with a long name"] if kind == "dots" else [1], [1.0], [0.9], [1.2], [""])
    heat = Heat("t", ["v"], [0], np.array([[0, 3]]))
    one = Chart("c", kind, "title", "x", "y", [heat if kind == "heat" else Panel("t", [series])] * 4)  # type: ignore[arg-type]
    with rc_context(look.settings()):
        figure = plots.render(one, ["v"], ["v"], look)
        size = figure.get_size_inches()
        FigureCanvasAgg(figure).draw()
        box = figure.get_tightbbox(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    assert size[0] == pytest.approx(3.3) and figure.get_suptitle() == ""
    assert min(box.x0, box.y0) >= 0 and box.x1 <= size[0] and box.y1 <= size[1]
    panels = [axes for axes in figure.axes if axes.get_title(loc="left").startswith("t")]
    assert len({round(axes.get_position().x0, 6) for axes in panels}) == 1 and len(panels) == 4
    assert max(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) <= 8


def test_a_wide_figure_has_its_panels_beside_each_other() -> None:
    """As many as have room; one that is too narrow for its names is a mistake."""
    series = Series("v", [1], [1.0], [0.9], [1.2], [""])
    one = Chart("c", "lines", "title", "x", "y", [Panel("t", [series])] * 3)
    figure = plots.render(one, ["v"], ["v"], plots.Look(width=7.0, font_size=8))
    assert len({axes.get_position().x0 for axes in figure.axes}) == 3
    with pytest.raises(ValueError, match=r"^--size=1: too narrow for the names in c; use a larger --size"):
        plots.render(one, ["v"], ["v"], plots.Look(width=1.0))


@pytest.mark.slow
def test_every_plot_is_published(sweep: tuple[Path, Aggregate], tmp_path: Path) -> None:
    """As a PDF of that width with its fonts in it; those that the report draws."""
    directory, found = sweep
    drawn = plots.publish(directory, tmp_path / "paper", plots.Look(width=3.3, font_size=7))
    expected = {chart.name for chart in charts.charts(directory, found.runs, found.summary).drawn}
    assert {path.name for path in drawn.paths} == {f"{name}.pdf" for name in expected}
    for path in drawn.paths:
        content = path.read_bytes()
        assert b"/MediaBox [ 0 0 237.6 " in content and b"/FontFile2" in content and b"/Type3" not in content
    with pytest.raises(ValueError, match="no readable records"):
        plots.publish(tmp_path / "paper", tmp_path / "more")
    assert not (tmp_path / "more").exists() and not list((tmp_path / "paper").glob("*.csv"))
