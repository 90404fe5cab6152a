"""cli/plot.py: any two columns of a folder of results, in three formats."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from moe_lab.cli.plot import main
from moe_lab.records.schema import Record
from moe_lab.results import xy
from moe_lab.results.load import load
from moe_lab.results.look import Look
from moe_lab.results.xy import draw, save
from tests.cli.test_main import moe_lab
from tests.results.compared import record, tiny_config, write


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cells with a latency, and one without."""
    cells = [record(float(batch), config={"batch": batch}) for batch in (1, 2, 16)]
    return write(tmp_path_factory.mktemp("plot") / "sweep", *cells, record(config={"batch": 4}, status="failed"))


def at(temperature: float | None, p50: float, batch: int = 1, more: float = 0.2) -> Record:
    """Sinkhorn at a temperature; without one a router that has none."""
    router = copy.deepcopy(tiny_config()["router"])
    if temperature is None:
        router = {key: value for key, value in router.items() if key != "temperature"} | {"name": "torch"}
    else:
        router["temperature"] = temperature
    made = record(p50, config={"router": router, "batch": batch})
    ends = {"delta_bits_per_byte_ci95_low": more - 0.1, "delta_bits_per_byte_ci95_high": more + 0.1}
    made.quality = {"bits_per_byte": 1.5, "delta_bits_per_byte": more, **ends}
    return made


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three temperatures at two batches, two of them with an interval, beside another router."""
    cells = []
    for batch in (1, 8):
        for temperature, p50 in ((0.25, 2.0), (0.5, 3.0), (1.0, 5.0), (None, 1.0)):
            made = at(temperature, p50 * batch, batch)
            if temperature in (0.25, 0.5):
                assert made.latency_ms is not None
                made.latency_ms.ci95_low, made.latency_ms.ci95_high = 0.9 * p50 * batch, 1.2 * p50 * batch
            cells.append(made)
    return write(tmp_path_factory.mktemp("plot") / "swept", *cells)


@pytest.fixture
def runs(sweep: Path) -> pd.DataFrame:
    return load(sweep)


def labels(figure: Figure) -> list[str]:
    """Of the lines in the legend."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_picture_is_written_where_it_says(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the folder's plots, or where `-o` says, with how many runs are missing in it."""
    monkeypatch.chdir(tmp_path)
    assert main([str(sweep), "batch", "latency_ms.p50"]) == 0
    picture = sweep / "plots" / "latency_ms.p50_over_batch.png"
    assert capsys.readouterr().out == f"{picture} (1 runs without one of these columns are left out)\n"
    assert Image.open(picture).format == "PNG"
    assert main([str(sweep), "batch", "batch", "--by", "model", "--log", "-o", "here/a.png"]) == 0
    assert capsys.readouterr().out == "here/a.png\n"
    assert Image.open(tmp_path / "here" / "a.png").format == "PNG"


@pytest.mark.slow
def test_a_mistake_in_a_column_is_one_line(sweep: Path, tmp_path: Path) -> None:
    """With the nearest name and exit code 2; nothing is drawn."""
    done = moe_lab("plot", str(sweep), "btch", "latency_ms.p50", "-o", "a.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("moe-lab: btch: unknown column") and done.stderr.endswith("Did you mean batch?\n")
    assert list(tmp_path.iterdir()) == []


def test_what_is_drawn(runs: pd.DataFrame) -> None:
    """One line through the runs that have both columns, in the order of x; logarithms with the values as ticks."""
    figure, missing = draw(runs, "batch", "latency_ms.p50", "variant", log=True)
    (axes,) = figure.axes
    (line,) = axes.lines
    assert missing == 1
    assert list(line.get_xdata()) == [1, 2, 16] and list(line.get_ydata()) == [1.0, 2.0, 16.0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "16"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("batch (sequences)", "latency_ms.p50 (ms)")


def test_several_runs_at_one_place_make_no_line(runs: pd.DataFrame) -> None:
    """Only points; a text is an axis without logarithm."""
    figure, _ = draw(runs, "model", "latency_ms.p50", "variant", log=True)
    (axes,) = figure.axes
    assert [line.get_linestyle() for line in axes.lines] == ["None"] and axes.get_xscale() == "linear"


@pytest.mark.parametrize(
    "x", [pytest.param("router.temperature", id="as_typed"), pytest.param("config.router.temperature", id="column")]
)
def test_a_key_of_the_variants_makes_a_line_for_each_router(swept: Path, x: str) -> None:
    """Not one point for each variant; what else differs makes lines too, and routers without the key are left out."""
    figure, missing = draw(load(swept), x, "latency_ms.p50")
    assert labels(figure) == ["sinkhorn, batch=1", "sinkhorn, batch=8"] and missing == 2
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in lines] == [[0.25, 0.5, 1.0]] * 2
    assert [list(line.get_ydata()) for line in lines] == [[2, 3, 5], [16, 24, 40]]
    assert figure.axes[0].get_xlabel() == x


def test_a_line_without_any_interval_is_hollow(runs: pd.DataFrame) -> None:
    """Else it looks as sure as one whose intervals are too short to see."""
    figure, _ = draw(runs, "batch", "latency_ms.p50", "variant")
    assert [line.get_markerfacecolor() for line in figure.axes[0].lines] == ["white"]
    assert figure.legends[0].get_title().get_text().endswith("hollow: no interval")


def test_what_is_measured_is_no_place_to_join_sizes_at(swept: Path) -> None:
    """Over bits per byte, a variant's batches are not points of one line."""
    found = load(swept)
    found["throughput.tokens_per_s"] = [100.0 + n for n in range(len(found))]
    figure, _ = draw(found, "throughput.tokens_per_s", "latency_ms.p50")
    assert {"torch, batch=1", "torch, batch=8"} <= set(labels(figure)) and len(labels(figure)) == 8


def test_intervals_are_drawn_and_what_has_none_is_hollow(swept: Path) -> None:
    """Of two points of three."""
    figure, _ = draw(load(swept), "router.temperature", "latency_ms.p50")
    (axes,) = figure.axes
    first, second = (bars.lines[2][0].get_segments() for bars in axes.containers)
    np.testing.assert_allclose([[end[1] for end in bar] for bar in first], [[1.8, 2.4], [2.7, 3.6]])
    assert len(second) == 2
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in hollow] == [([1.0], [5.0]), ([1.0], [40.0])]
    assert figure.legends[0].get_title().get_text() == "router, batch\nhollow: no interval"


@pytest.mark.parametrize(
    ("y", "ends"),
    [
        pytest.param("latency_ms.p50", ("latency_ms.ci95_low", "latency_ms.ci95_high"), id="latency"),
        pytest.param(
            "quality.delta_bits_per_byte",
            ("quality.delta_bits_per_byte_ci95_low", "quality.delta_bits_per_byte_ci95_high"),
            id="quality",
        ),
        pytest.param("batch", None, id="none"),
    ],
)
def test_where_the_interval_of_a_column_stands(swept: Path, y: str, ends: tuple[str, str] | None) -> None:
    """And that of a ratio is named like that of a latency."""
    found = load(swept)
    assert xy._interval(y, found) == ends
    found["ratio_to_anchor.ci95_low"] = found["ratio_to_anchor.ci95_high"] = 1.0
    assert xy._interval("ratio_to_anchor.p50", found) == ("ratio_to_anchor.ci95_low", "ratio_to_anchor.ci95_high")


@pytest.mark.parametrize(
    ("low", "high"), [pytest.param(low, high, id=f"{low}-{high}") for low, high in ((1.1, 1.9), (3, 40), (1e-3, 1e5))]
)
def test_logarithms_have_numbers_at_their_ticks(low: float, high: float, tmp_path: Path) -> None:
    """Also where no power of ten is near."""
    folder = write(tmp_path, *(record(p50, config={"batch": batch}) for batch, p50 in ((1, low), (2, high))))
    figure, _ = draw(load(folder), "batch", "latency_ms.p50", log=True)
    save(figure, Look())
    axes = figure.axes[0]
    bottom, top = axes.get_ylim()
    shown = [float(text.get_text()) for text in axes.get_yticklabels() if bottom <= float(text.get_text()) <= top]
    assert len(shown) >= 3


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        pytest.param("batch", "variant", "variant: not a column of numbers", id="text"),
        pytest.param("batch", "latency_ms.p5", "latency_ms.p5: unknown column", id="typo"),
        pytest.param("router.temperatur", "batch", "router.temperatur: unknown column", id="typo-in-a-key"),
    ],
)
def test_columns_that_cannot_be_drawn(swept: Path, x: str, y: str, message: str) -> None:
    """The message begins with the column, and ends with the nearest one."""
    with pytest.raises(ValueError) as caught:
        draw(load(swept), x, y, "variant", log=False)
    assert str(caught.value).startswith(message)
    near = {"latency_ms.p5": "latency_ms.p50", "router.temperatur": "router.temperature"}
    assert all(f"Did you mean {near[name]}?" in str(caught.value) for name in (x, y) if name in near)


def test_no_run_has_all_columns(runs: pd.DataFrame) -> None:
    """Each exists, but not in one run."""
    with pytest.raises(ValueError, match=r"no run has batch, latency_ms\.p50 and status"):
        draw(runs[runs["status"] == "failed"], "batch", "latency_ms.p50", "status", log=False)


def test_what_has_no_logarithm_is_refused(tmp_path: Path) -> None:
    """A difference may be negative; matplotlib would leave it out in silence."""
    folder = write(tmp_path, at(0.5, 1.0, more=-0.2), at(1.0, 1.0))
    with pytest.raises(ValueError, match=r"^--log: quality\.delta_bits_per_byte has values that are not above 0"):
        draw(load(folder), "router.temperature", "quality.delta_bits_per_byte", log=True)


def written(sweep: Path, path: Path, *options: str) -> bytes:
    assert main([str(sweep), "batch", "latency_ms.p50", "-o", str(path), *options]) == 0
    return path.read_bytes()


def test_an_svg_has_real_text(sweep: Path, tmp_path: Path) -> None:
    """In the font asked for; a dollar is a dollar."""
    content = written(sweep, tmp_path / "a.svg", "--font", "dejavu serif", "--font-size", "8")
    root = ElementTree.fromstring(content)
    texts = [element for element in root.iter() if element.tag.endswith("}text")]
    assert {"latency_ms.p50 (ms)", "batch (sequences)", "sinkhorn"} <= {element.text for element in texts}
    assert all("font-family: 'DejaVu Serif'" in str(element.get("style")) for element in texts)
    assert (root.get("width"), root.get("height")) == ("504pt", "324pt")


@pytest.mark.parametrize("kind", ["pdf", "svg", "png"])
def test_the_same_figure_is_the_same_file(kind: str, runs: pd.DataFrame) -> None:
    """Drawn anew, too: no date and no random ids, so a paper's repository sees no change where there is none."""
    first, again = (Look(kind).content(draw(runs, "batch", "latency_ms.p50")[0]) for _ in range(2))
    assert first == again


def test_a_pdf_holds_its_fonts(sweep: Path, tmp_path: Path) -> None:
    """As TrueType, which journals ask for, and not as Type 3; of the size asked for."""
    content = written(sweep, tmp_path / "a.pdf", "--size", "3.3x2.5", "--font-size", "7")
    assert content.startswith(b"%PDF") and b"/FontFile2" in content and b"/Type3" not in content
    assert b"/MediaBox [ 0 0 237.6 180 ]" in content


def test_a_png_has_the_size_and_the_dots(sweep: Path, tmp_path: Path) -> None:
    """Also where only --format says so."""
    written(sweep, tmp_path / "a", "--format", "png", "--size", "5x4", "--dpi", "100")
    assert Image.open(tmp_path / "a").size == (500, 400)


@pytest.mark.slow
def test_a_figure_grows_until_its_text_has_room(tmp_path: Path) -> None:
    """Unless a size was asked for: then that is a mistake."""
    router = tiny_config()["router"]
    cells = [
        record(1.0 + n, config={"router": {**router, "name": f"a_router_with_a_long_name_{n}"}}) for n in range(40)
    ]
    found = load(write(tmp_path / "many", *cells))
    figure, _ = draw(found, "batch", "latency_ms.p50")
    save(figure, Look())
    assert figure.get_size_inches()[1] > 4.5
    with pytest.raises(ValueError, match=r"^--size=3x2: too small for the text of this figure; use a larger --size"):
        save(draw(found, "batch", "latency_ms.p50")[0], Look(width=3.0, height=2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["-o", "a.jpg"], "--output=a.jpg: must end in .pdf, .svg, .png", id="ending"),
        pytest.param(["-o", "a"], "--output=a: must end in", id="no_ending"),
        pytest.param(["--format", "pgn"], "--format=pgn: must be one of pdf, svg, png. Did you mean png?", id="format"),
        pytest.param(["-o", "a.svg", "--format", "pdf"], "--format=pdf: a.svg ends in .svg", id="two_formats"),
        pytest.param(["--size", "7x"], "--size=7x: must be width x height in inches", id="size"),
        pytest.param(["--size", "0x3"], "--size=0x3: must be width x height in inches", id="size_zero"),
        pytest.param(["-o", "a.pdf", "--dpi", "300"], "--dpi=300: a PDF has no dots", id="dpi_of_a_pdf"),
        pytest.param(["--dpi", "5"], "--dpi=5: must be dots per inch from 10 to 1200", id="dpi"),
        pytest.param(
            ["--font", "DejaVu Sanz"], "--font=DejaVu Sanz: no font of this name is installed. Did", id="font"
        ),
        pytest.param(["--font-size", "0"], "--font-size=0: must be points from 2 to 72", id="font_size"),
    ],
)
def test_what_a_figure_cannot_be(
    sweep: Path, options: list[str], message: str, monkeypatch: Any, tmp_path: Path
) -> None:
    """One line with what to write; nothing is drawn."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        main([str(sweep), "batch", "latency_ms.p50", *options])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_columns_every_plot_of_the_report_is_drawn(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Into DIRECTORY/paper, of the width asked for; what is not in them is said."""
    assert main([str(sweep), "--size", "3.3", "--dpi", "100"]) == 0
    path, *left_out = capsys.readouterr().out.splitlines()
    assert path == f"{sweep}/paper/latency_over_batch.png" and Image.open(path).size[0] == 330
    assert left_out and all(line.startswith("not in them: ") for line in left_out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["batch"], "plot: give X and Y, or neither", id="one_column"),
        pytest.param(["--by", "batch"], "--by: has no effect without X and Y", id="by"),
        pytest.param(["--log"], "--log: has no effect without X and Y", id="log"),
        pytest.param(["--size", "3x2"], "--size=3x2: give only the width", id="height"),
        pytest.param(["-o", "a.pdf"], "--output=a.pdf: must be a folder", id="file"),
    ],
)
def test_what_every_plot_cannot_be(sweep: Path, options: list[str], message: str) -> None:
    """One line with what to write."""
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        main([str(sweep), *options])
    assert "\n" not in str(caught.value)


def test_a_width_alone_finds_its_height(sweep: Path, tmp_path: Path) -> None:
    """Of a column of a paper."""
    content = written(sweep, tmp_path / "a.pdf", "--size", "3.3", "--font-size", "7")
    assert b"/MediaBox [ 0 0 237.6 " in content
