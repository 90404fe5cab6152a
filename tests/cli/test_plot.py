"""cli/plot.py: any two columns of a folder of results."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from moe_lab.cli.plot import draw
from moe_lab.results.load import load
from tests.cli.test_main import moe_lab
from tests.results.compared import record, write


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cells with a latency, and one without."""
    cells = [record(float(batch), config={"batch": batch}) for batch in (1, 2, 16)]
    return write(tmp_path_factory.mktemp("plot") / "sweep", *cells, record(config={"batch": 4}, status="failed"))


@pytest.fixture
def runs(sweep: Path) -> pd.DataFrame:
    return load(sweep)


@pytest.mark.slow
def test_a_picture_is_written_where_it_says(sweep: Path, tmp_path: Path) -> None:
    """Into the folder's plots, or where `-o` says, with how many runs are missing in it."""
    done = moe_lab("plot", str(sweep), "batch", "latency_ms.p50", cwd=tmp_path)
    picture = sweep / "plots" / "latency_ms.p50_over_batch.png"
    assert done.stdout == f"{picture} (1 runs without one of these columns are left out)\n", done.stderr
    assert done.returncode == 0 and Image.open(picture).format == "PNG"
    other = moe_lab("plot", str(sweep), "batch", "batch", "--by", "model", "--log", "-o", "here/a.png", cwd=tmp_path)
    assert (other.returncode, other.stdout) == (0, "here/a.png\n"), other.stderr
    assert Image.open(tmp_path / "here" / "a.png").format == "PNG"


def test_a_mistake_in_a_column_is_one_line(sweep: Path, tmp_path: Path) -> None:
    """With the nearest name and exit code 2; nothing is drawn."""
    done = moe_lab("plot", str(sweep), "btch", "latency_ms.p50", "-o", "a.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "moe-lab: btch: unknown column. Did you mean batch?\n"
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


def test_several_runs_at_one_place_make_no_line(runs: pd.DataFrame) -> None:
    """Only points; a text is an axis without logarithm."""
    figure, _ = draw(runs, "model", "latency_ms.p50", "variant", log=True)
    (axes,) = figure.axes
    assert [line.get_linestyle() for line in axes.lines] == ["None"] and axes.get_xscale() == "linear"


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        pytest.param("batch", "variant", "variant: not a column of numbers", id="text"),
        pytest.param(
            "batch", "latency_ms.p5", "latency_ms.p5: unknown column. Did you mean latency_ms.p50?", id="typo"
        ),
    ],
)
def test_columns_that_cannot_be_drawn(runs: pd.DataFrame, x: str, y: str, message: str) -> None:
    """The message begins with the column."""
    with pytest.raises(ValueError) as caught:
        draw(runs, x, y, "variant", log=False)
    assert str(caught.value).startswith(message)


def test_no_run_has_all_columns(runs: pd.DataFrame) -> None:
    """Each exists, but not in one run."""
    with pytest.raises(ValueError, match=r"no run has batch, latency_ms\.p50 and status"):
        draw(runs[runs["status"] == "failed"], "batch", "latency_ms.p50", "status", log=False)
