"""cli/trace.py: `moe-lab trace` from the words to the file, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lab.cli.main import main
from moe_lab.records.trace import Trace
from tests import quick

MODEL = [f"model.path={quick.TINY_OLMOE}", f"workload.path={quick.TEXTS}", "device=cpu", "batch=2", "seq_len=16"]


def test_a_trace_is_recorded_and_written_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line says what is in it."""
    out = tmp_path / "new" / "x.trace"
    assert main(["trace", *MODEL, "--out", str(out), "--tokens", "64", "--guesses", "--predicted"]) == 0
    assert "64 tokens of 4 texts, 4 layers, 2 of 16 experts" in capsys.readouterr().out
    with Trace(out) as trace:
        assert trace.columns == ("weights", "margin", "ahead", "pre_attention")
        assert trace.token_columns == {"predicted": 1}
    assert main(["trace", str(out), "--to", "parquet", "--out", str(tmp_path / "x.parquet")]) == 0
    assert capsys.readouterr().err.startswith("not in the file: the manifest")
    assert main(["import", "parquet", str(tmp_path / "x.parquet"), "-o", str(tmp_path / "y.trace")]) == 0
    with Trace(tmp_path / "y.trace") as again:
        assert again.columns == ("weights", "margin", "ahead", "pre_attention") and "predicted" in again.token_columns
    assert main(["trace", str(out), "--to", "vllm", "--out", str(tmp_path / "x.npy")]) == 0
    left_out = "predicted, weights, margin, ahead, pre_attention, and the manifest: the format has routes only\n"
    assert capsys.readouterr().err.endswith(left_out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param([*MODEL, "measure.quality=false"], "moe-lab trace only uses", id="other-key"),
        pytest.param([*MODEL, "--tokens", "0"], "--tokens 0: must be", id="tokens"),
        pytest.param(["model.path=nowhere", "workload.path=x"], "model.path=nowhere", id="model"),
        pytest.param([*MODEL[:1], "workload.path=nowhere"], "workload.path=nowhere: file or folder", id="text"),
        pytest.param(["x.trace"], "to write a trace as another format, add --to", id="no-override"),
        pytest.param(["nowhere.trace", "--to", "parquet"], "nowhere.trace: not a trace that can be read", id="file"),
        pytest.param(["a", "b", "--to", "parquet"], "takes one trace, not 2 words", id="two"),
        pytest.param(["a", "--to", "parquet", "--logits"], "remove the other options", id="logits"),
        pytest.param(["a", "--to", "parquet", "--predicted"], "remove the other options", id="predicted-of-a-trace"),
        pytest.param(["a", "--to", "parquet", "--routes", "2"], "remove the other options", id="routes-of-a-trace"),
        pytest.param([*MODEL, "--routes", "-1"], "--routes -1: must be an integer of 0 to", id="routes"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and no file."""
    assert main(["trace", *words, "--out", str(tmp_path / "x.trace")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.trace").exists()


def test_the_file_to_write_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And is not a folder."""
    assert main(["trace", *MODEL]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["trace", *MODEL, "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
