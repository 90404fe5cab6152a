"""cli/import_trace.py: `moe-lab import` from the words to the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_lab.cli.main import main
from moe_lab.records.trace import Trace


def test_several_files_are_one_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sequence each; what is missing is said."""
    for number, n in enumerate((3, 2)):
        np.save(tmp_path / f"{number}.npy", np.tile(np.array([[1, 4], [3, 0]], np.int16), (n, 1, 1)))
    words = [str(tmp_path / "0.npy"), str(tmp_path / "1.npy"), "--out", str(tmp_path / "x.trace"), "--n-experts", "5"]
    assert main(["import", "vllm", *words]) == 0
    said = capsys.readouterr()
    assert "5 tokens, 2 layers, 2 of 5 experts" in said.out and "not in the trace: weights" in said.err
    with Trace(tmp_path / "x.trace") as trace:
        assert trace.tokens().sequence.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["vlm", "x"], "unknown format; choose one of vllm, sglang", id="format"),
        pytest.param(["vllm", "x"], "x: No such file or directory; give a file of vllm", id="file"),
        pytest.param(["vllm", "x", "--top-k", "0"], "--top-k 0: must be", id="top-k"),
        pytest.param(["vllm"], "FILE", id="no-file"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2."""
    assert main(["import", *words, "--out", str(tmp_path / "x.trace")]) == 2
    assert message in capsys.readouterr().err
