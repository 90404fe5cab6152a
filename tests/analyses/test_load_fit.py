"""analyses/load_fit.py: fits by hand, and fits that find what made a load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_lab.analyses import load_fit
from moe_lab.analyses.load_fit import concentration, fullest, zipf_exponent, zipf_shares
from moe_lab.workloads import loads
from tests.analyses import traces


def test_the_exponent_by_hand() -> None:
    """Shares of 1, 1/2, 1/3, 1/4 have exponent 1, in any order; even ones 0; one expert with all the largest."""
    assert zipf_exponent(np.array([6, 12, 3, 4])) == pytest.approx(1, abs=1e-9)
    assert zipf_exponent(np.array([7, 7, 7])) == pytest.approx(0, abs=1e-9)
    assert zipf_exponent(np.array([9, 0, 0])) == pytest.approx(load_fit._MOST_EXPONENT, abs=0.1)


@pytest.mark.parametrize("exponent", [pytest.param(a, id=f"{a}") for a in (0.3, 0.8, 1.4)])
def test_the_fit_makes_the_load_that_it_was_fitted_to(exponent: float) -> None:
    """The shares are those of `workload.load=zipf`."""
    assert np.array_equal(zipf_shares(37, exponent), loads.zipf_shares(37, exponent))
    counts_E = np.random.default_rng(0).multinomial(200_000, zipf_shares(37, exponent))
    assert zipf_exponent(counts_E) == pytest.approx(exponent, abs=0.02)


def test_the_concentration_by_hand() -> None:
    """Two experts, ten slots a step, shares of 0.3 and 0.7 in turn: rho = 2 / 39 * 2 / 0.5 of 40 steps, n = 10."""
    counts_SE = np.tile(np.array([[3, 7], [7, 3]]), (20, 1))
    rho = 2 * (0.04 * 40 / 39) / 0.5
    assert concentration(counts_SE) == pytest.approx(10 * (1 - rho) / (10 * rho - 1))
    assert concentration(np.tile(np.array([[5, 5]]), (9, 1))) is None  # less than by chance


def test_the_concentration_is_found() -> None:
    """Of drawn steps, within a tenth."""
    rng = np.random.default_rng(0)
    m_E = zipf_shares(16, 0.5)
    counts_SE = rng.multinomial(500, rng.dirichlet(20 * m_E, 3000))
    found = concentration(counts_SE)
    assert found == pytest.approx(20, rel=0.1)


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
