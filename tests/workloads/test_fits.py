"""workloads/fits.py: fits by hand, and fits that find what made a load."""

from __future__ import annotations

import numpy as np
import pytest

from moe_lab.workloads.fits import MOST_EXPONENT, concentration, drawn_counts, step_counts, zipf_exponent, zipf_shares


def test_steps_by_hand() -> None:
    """Tokens that do not fill a step are left out, unused slots do not count."""
    assert step_counts(np.array([[0, 1], [1, -1], [2, 0], [2, 1], [0, 1]]), 3, 2).tolist() == [[1, 2, 0], [1, 1, 2]]


def test_the_exponent_by_hand() -> None:
    """Shares of 1, 1/2, 1/3, 1/4 have exponent 1, in any order; even ones 0; one expert with all the largest."""
    assert zipf_exponent(np.array([6, 12, 3, 4])) == pytest.approx(1, abs=1e-9)
    assert zipf_exponent(np.array([7, 7, 7])) == pytest.approx(0, abs=1e-9)
    assert zipf_exponent(np.array([9, 0, 0])) == pytest.approx(MOST_EXPONENT, abs=0.1)


@pytest.mark.parametrize("exponent", [pytest.param(a, id=f"{a}") for a in (0.3, 0.8, 1.4)])
def test_the_fit_makes_the_load_that_it_was_fitted_to(exponent: float) -> None:
    """The exponent is found."""
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


def test_drawn_steps_have_the_mean_and_the_spread_of_what_they_are_fitted_to() -> None:
    """Steps that differ less than by chance have the mean shares."""
    rng = np.random.default_rng(1)
    counts_SE = rng.multinomial(500, rng.dirichlet(20 * zipf_shares(7, 1.0), 2000))
    drawn_SE = drawn_counts(counts_SE, 500, 2000, rng)
    assert (drawn_SE.sum(axis=1) == 500).all()
    assert drawn_SE.mean(axis=0) == pytest.approx(counts_SE.mean(axis=0), rel=0.1)
    assert concentration(drawn_SE) == pytest.approx(concentration(counts_SE), rel=0.15)
    even_SE = drawn_counts(np.tile(np.array([[10, 30]]), (9, 1)), 400, 2000, rng)
    assert even_SE.mean(axis=0) == pytest.approx([100, 300], rel=0.02)
    assert even_SE.std(axis=0) == pytest.approx([75**0.5] * 2, rel=0.1)  # of a binomial distribution
