"""cli/analyze.py: `moe-lab analyze` from the words to the page."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from moe_lab.analyses.analyze import ANALYSES
from moe_lab.cli.main import main
from tests.analyses import steps, traces


@pytest.mark.slow
def test_the_sentences_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And where the rest lies; what is too small is said on standard error."""
    path = traces.random(tmp_path / "x.trace", 8, 20)
    assert main(["analyze", str(path), "analysis/placement=null", "unique_experts.batch=1,64"]) == 0
    said = capsys.readouterr()
    assert "A cache of 8 of 16 experts a layer holds" in said.out and f"{tmp_path / 'x.analysis'}: " in said.out
    assert "too few or too short sequences" in said.err
    titles = [line for line in said.out.splitlines() if not line.startswith(("  ", str(tmp_path)))]
    assert "A cache of experts" in titles and "Other routes at the same cost" not in titles  # it has nothing to say
    assert (tmp_path / "x.analysis" / "analysis.html").exists()


def test_the_configuration_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a trace."""
    assert main(["analyze", "--cfg", "expert_cache.capacity=3,4"]) == 0
    assert "capacity:\n  - 3\n  - 4\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param([], "takes one trace, not 0", id="no-trace"),
        pytest.param(["a", "b"], "takes one trace, not 2", id="two"),
        pytest.param(["nowhere.trace"], "nowhere.trace: not a trace that can be read (No such file", id="file"),
        pytest.param(["a", "phase=decode", "phase=prefill"], "phase is given twice", id="twice"),
        pytest.param(["a", "expert_cache.polic=lru"], "Did you mean policy", id="key"),
        pytest.param(["a", "analysis/expert_cache=lur"], "lur", id="option"),
        pytest.param(["a", "analysis=[]"], "analysis=[]: each analysis is a group of its own; write", id="no-group"),
        pytest.param(["a", "analysis=null"], "or analysis/NAME=null to leave it out. NAME is one of exp", id="null"),
        pytest.param(["a", "~analysis"], "~analysis: each analysis is a group of its own", id="without"),
        pytest.param(["a", "analysis/plcement=null"], "Did you mean placement?", id="group"),
        pytest.param(["a", "analysis.ranks=null"], "analysis.ranks=null: each analysis is a group", id="dot"),
        pytest.param(
            ["a", "ranks=x"], "ranks=x: ranks has keys; write analysis/ranks=OPTION, or ranks.KEY=", id="node"
        ),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2."""
    assert main(["analyze", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_time_from_measured_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of rates and a decode run in the place of numbers: 1 MB an expert at 0.5 GB/s, 3 ms of computation."""
    path = traces.random(tmp_path / "x.trace", 8, 20)
    rates = {"disk": {"gb_per_s": 0.5, "reason": None, "of": "a disk"}}
    (tmp_path / "rates.json").write_text(json.dumps({"rates": rates}))
    steps.write(tmp_path, 1, 1, 3.0)
    words = [f"expert_cache.rates={tmp_path / 'rates.json'}", f"expert_cache.decode_run={tmp_path / '1-1'}"]
    words += [f"analysis/{name}=null" for name in ANALYSES if name != "expert_cache"]
    words += ["expert_cache.policy=lru", "expert_cache.capacity=8", "expert_cache.scope=layer"]
    assert main(["analyze", str(path), *words, "expert_cache.link=disk"]) == 0
    assert "at 0.5 GB/s, with 3 ms of computation" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "x.analysis" / "expert_cache.csv")
    plain = table[table["prefetch"] == "none"]
    assert (plain["ms_per_token"] - (3 + plain["misses_per_token"] / 0.5)).abs().max() < 1e-9
    assert main(["analyze", str(path), *words]) == 2
    assert "not a file of rates (KeyError('host_to_device'))" in capsys.readouterr().err
