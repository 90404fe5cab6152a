"""cli/allocate.py: `moe-lab allocate` from the words to a list that can be typed, and mistakes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import moe_lab
from moe_lab.cli.main import main
from tests import quick

MODEL = [f"model.path={quick.TINY_OLMOE}", "device=cpu"]


@pytest.mark.parametrize(
    ("texts", "rows"),
    [
        pytest.param([], "of noise, N(0, 1), 32 tokens", id="noise"),
        pytest.param(["seq_len=16", f"workload.path={quick.TEXTS}"], "of the texts, 32 tokens", id="texts"),
    ],
)
def test_a_list_is_found_that_a_run_takes(texts: list[str], rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is printed; a budget of 7 takes an expert from one layer."""
    assert main(["allocate", *MODEL, *texts, "--tokens", "32", "--budget", "7,5"]) == 0
    out = capsys.readouterr().out
    assert rows in out and "k = 1" in out
    lists = re.findall(r"model\.top_k=\[[\d,]+\]", out)
    found = [list(moe_lab.compose(["model=checkpoint", *MODEL, word]).model.top_k) for word in lists]
    assert [sorted(ks) for ks in found] == [[1, 2, 2, 2]] * 2 + [[1, 1, 1, 2]] * 2
    assert "least sum of distances" in out and "least sum of lost shares" in out


def test_a_text_that_is_too_short_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is left out."""
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "long.txt").write_text("the long text " * 20)
    assert main(["allocate", *MODEL, f"workload.path={tmp_path}", "seq_len=64", "--tokens", "64"]) == 0
    assert "left out: short: shorter than one window" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--budget", "3"], "--budget 3: must be >= 4", id="too-few"),
        pytest.param(["--budget", "8"], "< 8, the model's", id="nothing-to-take"),
        pytest.param(["--budget", "6.5"], "--budget 6.5: must be integers", id="no-integer"),
        pytest.param(["--tokens", "0"], "--tokens 0: must be", id="tokens"),
        pytest.param(["measure.quality=false"], "moe-lab allocate only uses", id="other-key"),
        pytest.param(["workload.path=nowhere"], "workload.path=nowhere: file or folder", id="text"),
        pytest.param(["model.top_k=1"], "none can have fewer", id="one"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2."""
    assert main(["allocate", *MODEL, *words]) == 2
    assert message in capsys.readouterr().err
