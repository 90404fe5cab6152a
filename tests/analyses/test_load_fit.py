"""analyses/load_fit.py: what a fit makes of a trace, beside the trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_lab.analyses import load_fit
from moe_lab.analyses.load_fit import fullest
from tests.analyses import traces


def test_the_fullest_by_hand() -> None:
    """Over the mean of its step."""
    assert fullest(np.array([[4, 0], [1, 1], [3, 1]])).tolist() == [2, 1, 1.5]


def test_the_sentences_compare_fits_with_the_trace(tmp_path: Path) -> None:
    """And a trace of one step has none."""
    path = traces.random(tmp_path / "x.trace", 40, 32)
    findings = traces.found(path, load_fit, {"step_tokens": 64})
    table = findings.tables["load_fit"]
    assert table["steps"].tolist() == [20, 20] and table["zipf_exponent"].between(0.05, 2).all()
    assert (table["fullest_dirichlet"] / table["fullest"]).between(0.8, 1.25).all()
    assert f"{table['fullest'].mean():.2f}" in findings.sentences[1]
    assert "workload.zipf_exponent" in findings.sentences[0]
    assert "fewer than two steps" in traces.found(path, load_fit, {"step_tokens": 5000}).notes[0]
