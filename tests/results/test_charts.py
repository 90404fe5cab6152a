"""results/charts.py of runs on texts and of decoding: what is drawn, how it looks, and what is left out and said."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import synthetic
from moe_lab.records.store import ROUTING
from moe_lab.results import charts, plots
from moe_lab.results.aggregate import Aggregate, aggregate
from moe_lab.results.figures import figures
from moe_lab.results.panels import Chart, Panel, Series, Texts, front, is_log, relative_load
from tests.results import texts

CONTEXT = "config.workload.context_len"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Aggregate]:
    """Two models, two sizes of each, four variants; every cell that is ok had texts."""
    directory = tmp_path_factory.mktemp("sweep")
    for folder in synthetic.sweep(directory, 32):
        texts.add(folder)
    return directory, aggregate(directory)


def chart(found: charts.Charts, name: str) -> Chart:
    """The chart of this name."""
    return next(one for one in found.drawn if one.name == name)


def drawn(sweep: tuple[Path, Aggregate], name: str) -> Chart:
    """The chart of this name, of everything in the sweep."""
    return chart(charts.charts(sweep[0], sweep[1].runs, sweep[1].summary), name)


@pytest.mark.slow
def test_latency_against_bits_has_every_cell_and_a_front(sweep: tuple[Path, Aggregate]) -> None:
    """A panel per setting; what is slower and predicts worse is beaten."""
    summary = sweep[1].summary
    panels = drawn(sweep, "latency_against_bits").panels
    assert len({panel.title for panel in panels}) == len(panels) == summary["setting_id"].nunique()
    points = sorted(
        (at, value)
        for panel in panels
        if isinstance(panel, Panel)
        for series in panel.series
        for at, value in zip(series.at, series.value, strict=True)
    )
    known = summary[["quality.bits_per_byte", "latency_ms.p50"]].dropna()
    assert points == sorted(map(tuple, known.to_numpy().tolist()))
    for panel in panels:
        assert isinstance(panel, Panel)
        if {series.name for series in panel.series} >= {"torch/grouped", "sinkhorn/grouped"}:
            assert 1.75 not in front(panel)[0]


@pytest.mark.slow
def test_what_changed_weights_take_is_drawn_beside_the_unchanged_models(sweep: tuple[Path, Aggregate]) -> None:
    """In their formats; a model without a change takes what it holds. Without changed weights there is no chart."""
    directory, found = sweep
    plain = charts.charts(directory, found.runs, found.summary)
    assert "stored_against_bits" not in {one.name for one in plain.drawn}
    is_changed = found.runs["router"] == "sinkhorn"
    runs = found.runs.assign(
        **{"memory.parameters_mb": 8.0, charts.STORED_MB: is_changed.map({True: 2.5, False: None})}
    )
    runs[charts.STORED_MB] = runs[charts.STORED_MB].astype(float)
    panels = chart(charts.charts(directory, runs, found.summary), "stored_against_bits").panels
    series = [series for panel in panels if isinstance(panel, Panel) for series in panel.series]
    assert {value for of in series if "sinkhorn" in of.name for value in of.value} == {2.5}
    assert {value for of in series if "sinkhorn" not in of.name for value in of.value} == {8.0}


def test_bits_by_text_has_a_row_for_each_text_and_a_value_with_its_interval(sweep: tuple[Path, Aggregate]) -> None:
    """Of each variant; the rows' names are the texts', with their dots."""
    panels = drawn(sweep, "bits_by_text").panels
    assert len(panels) == sweep[1].summary["setting_id"].nunique()
    for panel in panels:
        assert isinstance(panel, Panel)
        assert panel.bars == list(texts.TEXTS)
        for series in panel.series:
            assert series.value == pytest.approx([series.value[0], series.value[0] + 1])
            for low, value, high in zip(series.low, series.value, series.high, strict=True):
                assert (low, high) == (pytest.approx(value - 0.05), pytest.approx(value + 0.05))


def test_a_text_without_a_window_has_no_value(sweep: tuple[Path, Aggregate]) -> None:
    """And no row where no variant has one; a setting without any text has no panel."""
    runs = sweep[1].runs.copy()
    short = runs["seq_len"] == 16
    runs.loc[short, "quality.domains.code.bits_per_byte"] = np.nan
    runs.loc[short & (runs["batch"] == 1), "quality.domains.prose.v2.bits_per_byte"] = np.nan
    panels = chart(charts.charts(sweep[0], runs, sweep[1].summary), "bits_by_text").panels
    bars = {panel.title: panel.bars for panel in panels if isinstance(panel, Panel)}
    assert {title: "seq_len=16" in title for title in bars} == {
        title: names == ["prose.v2"] for title, names in bars.items()
    }
    assert not any("batch=1, seq_len=16" in title for title in bars)
    assert any("batch=2, seq_len=16" in title for title in bars)


def test_experts_by_text_are_shared_by_what_routes_alike(sweep: tuple[Path, Aggregate]) -> None:
    """Who computes the experts does not change which they are; each text's load is relative to its own slots."""
    panels = [panel for panel in drawn(sweep, "experts_by_text").panels if isinstance(panel, Texts)]
    assert {len({name.split("/")[0] for name in panel.variants}) for panel in panels} == {1}
    assert {tuple(panel.variants) for panel in panels} >= {("torch/grouped", "torch/loop")}
    for panel in panels:
        assert panel.texts == list(texts.TEXTS)
        assert panel.counts_LGE.shape == (len(panel.layers), 2, synthetic.N_EXPERTS)
        assert relative_load(panel.counts_LGE).mean(axis=-1) == pytest.approx(1)


@pytest.mark.slow
def test_texts_of_other_names_are_another_map(sweep: tuple[Path, Aggregate], tmp_path: Path) -> None:
    """Even where the counts are equal."""
    copy = tmp_path / "copy"
    shutil.copytree(sweep[0], copy)
    before = len(drawn(sweep, "experts_by_text").panels)
    folder = min(copy.glob("moe_layer-torch-loop-*/routing.npz")).parent  # a failed cell has none
    with np.load(folder / ROUTING) as arrays:
        changed = {**arrays, "domain": np.array(["code", "verse"])}
    np.savez(folder / ROUTING, **changed)
    assert len(chart(charts.charts(copy, sweep[1].runs, sweep[1].summary), "experts_by_text").panels) == before + 1


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"domain": np.array(["code"])}, id="a_name_too_few"),
        pytest.param({"domain_counts_LGE": np.ones((9, 2, 8), int)}, id="other_layers"),
        pytest.param({"domain_counts_LGE": np.ones((1, 2, 8))}, id="no_counts"),
    ],
)
def test_texts_that_cannot_be_read_are_named(
    sweep: tuple[Path, Aggregate], tmp_path: Path, broken: dict[str, np.ndarray]
) -> None:
    """The cell's other charts stand."""
    copy = tmp_path / "copy"
    shutil.copytree(sweep[0], copy)
    folder = min(copy.glob("moe_layer-torch-loop-*/routing.npz")).parent  # a failed cell has none
    with np.load(folder / ROUTING) as arrays:
        changed = {**arrays, **broken}
    np.savez(folder / ROUTING, **changed)
    found = charts.charts(copy, sweep[1].runs, sweep[1].summary)
    said = [text for text in found.left_out if folder.name in text]
    assert len(said) == 1 and said[0].startswith("Experts by text")


def test_without_texts_one_sentence_says_so(tmp_path: Path) -> None:
    """For all three charts; with texts but without experts, that is said."""
    synthetic.sweep(tmp_path, 8)
    found = aggregate(tmp_path)
    none = charts.charts(tmp_path, found.runs, found.summary)
    assert sum("workload=text" in text for text in none.left_out) == 1
    assert not {"latency_against_bits", "bits_by_text", "experts_by_text"} & {one.name for one in none.drawn}
    runs = found.runs.assign(**{charts.BITS: 1.5})
    dense = charts.charts(tmp_path, runs, found.summary)
    for name in ("Latency against bits per byte", "Bits per byte by text", "Experts by text"):
        assert sum(text.startswith(name) for text in dense.left_out) == 1


def decoding(frame: pd.DataFrame) -> pd.DataFrame:
    """The same cells as decode steps, whose context is 16 times as long as their seq_len says."""
    frame = frame[frame["seq_len"].notna()]
    long = frame["seq_len"] * 16
    return frame.assign(**{CONTEXT: long, "config.workload.phase": "decode", "seq_len": 64})


@pytest.mark.slow
def test_decoding_is_drawn_over_the_context(sweep: tuple[Path, Aggregate]) -> None:
    """Where it varies, all else equal; where there is none, nothing is said of it."""
    directory, found = sweep
    runs, summary = decoding(found.runs), decoding(found.summary)
    over = charts.charts(directory, runs, summary)
    panels = chart(over, "latency_over_context_len").panels
    assert len(panels) == 4  # two models, two batches
    for panel in panels:
        assert isinstance(panel, Panel)
        assert all(series.at == [128, 256] for series in panel.series if len(series.at) == 2)
        assert "context_len" not in panel.title and "batch=" in panel.title
    batch = chart(over, "latency_over_batch").panels
    assert {panel.title.split("context_len=")[1] for panel in batch} == {"128", "256"}
    one = charts.charts(directory, runs[runs[CONTEXT] == 128], summary[summary[CONTEXT] == 128])
    assert any(text.startswith("Latency over context_len:") for text in one.left_out)
    whole = charts.charts(directory, found.runs, found.summary)
    assert not any("context_len" in text for text in whole.left_out)
    only = charts.charts(directory, runs[runs["batch"] == 1], summary[summary["batch"] == 1])
    assert chart(only, "throughput_over_context_len").panels


TEMPERATURE = "config.router.temperature"


def with_temperatures(frame: pd.DataFrame) -> pd.DataFrame:
    """Each cell of sinkhorn three times, with a temperature in its variant's name; torch has none."""
    others, those = frame[frame["router"] != "sinkhorn"], frame[frame["router"] == "sinkhorn"]
    parts = [others.assign(**{TEMPERATURE: np.nan})]
    for at in (0.25, 1.0, 4.0):
        names = those["variant"].str.replace("sinkhorn", f"sinkhorn(iters=5, temperature={at})")
        parts.append(those.assign(**{TEMPERATURE: at, "variant": names}))
    return pd.concat(parts, ignore_index=True)


def test_a_swept_key_is_an_axis_and_what_lacks_it_a_level_line(sweep: tuple[Path, Aggregate]) -> None:
    """One line for each variant without the key, not a row for each value; with quality and throughput over it."""
    directory, found = sweep
    runs, summary = (with_temperatures(frame[frame["model"] == "decoder_moe"]) for frame in (found.runs, found.summary))
    over = charts.charts(directory, runs, summary)
    assert {"throughput_over_temperature", "bits_over_temperature"} <= {one.name for one in over.drawn}
    for name in ("latency_over_temperature", "throughput_over_temperature", "bits_over_temperature"):
        for panel in chart(over, name).panels:
            assert isinstance(panel, Panel)
            lines = {series.name: series for series in panel.series}
            assert "sinkhorn(iters=5)/grouped" in lines and not any("temperature" in line for line in lines)
            for line, series in lines.items():
                level = line.startswith("torch")
                assert series.at == ([0.25, 4.0] if level else [0.25, 1.0, 4.0])
                assert not level or series.value[0] == series.value[1]
    bits = chart(over, "bits_over_temperature").panels[0]
    assert isinstance(bits, Panel) and bits.series[0].low[0] == pytest.approx(bits.series[0].value[0] - 0.05)
    drawn, _ = figures(over)
    assert next(one for one in drawn if one["name"] == "latency_over_temperature")["panels"]
    assert plots.render(chart(over, "latency_over_temperature"), over.variants, over.phases).axes


@pytest.mark.parametrize(
    ("variant", "key", "rest"),
    [
        pytest.param("sinkhorn(temperature=0.25)", "temperature", "sinkhorn", id="alone"),
        pytest.param("a(iters=5, temperature=0.25)/loop", "temperature", "a(iters=5)/loop", id="last"),
        pytest.param("a(temperature=0.25, iters=5)", "temperature", "a(iters=5)", id="first"),
        pytest.param("a(my_temperature=1)", "temperature", "a(my_temperature=1)", id="another"),
        pytest.param("native", "temperature", "native", id="none"),
    ],
)
def test_a_variant_without_a_key(variant: str, key: str, rest: str) -> None:
    """Brackets go with the last of them."""
    assert charts._without(variant, key) == rest


def test_a_key_between_settings_is_an_axis_too_and_no_odd_name_is_one(sweep: tuple[Path, Aggregate]) -> None:
    """Of the model or the workload; a record's key goes into the name of a file."""
    directory, found = sweep
    frames = []
    for frame in (found.runs, found.summary):
        exponents = frame["seq_len"].astype(float) / 8
        changed = {"config.workload.zipf_exponent": exponents, "config.../x": 1.0, "seq_len": 64}
        frames.append(frame.assign(**changed))
    over = charts.charts(directory, *frames)
    assert [one.name for one in over.drawn if "zipf" in one.name] == ["latency_over_zipf_exponent"]
    assert not any("/" in one.name or not charts.is_name(one.name) for one in over.drawn)
    assert all("zipf" not in panel.title for panel in chart(over, "latency_over_zipf_exponent").panels)


@pytest.mark.parametrize("kind", ["lines", "points", "front", "dots"])
def test_a_value_without_an_interval_is_hollow_and_the_legend_says_so(kind: str) -> None:
    """In the page and in the files; where no value has one, such as of throughput, nothing is marked."""
    at = ["a", "b"] if kind == "dots" else [1, 2]
    panel = Panel("t", [Series("v", at, [1.0, 2.0], [None, 1.9], [None, 2.1], ["", ""])])
    for marked in (True, False):
        one = Chart("c", kind, "t", "x", "y", [panel], marked)  # type: ignore[arg-type]
        (figure,), _ = figures(charts.Charts([one], [], ["v"], []))
        traces = figure["panels"][0]["data"]
        symbols = traces[0]["marker"]["symbol"]
        assert symbols == (["circle-open", "circle"] if marked else "circle")
        assert ("hollow: no interval" in [trace["name"] for trace in traces]) == marked
        assert any(trace.get("showlegend") for trace in traces) == marked  # also where no variant needs a legend
        drawn = plots.render(one, ["v"], [])
        hollow = [line for line in drawn.axes[0].lines if line.get_markerfacecolor() == "white"]
        assert [len(line.get_xdata()) for line in hollow] == [1] * marked
        said = [text.get_text() for legend in drawn.legends for text in legend.get_texts()]
        assert ("hollow: no interval" in said) == marked


def crowded(n_series: int, n_rows: int) -> Panel:
    """As many series, each with the value 1 in every row."""
    names, nothing = [f"text {row}" for row in range(n_rows)], [None] * n_rows
    return Panel(
        "t", [Series(f"v{i}", names, [1.0] * n_rows, nothing, nothing, [""] * n_rows) for i in range(n_series)]
    )


@pytest.mark.parametrize("n_series", [pytest.param(n, id=f"{n} series") for n in (1, 2, 5, 31)])
def test_equal_values_of_one_row_lie_apart(n_series: int) -> None:
    """Within their row, in both libraries; a crowded row is higher, and a legend says who is who."""
    panel = crowded(n_series, 3)
    offsets = panel.offsets()
    assert len(set(offsets)) == n_series and max(map(abs, offsets)) < 0.5
    assert sum(offsets) == pytest.approx(0)
    assert panel.rows == pytest.approx(3 * max(1, 0.32 * n_series))
    names = [f"v{i}" for i in range(n_series)]
    one = Chart("c", "dots", "t", "bits per byte", "", [panel])
    places = {line.get_ydata()[0] for line in plots.render(one, names, []).axes[0].lines if len(line.get_ydata()) == 3}
    assert len(places) == n_series
    (figure,), _ = figures(charts.Charts([one], [], names, []))
    traces = figure["panels"][0]["data"]
    assert len({y for trace in traces for y in trace["y"]}) == 3 * n_series
    assert [trace["showlegend"] for trace in traces] == [n_series > 1] * n_series
    assert "bits per byte" in traces[0]["hovertemplate"]


def test_the_file_has_the_layer_in_which_the_texts_differ_most() -> None:
    """With a row for each text, and it is said that the others are not there."""
    counts_LGE = np.full((3, 2, 4), 10)
    counts_LGE[1, 0] = [40, 0, 0, 0]
    panel = Texts("t", ["v"], [2, 5, 9], counts_LGE, ["code", "prose"])
    figure = plots.render(Chart("c", "texts", "t", "expert", "", [panel]), ["v"], [])
    axes, scale = figure.axes
    assert axes.get_ylabel() == "layer 5"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["code", "prose"]
    assert np.asarray(axes.images[0].get_array()).tolist() == [[4, 0, 0, 0], [1, 1, 1, 1]]
    assert scale.get_ylim()[1] == 4
    figure.savefig(io.BytesIO(), format="png")


@pytest.mark.slow
def test_what_the_files_lack_is_said(sweep: tuple[Path, Aggregate]) -> None:
    """Layers, in the sentence that names the file."""
    found = plots.draw(*sweep[:1], sweep[1].runs, sweep[1].summary)
    assert any("plots/experts_by_text shows the layer" in text for text in found.left_out)
    assert {path.stem for path in found.paths} >= {"latency_against_bits", "bits_by_text", "experts_by_text"}


@pytest.mark.parametrize(
    ("values", "log"),
    [
        pytest.param([1.0, 8.0], True, id="a_factor_of_eight"),
        pytest.param([1.0, 7.99], False, id="less"),
        pytest.param([0.0, 8.0], False, id="zero"),
        pytest.param([-1.0, 8.0], False, id="negative"),
    ],
)
def test_an_axis_is_logarithmic_where_values_span_a_lot(values: list[float], log: bool) -> None:
    """And can be."""
    assert is_log(values) is log


@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in ("phases", "latency_against_bits")])
def test_a_chart_of_one_size_names_it_where_the_sweep_has_several(sweep: tuple[Path, Aggregate], name: str) -> None:
    """Else nobody can tell whose it is, beside the others of the size that is chosen."""
    directory, (runs, summary, _) = sweep
    columns = [str(key) for key in runs if str(key).startswith(("phases_", "quality."))]

    def only(frame: pd.DataFrame) -> pd.DataFrame:
        there = [key for key in columns if key in frame]
        return frame.assign(**{key: frame[key].where(frame["batch"] == 2) for key in there})

    found = chart(charts.charts(directory, only(runs), only(summary)), name)
    assert found.panels and all(panel.place["batch"] == "batch=2" in panel.title for panel in found.panels)


def test_load_is_compared_within_a_size(sweep: tuple[Path, Aggregate]) -> None:
    """Latencies of several batches in one picture say nothing of load."""
    for panel in drawn(sweep, "load_against_latency").panels:
        assert isinstance(panel, Panel)
        assert len({size for series in panel.series for size in series.size}) == 1


def test_bits_per_byte_do_not_start_at_zero(sweep: tuple[Path, Aggregate]) -> None:
    """No model is near it, so all points would lie on each other."""
    found, _ = figures(charts.charts(sweep[0], sweep[1].runs, sweep[1].summary))
    (front_,) = (figure for figure in found if figure["name"] == "latency_against_bits")
    axes = [panel["layout"]["xaxis"] for panel in front_["panels"]]
    assert {axis["rangemode"] for axis in axes} == {"normal"}
