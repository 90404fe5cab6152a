"""results/report.py: the page, read as HTML and in a browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import synthetic
from moe_lab.config.schemas import PLOTLY
from moe_lab.records.schema import LAUNCH_BOUND, Record
from moe_lab.records.store import RESULT, ROUTING, read_record, write_record
from moe_lab.results import glossary, report
from moe_lab.results.aggregate import aggregate
from moe_lab.results.charts import Charts
from moe_lab.results.panels import NO_INTERVAL, Chart, Panel, Series
from tests.results import browser, drawn, observed, searched, texts

EVIL = "<b>&lt;</b></script><script>window.ran = 1</script><img src=x onerror='window.ran=2'>\"'`${window.ran=3}"


def written(directory: Path) -> Path:
    """The report of what lies in the directory."""
    return report.write(directory, aggregate(directory))


def change(folder: Path, edit: Callable[[Record], None]) -> None:
    """Edit a record in place."""
    record = read_record(folder)
    edit(record)
    write_record(folder, record)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of 48 cells, with its plots."""
    directory = shutil.copytree(drawn.sweep().directory, tmp_path_factory.mktemp("sweep") / "sweep")
    (next(directory.glob("*/result.json")).parent / "run.log").write_text("what happened")
    return written(directory)


@pytest.fixture(scope="module")
def of_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of 16 cells on texts, some of which are steps of decoding; the name of one text is markup."""
    directory = tmp_path_factory.mktemp("texts")
    folders = synthetic.sweep(directory, 16)
    for folder in folders:
        texts.add(folder)
    with np.load(folders[0] / ROUTING) as arrays:
        changed = {**arrays, "domain": np.array([EVIL, "prose"])}
    np.savez(folders[0] / ROUTING, **changed)

    def plant(record: Record) -> None:
        assert record.quality is not None and record.throughput is not None
        record.quality["domains"] = {EVIL: record.quality["domains"]["code"]}
        record.throughput["time_per_output_token_ms"] = 12.5

    change(folders[0], plant)
    return written(directory)


def answered(page: Path) -> list[str]:
    """The sentences of the answers, without tags."""
    found = re.search(r'<h2 id="answers">.*?<details id="verdicts"', page.read_text(), re.DOTALL)
    assert found is not None
    items = re.findall(r"<li[^>]*>.*?</span><span>(.*?)</span></li>", found[0], re.DOTALL)
    return [unescape(re.sub(r"<[^>]*>", "", text)) for text in items]


def test_what_was_compared_stands_above_the_answers_and_these_above_all(sweep: Path) -> None:
    """The facts are those of the records; the first answer says which variant to take."""
    page = sweep.read_text()
    assert (
        page.index('id="facts"') < page.index('id="answers"') < page.index('id="verdicts"') < page.index('id="plots"')
    )
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", re.sub("</?button[^>]*>|</?code>", "", page)))
    assert facts["Model"].startswith("decoder_moe (2 layers, 8 experts, top-2, width 32, expert width 24)")
    assert facts["dtype"] == "fp32" and facts["Device"] == "Synthetic CPU" and "moe-lab 0.1.0" in facts["Version"]
    assert answered(sweep)[0].startswith("Take torch/grouped")
    assert len(answered(sweep)) <= 12


@pytest.mark.slow
def test_launch_bound_cells_are_counted_in_the_answers(tmp_path: Path) -> None:
    """With what to do about it; without such a cell nothing is said."""
    folders = synthetic.sweep(tmp_path, 16)
    assert "launch-bound" not in " ".join(answered(written(tmp_path)))
    for folder in folders[:3]:
        change(folder, lambda record: record.warnings.append(f"{LAUNCH_BOUND}the GPU was busy 7 % of the time"))
    text = " ".join(answered(written(tmp_path)))
    assert "3 are launch-bound" in text and "execution=cuda_graph" in text


def test_a_defined_word_is_said_once_and_marked(sweep: Path) -> None:
    """Each mark opens a definition that is there; the page's own words are those of the glossary."""
    page = sweep.read_text()
    asked, there = set(re.findall('popovertarget="([^"]*)"', page)), re.findall('popover id="([^"]*)"', page)
    assert len(asked) > 8 and asked <= set(there) and len(there) == len(set(there)) == len(glossary.TERMS)


def ours(page: Path) -> str:
    """The page without Plotly's source."""
    return re.sub(r'<script id="plotly".*?</script>', "", page.read_text(), flags=re.DOTALL)


def shown(page: Path) -> str:
    """Its words, without tags."""
    return unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<(script|style).*?</\1>", "", page.read_text(), flags=re.DOTALL)))


def test_the_parts_stand_in_their_order(sweep: Path) -> None:
    """What was found first, how it was found last."""
    parts = [
        "answers",
        "plots",
        "routers",
        "cells",
        "problems",
        "warnings",
        "environment",
        "command",
        "files",
    ]
    assert re.findall(r'<h2 id="([a-z-]+)"', ours(sweep)) == parts


def test_numbers_stand_below_their_headings(tmp_path: Path) -> None:
    """Both at the right end of their column: of a search, of quality against cost, of energy and of a profile."""
    one = searched.trial(2.0, 0.5, -0.1)
    observed.add(one)
    page = written(searched.write(tmp_path / "s", one)).read_text()
    for place, n in (("search", 2), ("fronts", 3), ("energy", 5), ("profiles", 3)):
        table = page.split(f'<h2 id="{place}">')[1].split("</table>")[0]
        heads = re.findall(r"<th scope=.col.(.*?)>", table.split("</thead>")[0])
        fields = re.findall(r"<td(.*?)>", table.split("<tbody>")[1].split("</tr>")[0])
        right = ['class="n"' in field for field in fields]
        assert ['class="n"' in head for head in heads] == right and sum(right) >= n, place


def test_the_page_names_no_other_host(sweep: Path) -> None:
    """It opens offline; the policy in it forbids the rest."""
    assert not re.findall(r"https?://|//cdn|@import|url\(", ours(sweep))
    assert "default-src 'none'" in ours(sweep)


def test_every_link_leads_to_a_file(sweep: Path) -> None:
    """Relative to the page."""
    links = [unescape(link) for link in re.findall(r'href="([^"]*)"', ours(sweep)) if link != "data:,"]
    assert len(links) > 60
    assert [link for link in links if not (sweep.parent / link).exists()] == []


def test_the_command_is_that_of_the_plan(sweep: Path) -> None:
    """Quoted so that a shell reads the same words."""
    command = unescape(re.findall(r"<pre><code>(.*?)</code></pre>", ours(sweep), re.DOTALL)[0])
    assert shlex.split(command) == json.loads((sweep.parent / "plan.json").read_text())["commands"][-1]


def test_counts_failures_and_machine_are_named(sweep: Path) -> None:
    """Every record that is not ok, with its reason."""
    runs, words = aggregate(sweep.parent).runs, shown(sweep)
    for status, number in runs["status"].value_counts().items():
        assert re.search(rf"\b{number}\s+{status}\b", words)
    for reason in runs["reason"].dropna():
        assert reason in words
    assert "Synthetic CPU" in words
    assert len(re.findall(r"<tr data-status", ours(sweep))) == len(runs)


def heads_of(page: Path) -> list[str]:
    """Of the table of all cells."""
    table = re.findall(r'<table id="table">.*?</thead>', ours(page), re.DOTALL)[0]
    return re.findall(r'<button type="button" class="sort"[^>]*>([^<]*)<', table)


def test_columns_that_few_sweeps_have_are_there_only_where_they_are_known(sweep: Path, of_texts: Path) -> None:
    """Time per output token and the quality, with a word on what they mean below the cards."""
    extra = {"ms per output token", "bits per byte", "KL to native", "top-1 agreement"}
    assert heads_of(of_texts)[:8] == [
        "status",
        "variant",
        "batch",
        "seq_len",
        "model",
        "median ms",
        "x anchor",
        "bits per byte",
    ]
    assert extra <= set(heads_of(of_texts)) and not extra & set(heads_of(sweep))
    assert ">text information</button>" in of_texts.read_text() and ">text information</button>" not in ours(sweep)
    assert "12.50" in shown(of_texts)


def test_cards_say_what_a_router_does_to_the_predictions(of_texts: Path) -> None:
    """The difference from the native router with its interval."""
    words = " ".join(shown(of_texts).split())
    assert "1.750 (+0.250) [+0.200, +0.300]" in words and "1.500 (+0.000) [-0.050, +0.050]" in words
    assert "text information" in words and " 0.2 " in words


def test_a_front_says_what_is_dominated(of_texts: Path) -> None:
    """A table for each setting with two routers, those that predict best first; what is not on it says why."""
    page = unescape(ours(of_texts))
    tables = re.findall(r'<details class="front".*?</details>', page, re.DOTALL)
    assert tables and all(">fewest experts<" in table and ">experts MB<" in table for table in tables)
    variants = [re.findall(r"<tr[^>]*><td>([^<]+)</td>", table) for table in tables]
    assert all(
        [name.split("/")[0] for name in names] == sorted((n.split("/")[0] for n in names), reverse=True)
        for names in variants
    )
    assert any("by torch/grouped: worse quality at more time" in table for table in tables)
    assert all(table.count('class="on-front"') == table.count("<td>on the front</td>") >= 1 for table in tables)


def test_no_number_of_a_card_breaks_over_lines(of_texts: Path) -> None:
    """Nor an interval; between them a line may break."""
    cards = re.findall(
        r'<section class="card">\s*<h3>[^<]*</h3>\s*<ul class="chips">.*?</section>', ours(of_texts), re.S
    )
    fields = [field for card in cards for field in re.findall(r'<td class="n">(.*?)</td>', card)]
    assert "<span>1.750</span> <span>(+0.250)</span> <span>[+0.200,\u00a0+0.300]</span>" in fields
    assert all(re.fullmatch(r"(<span>[^ <]*</span> ?)+", field) for field in fields)


def test_the_anchor_comes_first_in_each_setting_of_the_table(sweep: Path) -> None:
    """As on the terminal; counts are whole numbers."""
    rows = re.findall(r"<tr data-status.*?</tr>", ours(sweep), re.S)
    fields = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    runs = aggregate(sweep.parent).runs
    anchors = set(runs["ratio_to_anchor.anchor"].dropna())
    settings = dict(zip(runs["cell_id"], runs["setting_id"], strict=True))
    seen = set()
    for row in fields:
        cell_id = re.sub("<[^>]*>", "", row[-1])
        assert (cell_id in anchors) <= (settings[cell_id] not in seen)
        seen.add(settings[cell_id])
    dead = heads_of(sweep).index("dead experts")
    assert {row[dead] for row in fields} <= {"", *map(str, range(9))}


def test_unreadable_records_are_listed(tmp_path: Path) -> None:
    """They stand in no table, and nothing is dropped in silence."""
    broken = synthetic.sweep(tmp_path, 8)[3]
    (broken / RESULT).write_text('{"schema": 1')
    words = shown(written(tmp_path))
    assert "Unreadable" in words and f"{broken.name}/{RESULT}" in words


@pytest.mark.slow
def test_cells_of_the_plan_without_a_record_are_counted(tmp_path: Path) -> None:
    """A sweep that was interrupted; where every cell has one, nothing is said."""
    folders = synthetic.sweep(tmp_path, 8)
    assert "not run" not in shown(written(tmp_path))
    for folder in folders[:2]:
        shutil.rmtree(folder)
    assert "2 not run (planned)" in " ".join(shown(written(tmp_path)).split())


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(None, id="none"),
        pytest.param("{", id="cut_off", marks=pytest.mark.slow),
        pytest.param("[1]", id="a_list", marks=pytest.mark.slow),
        pytest.param('{"schema": 1, "name": 3, "commands": 7, "compare": ["router"], "cells": [3]}', id="wrong_types"),
    ],
)
def test_without_a_plan_the_command_is_not_known(tmp_path: Path, plan: str | None) -> None:
    """A folder of single runs has none; a broken one is said."""
    synthetic.sweep(tmp_path, 8)
    (tmp_path / "plan.json").unlink()
    if plan is not None:
        (tmp_path / "plan.json").write_text(plan)
    words = shown(written(tmp_path))
    assert "Unknown" in words and "plan.json" in words and tmp_path.name in words


def of_two_machines(directory: Path) -> Path:
    """The report of 8 cells."""

    def other(record: Record) -> None:
        record.env_id = "feedfeedfeed"
        record.environment = {**record.environment, "device_name": "Another CPU"}

    for folder in synthetic.sweep(directory, 8)[:3]:
        change(folder, other)
    return written(directory)


@pytest.mark.slow
def test_several_machines_stand_side_by_side(tmp_path: Path) -> None:
    """What differs between them, and how many cells are of each; the table has a part for each."""
    words = shown(of_two_machines(tmp_path))
    assert "Another CPU, Synthetic CPU" in words and "feedfeedfeed (3 cells)" in words
    table = report._table(aggregate(tmp_path).runs, ["router"])
    assert [machine for machine, _ in table.parts] == ["Another CPU", "Synthetic CPU", "reached no device"]
    assert len(table.parts[0][1]) == 3 and sum(len(rows) for _, rows in table.parts) == 8


def test_an_empty_folder_has_a_report(tmp_path: Path) -> None:
    """It says that there is nothing."""
    assert "No cells were compared" in shown(written(tmp_path))


@pytest.mark.slow
def test_the_page_of_2000_cells_is_under_15_mb(tmp_path: Path) -> None:
    """It has every cell."""
    synthetic.sweep(tmp_path, 2000, samples=10)
    page = written(tmp_path)
    assert page.stat().st_size < 15e6
    assert len(re.findall(r"<tr data-status", ours(page))) == 2000


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One Chromium for all tests of this file."""
    driver = browser.start()
    yield driver
    driver.quit()


@contextmanager
def opened(driver: Any, page: Path, **view: Any) -> Iterator[Any]:
    """The page with all its plots; at the end nothing may stand in the console."""
    browser.show(driver, page, **view)
    yield driver
    assert driver.get_log("browser") == []


@pytest.mark.browser
def test_the_browser_draws_every_plot_and_loads_nothing(chromium: Any, sweep: Path) -> None:
    """As many lines as variants; no request but for the page."""
    found = aggregate(sweep.parent)
    with opened(chromium, sweep) as driver:
        drawn = driver.execute_script("return [...document.querySelectorAll('.plot')].map(p => [p.id, p.data.length])")
        for name, traces in drawn:
            svg = f"#{name} .scatterlayer .trace, #{name} .barlayer .trace, #{name} .heatmaplayer image"
            assert len(driver.find_elements("css selector", svg)) == traces > 0
        assert dict(drawn)["plot-latency_over_batch"] == found.summary["variant"].nunique()
        assert len(drawn) == 10
        assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0


@pytest.mark.browser
def test_the_choices_of_the_expert_load(chromium: Any, sweep: Path) -> None:
    """All layers are a map, one is a row of bars with its own counts."""
    with opened(chromium, sweep) as driver:
        plot = "document.getElementById('plot-expert_load')"
        boxes = driver.find_elements("css selector", "section:has(#plot-expert_load) select")
        assert driver.execute_script(f"return {plot}.data[0].type") == "heatmap"
        counts = driver.execute_script(f"return {plot}.data[0].text")
        boxes[1].send_keys("2")
        assert driver.execute_script(f"return [{plot}.data[0].type, {plot}.data[0].text]") == ["bar", counts[2]]
        before = driver.execute_script(f"return {plot}.data[0].text")
        boxes[0].send_keys("s")
        assert driver.execute_script(f"return {plot}.data[0].text") != before


@pytest.mark.browser
def test_the_choices_of_the_co_activation(chromium: Any, sweep: Path) -> None:
    """A map of one layer, with the shares of each row's own tokens and nothing on the diagonal."""
    with opened(chromium, sweep) as driver:
        plot = "document.getElementById('plot-coactivation')"
        boxes = driver.find_elements("css selector", "section:has(#plot-coactivation) select")
        counts, shares = driver.execute_script(f"return [{plot}.data[0].text, {plot}.data[0].z]")
        assert shares[2][2] is None and shares[2][5] == pytest.approx(counts[2][5] / max(counts[2][2], 1))
        assert "all" not in boxes[1].text.split()
        boxes[1].send_keys("2")
        assert driver.execute_script(f"return {plot}.data[0].text") != counts


@pytest.mark.browser
@pytest.mark.slow
def test_the_choices_of_the_experts_by_text(chromium: Any, of_texts: Path) -> None:
    """All layers are one map with an empty row below each, one layer a map with a row for each text."""
    with opened(chromium, of_texts) as driver:
        plot = "document.getElementById('plot-experts_by_text')"
        boxes = driver.find_elements("css selector", "section:has(#plot-experts_by_text) select")
        boxes[0].send_keys("s")  # sinkhorn, of which no text is markup
        z, y, names = driver.execute_script(
            f"return [{plot}.data[0].z, {plot}.data[0].y, {plot}.layout.yaxis.ticktext]"
        )
        assert y == list(range(4 * 3 - 1)) and [row[0] is None for row in z] == 3 * [False, False, True] + 2 * [False]
        assert names[:3] == ["layer 0: code", "prose.v2", "layer 1: code"]
        assert all(sum(row) == pytest.approx(len(row)) for row in z if row[0] is not None)
        boxes[1].send_keys("2")
        one, names = driver.execute_script(f"return [{plot}.data[0].z, {plot}.layout.yaxis.ticktext]")
        assert one == z[6:8] and names == ["code", "prose.v2"]


@pytest.mark.browser
def test_the_bits_of_texts_lie_in_rows_with_their_names(chromium: Any, of_texts: Path) -> None:
    """Names are words and nothing that runs, also those of texts."""
    with opened(chromium, of_texts) as driver:
        plot = "document.getElementById('plot-bits_by_text')"
        shown = f"return [...{plot}.querySelectorAll('.ytick text')].map(text => text.textContent)"
        assert set(texts.TEXTS) <= set(driver.execute_script(shown))
        markers = f"return {plot}.querySelectorAll('.scatterlayer .point').length"
        data = driver.execute_script(f"return {plot}.data.map(trace => trace.x.length)")
        assert driver.execute_script(markers) == sum(data) > 4
        assert driver.execute_script("return window.ran") is None
        assert not driver.find_elements("css selector", "img")


@pytest.mark.browser
def test_one_choice_of_the_setting_is_that_of_all_plots(chromium: Any, sweep: Path) -> None:
    """Each plot says which setting it shows; one over a size has no choice of that."""
    shown = """return Object.fromEntries([...document.querySelectorAll('.plot')].map(
      plot => [plot.id.slice(5), plot.parentNode.querySelector('.panel').textContent]))"""
    with opened(chromium, sweep) as driver:
        boxes = {box.text.split()[0]: box for box in driver.find_elements("css selector", "#setting label")}
        assert set(boxes) == {"model", "batch", "seq_len"}
        before = driver.execute_script(shown)
        boxes["model"].find_element("tag name", "select").send_keys("m")
        boxes["batch"].find_element("tag name", "select").send_keys("1")
        after = driver.execute_script(shown)
        assert before.pop("phase_shares").startswith(
            "moe_layer, batch=2, seq_len=32 (the chosen setting has no such plot)"
        )
        assert {text.split(",")[0] for text in before.values()} == {"decoder_moe"}
        assert {name: text for name, text in after.items() if not text.startswith("moe_layer")} == {}
        assert "batch=1," in after["expert_load"] and "batch" not in after["latency_over_batch"]


@pytest.mark.browser
def test_a_definition_opens_by_keyboard_and_closes(chromium: Any, sweep: Path) -> None:
    """And by a click, with no script of ours."""
    open_ = "return [...document.querySelectorAll('[popover]')].filter(p => p.matches(':popover-open')).map(p => p.id)"
    with opened(chromium, sweep) as driver:
        mark = driver.find_element("css selector", ".answers .term")
        for key in ("\n", " "):
            mark.send_keys(key)
            assert driver.execute_script(open_) == [mark.get_attribute("popovertarget")]
            mark.send_keys("\ue00c")  # escape
            assert driver.execute_script(open_) == []
        mark.click()
        assert driver.execute_script(open_) == [mark.get_attribute("popovertarget")]


@pytest.mark.browser
@pytest.mark.parametrize("width", [pytest.param(1280, id="desk"), pytest.param(390, id="phone")])
def test_tables_fit_the_desk_and_show_that_they_scroll_on_the_phone(chromium: Any, of_texts: Path, width: int) -> None:
    """With quality in them; a shadow lies at the edge behind which there is more."""
    boxes = """return [...document.querySelectorAll('.scroll')].map(
      box => [box.scrollWidth - box.clientWidth, getComputedStyle(box).backgroundAttachment])"""
    with opened(chromium, of_texts, width=width) as driver:
        beyond = driver.execute_script(boxes)
        assert max(more for more, _ in beyond) > 100 if width == 390 else [more for more, _ in beyond if more > 0] == []
        assert all(attachment.startswith("local, local, scroll, scroll") for _, attachment in beyond)
        assert driver.execute_script("return document.documentElement.scrollWidth") == width


@pytest.mark.browser
@pytest.mark.parametrize(
    "plotly", [pytest.param(name, id=name, marks=() if name == "none" else pytest.mark.slow) for name in PLOTLY]
)
def test_the_plots_are_there_wherever_plotly_is(chromium: Any, sweep: Path, tmp_path: Path, plotly: str) -> None:
    """From file://, with nothing in the console; a page that shows pictures, or loads a file, is small."""
    copy = tmp_path / "copy"
    shutil.copytree(sweep.parent, copy)
    page = report.write(copy, aggregate(copy), plotly)
    assert (page.stat().st_size > 4e6) == (plotly == "inline")
    assert (copy / "plotly.min.js").exists() == (plotly == "directory")
    drawn = (
        "return [document.querySelectorAll('.plot .main-svg').length, [...document.images].map(i => i.naturalWidth)]"
    )
    with opened(chromium, page) as driver:
        svgs, pictures = driver.execute_script(drawn)
        assert (svgs >= 10) == (plotly != "none") and (len(pictures) == 10) == (plotly == "none")
        assert all(width > 200 for width in pictures)
        loaded = driver.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
        assert [name.rsplit("/", 1)[-1] for name in loaded] in ([], ["plotly.min.js"] * (plotly == "directory"))


def test_the_sweep_says_where_plotly_is_and_the_call_may_say_another(tmp_path: Path) -> None:
    """An older plan has no word on it; a file of an earlier page is removed."""
    synthetic.sweep(tmp_path, 8)
    plan = tmp_path / "plan.json"
    assert written(tmp_path).stat().st_size > 4e6
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "plotly": "directory"}))
    assert written(tmp_path).stat().st_size < 1e6 and (tmp_path / "plotly.min.js").exists()
    assert report.write(tmp_path, aggregate(tmp_path), "none").stat().st_size < 1e6
    assert not (tmp_path / "plotly.min.js").exists()
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "plotly": "cdn"}))
    assert "plan.json cannot be read: plotly='cdn'" in " ".join(shown(written(tmp_path)).split())


@pytest.mark.browser
def test_the_front_lies_below_the_points(chromium: Any, sweep: Path) -> None:
    """A staircase beside the variants, with a name in the legend."""
    with opened(chromium, sweep) as driver:
        traces = driver.execute_script("return document.getElementById('plot-latency_against_error').data")
        *points, front = traces
        assert front["name"] == "Pareto front" and front["mode"] == "lines"
        lowest = min(y for trace in points for y in trace["y"])
        assert min(front["y"]) == pytest.approx(lowest)


@pytest.mark.browser
def test_a_legend_says_what_hollow_means_where_nothing_else_needs_one(
    chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single variant whose values stand beside their names."""
    synthetic.sweep(tmp_path, 8)
    panel = Panel("t", [Series("v", ["a", "b"], [1.0, 2.0], [None, 1.9], [None, 2.1], ["", ""])])
    one = Charts([Chart("c", "dots", "t", "x", "y", [panel], True)], [], ["v"], [])
    monkeypatch.setattr(report, "charts", lambda *_, **__: one)
    with opened(chromium, written(tmp_path)) as driver:
        shown = "return [...document.querySelectorAll('#plot-c .legendtext')].map(text => text.textContent)"
        assert driver.execute_script(shown) == [NO_INTERVAL]


@pytest.mark.browser
def test_the_table_sorts_by_number_and_filters(chromium: Any, sweep: Path) -> None:
    """By keyboard, as by the mouse; what is not known comes last either way."""
    runs = aggregate(sweep.parent).runs
    with opened(chromium, sweep) as driver:
        heads = driver.find_elements("css selector", "#table th")
        column = heads_of(sweep).index("median ms")
        button = heads[column].find_element("tag name", "button")
        column_texts = (
            f"return [...document.querySelectorAll('#table tbody tr')].map(r => r.cells[{column}].dataset.n ?? '')"
        )
        for direction, sign in (("ascending", 1), ("descending", -1)):
            button.send_keys("\n")
            assert heads[column].get_attribute("aria-sort") == direction
            texts = driver.execute_script(column_texts)
            known = [float(text) for text in texts if text]
            assert known == sorted(known, key=lambda value: sign * value)
            assert len(known) == runs["latency_ms.p50"].notna().sum() and all(texts[: len(known)])
        visible = "return [...document.querySelectorAll('#table tbody tr')].filter(r => r.offsetHeight).length"
        driver.find_element("id", "filter").send_keys("SINKHORN/l")
        assert driver.execute_script(visible) == (runs["variant"] == "sinkhorn/loop").sum()
        assert driver.find_element("id", "shown").text.endswith("of 48 cells")
        driver.find_element("id", "filter").clear()
        driver.find_element("id", "filter").send_keys(" ")
        driver.find_element("id", "status").send_keys("failed")
        assert driver.execute_script(visible) == (runs["status"] == "failed").sum() > 0


@pytest.mark.browser
def test_the_cells_of_a_machine_stay_together(chromium: Any, tmp_path: Path) -> None:
    """However the table is sorted; a machine whose cells are filtered out is not named, and its name is a filter."""
    page = of_two_machines(tmp_path)
    with opened(chromium, page) as driver:
        column = heads_of(page).index("median ms")
        numbers = f"""
          return [...document.querySelectorAll("#table tbody")].map(body =>
            [...body.rows].map(row => row.className || row.cells[{column}].dataset.n).filter(n => n !== undefined))
        """
        before = driver.execute_script(numbers)
        driver.find_elements("css selector", "#table th .sort")[column].click()
        after = driver.execute_script(numbers)
        for old, new in zip(before, after, strict=True):
            assert new[0] == "machine" and new[1:] == sorted(old[1:], key=float)
        driver.find_element("id", "filter").send_keys("another cpu")
        names = [name.text for name in driver.find_elements("css selector", "#table .machine")]
        assert [name for name in names if name] == ["Another CPU"]
        assert driver.find_element("id", "shown").text == "3 of 8 cells"


@pytest.mark.browser
@pytest.mark.parametrize("width", [pytest.param(390, id="phone"), pytest.param(1280, id="desk")])
@pytest.mark.parametrize(
    "dark", [pytest.param(False, id="light"), pytest.param(True, id="dark", marks=pytest.mark.slow)]
)
def test_the_page_fits_its_window(chromium: Any, sweep: Path, width: int, dark: bool) -> None:
    """It does not scroll sideways; text and page contrast, also in the plots and after the system changes its mind."""
    colours = """
      const plot = document.querySelector(".plot"), rgb = text => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
      return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
        getComputedStyle(plot.querySelector(".xtick text")).fill].map(rgb).map(c => (c[0] + c[1] + c[2]) / 3);
    """
    with opened(chromium, sweep, width=width, dark=dark) as driver:
        assert driver.execute_script("return document.documentElement.scrollWidth") == width
        for now in (dark, not dark):
            browser.emulate(driver, width=width, dark=now)
            driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
            page, *texts = driver.execute_script(colours)
            assert all((text - page > 150) if now else (page - text > 150) for text in texts)


@pytest.mark.browser
def test_planted_markup_is_shown_and_does_not_run(chromium: Any, tmp_path: Path) -> None:
    """In the name, a reason, an override, a warning and a router's name; in the plan, too."""
    folders = synthetic.sweep(tmp_path, 32)

    def plant(record: Record) -> None:
        record.name, record.overrides, record.warnings = EVIL, [EVIL], [EVIL]
        if record.status != "ok":
            record.reason = f"error: {EVIL}"
        if record.config["router"]["name"] == "sinkhorn":
            record.config["router"]["name"] = EVIL
        record.environment = {**record.environment, "device_name": EVIL}

    for folder in folders:
        change(folder, plant)
    change(folders[0], lambda record: record.__dict__.update(status="failed", reason=f"error: {EVIL}"))
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan |= {"name": EVIL, "commands": [["moe-lab", EVIL]]}
    plan["cells"] = [{**cell, "variant": cell["variant"].replace("sinkhorn", EVIL)} for cell in plan["cells"]]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with opened(chromium, written(tmp_path)) as driver:
        driver.find_element("css selector", "#table th:nth-child(2) button").click()
        assert driver.execute_script("return window.ran") is None
        assert driver.find_element("tag name", "h1").text == EVIL
        for place in ("table", "problems ~ .scroll", "warnings + .card", "environment + .scroll"):
            assert EVIL in driver.execute_script(f"return document.querySelector('#{place}').textContent")
        legend = "return [...document.querySelectorAll('.legendtext')].map(text => text.textContent)"
        assert f"{EVIL}/grouped" in driver.execute_script(legend)
        assert not driver.find_elements("css selector", "img")


@pytest.mark.browser
def test_the_printed_page_has_every_row(chromium: Any, sweep: Path) -> None:
    """Nothing is hidden in a box that scrolls."""
    with opened(chromium, sweep, dark=True) as driver:
        browser.emulate(driver, dark=True, media="print")
        box = "const b = document.querySelector('#cells ~ .scroll'); return b.clientHeight >= b.scrollHeight"
        assert driver.execute_script(box)
        driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
        colours = (
            "return [getComputedStyle(document.body).backgroundColor,"
            "getComputedStyle(document.querySelector('.xtick text')).fill]"
        )
        assert driver.execute_script(colours) == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]


@pytest.mark.slow
def test_exports_are_listed_with_their_parity(tmp_path: Path) -> None:
    """A link where the pair still lies below its cell; a path as text where it lies elsewhere."""
    folders = synthetic.sweep(tmp_path, 3)
    counts = {"nodes": 7, "functions": 13, "params_bytes": 2_500_000}
    here = {"dir": str(folders[0] / "netron"), **counts, "parity": {"status": "passed", "rel_error": 2.7e-07}}
    gone = {"dir": "/else/where", **counts, "parity": {"status": "verified_in_fp32", "rel_error": 3e-07}}
    change(folders[0], lambda record: setattr(record, "export", here))
    change(folders[1], lambda record: setattr(record, "export", gone))
    (folders[0] / "netron").mkdir()
    (folders[0] / "netron" / "parity.json").write_text("{}")
    page = written(tmp_path).read_text()
    table = page[page.index('id="exports"') :].split("</table>")[0]
    assert f'<a href="{folders[0].name}/netron/parity.json">passed</a>' in table
    assert "/else/where" in table and "verified_in_fp32" in table and table.count("<a href") == 1
    assert "2.700e-07" in table and "7 in the graph, 13 functions" in table and "2.5 MB" in table
    assert 'id="exports"' not in written_without_exports(tmp_path / "none")


def written_without_exports(directory: Path) -> str:
    synthetic.sweep(directory, 2)
    return written(directory).read_text()
