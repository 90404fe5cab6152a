"""results/search_page.py: the table and the plot of a search, and their place in the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lab.records.search import Constraint, Objective
from moe_lab.results import charts, plots, report, search_page
from moe_lab.results.aggregate import aggregate
from moe_lab.results.panels import Panel
from tests.results import searched
from tests.results.searched import BITS, cell, trial, write


def panel_of(folder: Path) -> tuple[str, Panel]:
    tables = aggregate(folder)
    found = search_page.with_chart(charts.charts(folder, tables.runs, tables.summary), searched.found(folder))
    chart = found.drawn[0]
    assert not any("_over_" in one.name for one in found.drawn)
    assert chart.name == "search" and charts.is_name(chart.name)
    assert {series.name for panel in chart.panels if isinstance(panel, Panel) for series in panel.series} <= {
        *found.variants
    }
    (panel,) = chart.panels
    assert isinstance(panel, Panel)
    assert {series.name for series in panel.series} <= {*found.variants}
    return chart.title, panel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two on the front, one beaten, one outside, one failed."""
    return write(
        tmp_path,
        trial(2.0, 0.5, -0.1),
        trial(3.0, 0.25, 0.1),
        trial(4.0, 0.8, 0.0),
        trial(5.0, 0.1, 0.5),
        cell(6.0, medians=(), status="failed", reason="out_of_memory"),
        constraints=(Constraint(BITS, max=2.2),),
    )


def test_the_table_has_every_trial_and_what_became_of_it(folder: Path) -> None:
    """The default first; values with their intervals."""
    table = search_page.table(searched.found(folder))
    assert table.heads == ["trial", "variant", "x default", "bits per byte"]
    assert [(fields[0], fate) for fields, fate, _ in table.rows] == [
        ("default", "beaten by trial 1"),
        ("1", "on the front"),
        ("2", "on the front"),
        ("3", "beaten by trial 1"),
        ("4", "outside: quality.bits_per_byte is 2.5, beyond its max"),
        ("5", "failed: out_of_memory"),
    ]
    values = [fields[2:] for fields, *_ in table.rows]
    assert values[0] == ["1.000", "2.000 (+0.000)"] and values[5] == ["", ""]
    assert values[1] == ["0.5000 [0.4900,\u00a00.5100]", "1.900 (-0.100) [-0.110,\u00a0-0.090]"]
    assert [is_best for *_, is_best in table.rows] == [False, True, True, False, False, False]


def test_the_plot_has_a_staircase_of_the_front_alone(folder: Path) -> None:
    """What is outside a constraint is drawn, and no step of it; a default has an interval of nothing beside itself."""
    title, panel = panel_of(folder)
    groups = {series.name: list(zip(series.at, series.value, strict=True)) for series in panel.series}
    assert title == "Search: the front"
    assert groups == {
        "on the front": [(1.9, 0.5), (2.1, 0.25)],
        "other trials": [(2.0, 0.8)],
        "outside a constraint": [(2.5, 0.1)],
        "the default": [(2.0, 1.0)],
    }
    assert panel.best is not None and (panel.best.at, panel.best.value) == ([1.9, 2.1], [0.5, 0.25])
    assert next(series for series in panel.series if series.name == "the default").low == [1.0]


def test_the_best_so_far_never_gets_worse(tmp_path: Path) -> None:
    """From the default on, over the trials in their order."""
    one = (Objective("latency_ms.p50", "maximize"),)
    trials = (trial(2.0 + at, ratio, 0) for at, ratio in enumerate((0.5, 2.0, 1.5, 3.0)))
    made = write(tmp_path, *trials, objectives=one)
    title, panel = panel_of(made)
    assert title == "Search: the best so far" and panel.best is not None
    assert (panel.best.at, panel.best.value) == ([0.0, 1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 4.0, 4.0, 6.0])


@pytest.mark.slow
def test_the_page_has_the_search(folder: Path) -> None:
    """Its sentences, its table and its plot; a damaged file is said, and the page stands."""
    tables = aggregate(folder)
    plots.draw(folder, tables.runs, tables.summary)
    assert (folder / "plots" / "search.png").exists()
    page = report.write(folder, tables).read_text()
    assert '<h2 id="search">Search</h2>' in page and "beaten by trial 1" in page and "are the front of latency" in page
    assert '"name":"search"' in page and '"name":"front"' in page
    (folder / "search.json").write_text("{")
    page = report.write(folder, tables).read_text()
    assert '<h2 id="search">' not in page and "search.json cannot be read" in page


def test_a_search_of_which_nothing_is_known_has_no_plot(tmp_path: Path) -> None:
    """The other charts stay as they are."""
    made = write(tmp_path, None, beside=cell(1.0, medians=(), status="failed", reason="out_of_memory"))
    tables = aggregate(made)
    plain = charts.charts(made, tables.runs, tables.summary)
    assert search_page.with_chart(plain, None) == plain
    assert search_page.with_chart(plain, searched.found(made)).drawn == plain.drawn


def test_lines_over_what_a_sampler_chose_are_left_out(folder: Path) -> None:
    """A sweep would have them; the page says where the numbers are."""
    tables = aggregate(folder)
    plain = charts.charts(folder, tables.runs, tables.summary)
    found = search_page.with_chart(plain, searched.found(folder))
    assert any("_over_" in chart.name for chart in plain.drawn)
    assert any("a sampler chose these" in text for text in found.left_out)
