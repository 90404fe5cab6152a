"""results/contest.py: who surely loses against whom."""

from __future__ import annotations

import math

import pytest

from moe_lab.results import contest
from moe_lab.results.contest import Cell, Quality

NAN = math.nan


def cell(variant: str, low: float, high: float, quality: Quality | None = None) -> Cell:
    """Timed beside the anchor with this interval."""
    return Cell(variant, low == high == 1, ((low + high) / 2, low, high), quality, True, variant)


def bits(value: float, half: float = 0.05, native: float = 2.0) -> Quality:
    """So many bits per byte more than with the native router."""
    return Quality("delta", value, value - half, value + half, native)


@pytest.mark.parametrize(
    ("cells", "fastest"),
    [
        pytest.param([cell("anchor", 1, 1), cell("b", 1.2, 1.3)], ["anchor"], id="slower"),
        pytest.param([cell("anchor", 1, 1), cell("b", 0.7, 0.8)], ["b"], id="faster"),
        pytest.param([cell("anchor", 1, 1), cell("b", 1.001, 1.02)], ["anchor", "b"], id="within_3_percent"),
        pytest.param([cell("anchor", 1, 1), cell("b", 0.8, 1.3)], ["anchor", "b"], id="not_known"),
        pytest.param([cell("anchor", 1, 1), cell("b", 0.6, 0.7), cell("c", 0.65, 0.8)], ["b", "c"], id="overlap"),
        pytest.param(
            [cell("anchor", 1, 1), cell("b", 0.5, 1.5), cell("c", 0.7, 0.8)],
            ["b", "c"],
            id="a_wide_one_ties_with_the_best",
        ),
    ],
)
def test_the_fastest_are_those_not_surely_slower_than_another(cells: list[Cell], fastest: list[str]) -> None:
    """By the intervals alone."""
    assert [one.variant for one in contest.fastest(cells)] == fastest


@pytest.mark.parametrize(
    ("a", "b", "worse"),
    [
        pytest.param(bits(1.0), bits(0.0), True, id="far"),
        pytest.param(bits(0.0), bits(1.0), False, id="better"),
        pytest.param(bits(0.08), bits(0.0), False, id="intervals_overlap"),
        pytest.param(bits(0.008, 0.001), bits(0.0, 0.0), False, id="too_little_to_matter"),
        pytest.param(bits(0.5, NAN), bits(0.0), False, id="no_interval"),
        pytest.param(Quality("error", 0.2, NAN, NAN, 1e-6), Quality("error", 2e-6, NAN, NAN, 1e-6), True, id="error"),
        pytest.param(
            Quality("error", 2e-6, NAN, NAN, 1e-6), Quality("error", 0.0, NAN, NAN, 1e-6), False, id="rounding"
        ),
    ],
)
def test_worse_is_surely_worse(a: Quality, b: Quality, worse: bool) -> None:
    """And by as much as matters."""
    assert a.is_worse_than(b) is worse


def test_predictions_collapse_from_a_quarter_more_bits_on() -> None:
    """Of what the native router needs; a small loss does not."""
    assert bits(0.5).has_collapsed and not bits(0.4).has_collapsed
    assert not Quality("bits", 9.0, 8.9, 9.1, NAN).has_collapsed


def test_nobody_predicts_best_where_it_was_not_measured_for_all() -> None:
    """Or not in the same way."""
    known, unknown = cell("a", 1, 1, bits(0.0)), cell("b", 0.7, 0.8)
    assert contest.best([known, unknown]) == []
    assert contest.best([known, cell("b", 0.7, 0.8, Quality("error", 0.1, NAN, NAN, NAN))]) == []
    assert contest.best([known, cell("b", 0.7, 0.8, bits(1.0))]) == [known]
