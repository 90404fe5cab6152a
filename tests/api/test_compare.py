"""api/compare.py: what `moe-lab compare` prints, as a frame; and its gate (results/gate.py)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import moe_lab
from moe_lab.api.compare import Comparison
from moe_lab.cli.compare import to_terminal
from moe_lab.results.compare import COLUMNS, compare
from tests.results.compared import five_cells, record, write


@pytest.fixture
def compared(tmp_path: Path) -> Comparison:
    a, b = five_cells(tmp_path)
    return moe_lab.compare(str(a), b, floors={})


def test_it_is_the_frame_with_the_command_lines_words(
    compared: Comparison,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every column; shown as the table; what is selected from it is plain pandas."""
    plain = compare(tmp_path / "a", tmp_path / "b", floors={})
    pd.testing.assert_frame_equal(pd.DataFrame(compared), plain)
    to_terminal(plain)
    assert repr(compared) == capsys.readouterr().out.rstrip("\n")
    assert "slower" in compared._repr_html_() and compared.summary.startswith("1 slower, 1 faster, 1 same")
    assert list(compared) == list(COLUMNS) and type(compared[compared["verdict"] == "slower"]) is pd.DataFrame


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        pytest.param("slower", 1, "1 of 5 rows match (1 slower)", id="slower"),
        pytest.param("slower,failed", 1, "2 of 5 rows match (1 slower, 1 failed)", id="two"),
        pytest.param("inconclusive", 0, "passed, but 2 of 5 rows were not judged", id="passed"),
    ],
)
def test_the_gate(compared: Comparison, words: str, code: int, why: str) -> None:
    """True if it passed."""
    gate = compared.gate(words)
    assert (bool(gate), gate.code) == (code == 0, code) and gate.why.startswith(why)


def test_a_gate_that_judges_nothing_does_not_pass(tmp_path: Path) -> None:
    """One replicate on each side."""
    found = moe_lab.compare(write(tmp_path / "a", record(1.0)), write(tmp_path / "b", record(1.0)), floors={})
    gate = found.gate()
    assert not gate and gate.code == 3 and gate.why.startswith("nothing was judged (1 inconclusive)")


def test_a_mistake(compared: Comparison, tmp_path: Path) -> None:
    """In a word, a folder, a threshold."""
    with pytest.raises(ValueError, match=r"^fail_on=slow: slow is not one of slower"):
        compared.gate("slow")
    with pytest.raises(ValueError, match="folder not found"):
        moe_lab.compare(tmp_path / "a", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^threshold=3: must be between 0 and 1"):
        moe_lab.compare(tmp_path / "a", tmp_path / "b", threshold=3)
