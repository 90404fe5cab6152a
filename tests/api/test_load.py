"""api/load.py: records as pandas, which show what counts."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

import moe_lab
from moe_lab.results.load import load
from tests.cli.test_table import sweep
from tests.results.compared import record, write


def test_it_is_pandas_that_shows_the_tables_columns(tmp_path: Path) -> None:
    """All columns are there; latency, ratio and quality are shown with their intervals."""
    folder = write(tmp_path / "s", *sweep(8, 1))
    found = moe_lab.load(folder)
    pd.testing.assert_frame_equal(pd.DataFrame(found), load(folder))
    lines = repr(found).splitlines()
    assert lines[0].split()[:3] == ["variant", "batch", "seq_len"] and len(lines) == 8
    assert "20 ms [19.6, 20.4]" in lines[2] and "1.39 [1.35, 1.42]" in lines[2] and "+0.70 [0.64, 0.76]" in lines[2]
    assert lines[-1] == f"6 runs, {len(found.columns)} columns: .columns lists them"
    page = found._repr_html_()
    assert page.count("<tr>") == 7 and "1.39 [1.35, 1.42]" in page and lines[-1] in page


def test_a_selection_is_plain_pandas(tmp_path: Path) -> None:
    """Its columns are shown as pandas shows them; so is what has not the columns of the table, or no row."""
    found = moe_lab.load(write(tmp_path / "s", *sweep(1)))
    assert type(found[["variant", "batch"]]) is pd.DataFrame and type(found[found["batch"] > 1]) is pd.DataFrame
    (tmp_path / "empty").mkdir()
    assert len(moe_lab.load(tmp_path / "empty")) == 0 and "Columns: [" in repr(moe_lab.load(tmp_path / "empty"))


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    """A failed run beside another; nothing of what nobody measured is a column."""
    found = moe_lab.load(write(tmp_path / "s", record(1.0), record(config={"batch": 3}, status="failed", reason="?")))
    lines = repr(found).splitlines()
    assert "ratio" not in lines[0] and lines[2].split() == ["sinkhorn", "3", "14", "-", "failed"]
