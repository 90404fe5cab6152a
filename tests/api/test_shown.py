"""api/shown.py and api/html_table.py: results in a REPL and in a notebook."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from moe_lab.api.shown import Result, Results
from moe_lab.records.schema import Record
from tests import tiny
from tests.cli.test_table import cell, sweep
from tests.results.compared import record, write


def test_a_record_shows_what_counts() -> None:
    """Not a dump of its fields; what is not known has no line."""
    made = sweep(1)[1]
    made.warnings, made.directory = ["busy machine: <others>"], "outputs/runs/x"
    shown = Result.of(made)
    assert shown.to_dict() == made.to_dict() and isinstance(shown, Record)
    lines = dict(line.split("  ", 1) for line in repr(shown).splitlines())
    found = {name.strip(): text.strip() for name, text in lines.items()}
    assert found["status"] == "ok" and found["router"] == "expert_choice" and found["model"].startswith("moe_layer/E5")
    assert found["p50 [interval]"] == "20 ms [19.6, 20.4]" and found["ratio [interval]"] == "1.39 [1.35, 1.42]"
    assert found["bits/byte vs native [interval]"] == "+0.70 [0.64, 0.76]"
    assert (found["warning"], found["directory"]) == ("busy machine: <others>", "outputs/runs/x")
    page = shown._repr_html_()
    assert page.startswith("<table>") and "busy machine: &lt;others&gt;" in page and "20 ms [19.6, 20.4]" in page


def test_rich_prints_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """`from rich import print`, and no markup is read."""
    shown = Result.of(cell("torch"))
    shown.warnings = ["[bold]x[/]"]
    Console(width=200).print(shown)
    assert capsys.readouterr().out.rstrip("\n").splitlines() == repr(shown).splitlines()


@pytest.mark.parametrize(
    ("made", "text"),
    [
        pytest.param(record(status="failed", reason="out_of_memory"), "reason          out_of_memory", id="failed"),
        pytest.param(
            tiny.record(status="failed", reason="?"), "status  failed\nreason  ?", id="without_a_configuration"
        ),
    ],
)
def test_a_failure_says_why(made: Record, text: str) -> None:
    """Also one that was never composed."""
    assert text in repr(Result.of(made)) and "failed" in Result.of(made)._repr_html_()


def test_results_are_a_sequence_with_a_table(tmp_path: Path) -> None:
    """Sorted in the table, in the order of the command as records; `frame` has these cells only."""
    cells = sweep(8, 1)
    cells[-1].status, cells[-1].reason, cells[-1].latency_ms = "failed", "out_of_memory", None
    folder = write(tmp_path / "s", *cells, record(1.0, config={"batch": 99}))
    found = Results(folder, cells, ["router"], page=folder / "report.html")
    assert len(found) == 6 and [one.config["batch"] for one in found] == [8, 8, 8, 1, 1, 1]
    assert found[0].status == "ok" and found.failed == [Result.of(cells[-1])]
    assert sorted(found.frame["cell_id"]) == sorted(one.cell_id for one in cells)
    lines = repr(found).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["native", "1"], ["expert_choice", "1"]]
    assert lines[-1] == str(folder / "report.html")
    page = found._repr_html_()
    assert page.count("<tr>") == 7 and "out_of_memory" in page and "1.39 [1.35, 1.42]" in page
