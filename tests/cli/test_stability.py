"""cli/stability.py: `moe-lab stability` from the words to the page, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from moe_lab.cli.main import main
from tests import quick

MODEL = [f"model.path={quick.TINY_OLMOE}", f"workload.path={quick.TEXTS}", "device=cpu", "batch=2", "seq_len=16"]


def test_variants_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each; one that is not here has its reason, and one that repeats the first changes nothing."""
    out, variants = tmp_path / "o", ["batch=2", "experts=loop batch=1", "dtype=fp16"]
    assert main(["stability", *MODEL, "--tokens", "64", "--out", str(out), "--variants", *variants]) == 0
    said = capsys.readouterr().out
    assert "against model: tiny-olmoe, router: native, dtype: fp32, batch: 2, device: cpu, router by: torch" in said
    assert "64 tokens in 4 windows" in said and "dtype=fp16: unavailable: dtype=fp16: not supported" in said
    table = pd.read_csv(out / "stability.csv").set_index("variant")
    assert table.index.tolist() == variants and table["same"]["batch=2"] == 1 and table["kl_nats"]["batch=2"] == 0
    assert "experts: loop" in table["implementation"]["experts=loop batch=1"]
    assert table["reason"].isna().tolist() == [True, True, False]
    page = (out / "analysis.html").read_text()
    assert "0 of 2 variants change routes" in page and "dtype=fp16: not compared (unavailable" in page
    assert len(pd.read_parquet(out / "stability_layers.parquet")) == 2 * 4


@pytest.mark.slow
def test_a_batch_that_takes_more_tokens_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The windows are a multiple of each batch; nothing is said where about as many as asked for are that."""
    words = ["stability", *MODEL, "--out", str(tmp_path / "o"), "--variants", "batch=3"]
    assert main([*words, "--tokens", "40"]) == 0
    said = capsys.readouterr()
    assert "--tokens 40: 96 are computed, for batches of 2, 3 take a multiple of 6 windows of 16 tokens" in said.err
    assert "96 tokens in 6 windows" in said.out
    assert main([*words, "--tokens", "100"]) == 0
    assert "--tokens" not in capsys.readouterr().err


def test_one_that_fails_is_a_row_and_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another model."""
    other = f"model.path={quick.ASSETS / 'tiny-qwen3-moe'}"
    assert main(["stability", *MODEL, "--tokens", "32", "--out", str(tmp_path / "o"), "--variants", other]) == 1
    assert f"{other}: error: it has other layers of experts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param([], "required: --variants", id="none"),
        pytest.param(["--variants", "seq_len=8"], "seq_len=8: has no effect; a variant only uses", id="other-tokens"),
        pytest.param(["--variants", "batch=0"], "batch=0", id="value"),
        pytest.param(["--variants", "batch=1", "batch=1"], "--variants: batch=1 is given twice", id="twice"),
        pytest.param(["--variants", "batch=1 batch=4"], "batch is given twice", id="twice-in-one"),
        pytest.param(["--variants", "model.path=nowhere"], "model.path=nowhere", id="model"),
        pytest.param(["--variants", "dtype=fp8"], "fp8", id="option"),
        pytest.param(["--variants", "batch='1"], "batch='1: No closing quotation", id="quote"),
        pytest.param(["--variants", " "], "--variants: a variant has no words", id="empty"),
        pytest.param(["--tokens", "0", "--variants", "batch=1"], "--tokens 0: must be", id="tokens"),
        pytest.param(["measure.quality=false", "--variants", "batch=1"], "moe-lab stability only uses", id="other-key"),
        pytest.param(["execution=compile", "--variants", "batch=1"], "put it among the variants", id="execution"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and no folder."""
    assert main(["stability", *MODEL, "--out", str(tmp_path / "o"), *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_file_is_not_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is computed, and the file stays."""
    (tmp_path / "o").write_text("mine")
    assert main(["stability", *MODEL, "--out", str(tmp_path / "o"), "--variants", "batch=1"]) == 2
    assert "is a file; give the path of a folder" in capsys.readouterr().err
    assert (tmp_path / "o").read_text() == "mine"
