"""api/report.py: tables, plots and page of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

import moe_lab
from tests.results.compared import record, write


def test_the_page_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And its path returned; standard output is the caller's."""
    page = moe_lab.report(str(write(tmp_path / "s", record(1.0))))
    assert page == tmp_path / "s" / "report.html" and page.is_file() and (tmp_path / "s" / "runs.csv").is_file()
    assert capsys.readouterr().out == ""


def test_a_folder_without_records_is_a_mistake(tmp_path: Path) -> None:
    """Or one that is not there."""
    with pytest.raises(ValueError, match="no readable records"):
        moe_lab.report(tmp_path)
    with pytest.raises(ValueError, match="folder not found"):
        moe_lab.report(tmp_path / "nowhere")
