"""analyses/analyze.py, analyses/page.py, analyses/findings.py and config/analyses.py: from words to a page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markupsafe import escape

from moe_lab.analyses.analyze import ANALYSES, analyze, compose
from moe_lab.analyses.page import PAGE
from moe_lab.records.trace import Layer, Trace, TraceWriter, tokens_of
from tests.analyses import steps, traces

SMALL = ["placement.step_tokens=16", "placement.window=2", "placement.age=0,2", "placement.horizon=2"]
SMALL += ["ranks.step_tokens=64", "ranks.ranks=2,8,64"]
CONF = Path(__file__).parents[2] / "conf" / "analysis"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return traces.random(tmp_path / "x.trace", 24, 32)


def test_everything_is_written(trace: Path, tmp_path: Path) -> None:
    """A table of each analysis twice, its plot twice, and a page that opens with the sentences."""
    one = steps.write(tmp_path / "r", 1, 1, 2.0)
    steps.write(tmp_path / "r", 1, 2, 3.0, (1.5, one))
    against = (f"stability.against={trace}", f"speculation.results={tmp_path / 'r'}")
    folder, found = analyze(trace, compose([*SMALL, *against]))
    assert folder == tmp_path / "x.analysis" and [findings.name for findings in found] == list(ANALYSES)
    tables = {f"{name}.{kind}" for findings in found for name in findings.tables for kind in ("csv", "parquet")}
    plots = {f"{plot.name}.{kind}" for findings in found for plot in findings.plots for kind in ("png", "svg")}
    written = {*tables, *plots, PAGE}
    assert {path.name for path in folder.iterdir()} == {*written, ".written"} and len(plots) >= 2 * len(ANALYSES)
    (folder / "notes.txt").write_text("somebody's own")
    (folder / ".written").write_text("\n".join([*written, "../outside", "gone.csv"]))
    (tmp_path / "outside").touch()
    page = (folder / PAGE).read_text()
    assert page.index("What the routes say") < page.index("<table>")
    for findings in found:
        assert findings.sentences or findings.name == "counterfactual"  # of which the trace has nothing
        own = page.partition(f'<a href="#{findings.name}">{findings.title}</a>')[2].partition("<h3>")[0]
        assert all(f"<li>{escape(sentence)}</li>" in own for sentence in findings.sentences)
        for name, table in findings.tables.items():
            assert (
                len(pd.read_parquet(folder / f"{name}.parquet"))
                == len(pd.read_csv(folder / f"{name}.csv"))
                == len(table)
            )
    analyze(trace, compose([*SMALL[:4], "analysis/ranks=null"]))
    left = {path.name for path in folder.iterdir()}
    assert not [name for name in left if name.startswith("ranks.")] and "notes.txt" in left
    assert (tmp_path / "outside").exists()


@pytest.mark.slow
def test_the_same_trace_gives_the_same_files(trace: Path) -> None:
    """Byte by byte."""
    folder, _ = analyze(trace, compose(SMALL))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    analyze(trace, compose(SMALL))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_processes_change_nothing(trace: Path, tmp_path: Path) -> None:
    """Each layer is analysed by one of them."""
    one, two = (analyze(trace, compose([*SMALL, f"processes={n}", f"out={tmp_path / str(n)}"]))[1] for n in (1, 2))
    for findings, same in zip(one, two, strict=True):
        assert findings.sentences == same.sentences
        for name, table in findings.tables.items():
            pd.testing.assert_frame_equal(table, same.tables[name])


def test_analyses_are_chosen(trace: Path, tmp_path: Path) -> None:
    """As the issue that asked for them writes it; one that is left out is not computed."""
    cfg = compose(
        ["analysis/expert_cache=lru", "expert_cache.capacity=4,8", "analysis/placement=null", f"out={tmp_path / 'o'}"]
    )
    folder, found = analyze(trace, cfg)
    assert [findings.name for findings in found] == [
        "expert_cache",
        "unique_experts",
        "ranks",
        "specialisation",
        "load_fit",
        "counterfactual",
    ]
    table = pd.read_csv(folder / "expert_cache.csv")
    assert set(table["policy"]) == {"lru"} and set(table["capacity"]) == {4, 8}
    assert not (folder / "placement.csv").exists()


@pytest.mark.slow
def test_a_phase_is_chosen(trace: Path, tmp_path: Path) -> None:
    """One that the trace does not have is a mistake."""
    with pytest.raises(ValueError, match=r"phase=decode: .* only prefill"):
        analyze(trace, compose(["phase=decode"]))
    cfg = compose(["phase=prefill", "analysis/placement=null", "analysis/unique_experts=null"])
    assert analyze(trace, cfg)[1][0].sentences


def test_names_in_a_trace_cannot_write_into_the_page(tmp_path: Path) -> None:
    """They are text, wherever they stand; in a CSV file no formula either."""
    with TraceWriter(tmp_path / "x.trace", [Layer(0, 4, 1)], domains=["<script>a</script>", "=1+1"]) as writer:
        writer.source = {"model": "<img src=x>"}
        writer.missing = ["<b>"]
        for domain in (0, 1):
            writer.add(tokens_of(np.zeros(3), np.arange(3), domain=domain), [np.array([[0], [1], [2]])])
    folder, _ = analyze(tmp_path / "x.trace", compose(["analysis/placement=null"]))
    page = (folder / PAGE).read_text()
    assert "<script" not in page and "<img src=x" not in page and "<b>" not in page and "&lt;img src=x&gt;" in page
    assert "'=1+1" in (folder / "expert_cache.csv").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["expert_cache.policy=lur"], "policy=lur: must be one of .* Did you mean lru", id="value"),
        pytest.param(["expert_cache.capacity=0"], "expert_cache.capacity=0: must be a number >= 1", id="zero"),
        pytest.param(["expert_cache.gb_per_s=-1"], "must be a number > 0", id="rate"),
        pytest.param(["speculation.acceptance=0.5,1.5"], "acceptance=1.5: must be a number > 0 and <= 1", id="share"),
        pytest.param(["counterfactual.routes=0"], "counterfactual.routes=0: must be a number >= 1", id="routes"),
        pytest.param(["placement.age=-1"], "placement.age=-1: must be a number >= 0", id="age"),
        pytest.param(["placement.ranks=[]"], "placement=null leaves the analysis out", id="empty"),
        pytest.param(["specialisation.guess=x"], "must be one of popular, token_id", id="guess"),
        pytest.param(["phase=deocde"], "phase=deocde: must be one of", id="phase"),
        pytest.param(["processes=0"], "processes=0: must be", id="processes"),
        pytest.param(["+nothing=1"], "nothing: unknown key; analyze has", id="key"),
        pytest.param(
            ["speculation.acceptance=0.5"],
            "acceptance=0.5: has no effect without speculation.results; set it too",
            id="what an analysis that is left out would use",
        ),
        pytest.param(
            ["++stability.against=null", "++speculation.draft_ms=1"],
            "draft_ms=1: has no effect without speculation.results; set it too",
            id="... added",
        ),
    ],
)
def test_a_mistake_names_the_key(words: list[str], message: str) -> None:
    """Before the trace is opened."""
    with pytest.raises(ValueError, match=message):
        compose(words)


@pytest.mark.parametrize(
    "option",
    [pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in sorted(CONF.glob("*/*.yaml"))],
)
def test_every_option_composes(option: Path) -> None:
    """Its first comment says what it is, and its keys are those of the default."""
    name = option.parent.name
    cfg, default = compose([f"analysis/{name}={option.stem}"]), compose([])
    assert set(cfg[name]) == set(default[name])
    first, second = option.read_text().splitlines()[:2]
    assert first == f"# @package {name}" and second.startswith("# ")


def test_nothing_of_it_enters_a_cell_id() -> None:
    """The configuration of a run does not have it."""
    import moe_lab

    assert not set(moe_lab.compose([])) & {*ANALYSES, "phase", "processes", "out"}


def test_a_damaged_layer_is_one_line(trace: Path, tmp_path: Path) -> None:
    """And nothing is written."""
    content = bytearray(trace.read_bytes())
    with Trace(trace) as opened:
        info = opened._members["0/layer/1/expert_ids.npy"]
    content[info.header_offset + 120] ^= 1
    trace.write_bytes(content)
    with pytest.raises(ValueError, match="not a trace that can be read"):
        analyze(trace, compose([f"out={tmp_path / 'o'}"]))
    assert not (tmp_path / "o").exists()
