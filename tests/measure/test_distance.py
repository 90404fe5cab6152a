"""measure/distance.py: the relative error of an output, in one piece and in several."""

from __future__ import annotations

import math

import pytest
import torch

from moe_lab.measure.distance import Distance, relative_error


@pytest.mark.parametrize(
    ("y", "reference", "error"),
    [
        pytest.param([3.0, 4.0], [3.0, 4.0], 0.0, id="equal"),
        pytest.param([3.0, 4.0], [0.0, 0.0], float("inf"), id="of_nothing"),
        pytest.param([0.0, 0.0], [0.0, 0.0], 0.0, id="nothing_of_nothing"),
        pytest.param([3.0, 9.0], [3.0, 4.0], 1.0, id="as_large_as_the_reference"),
        pytest.param([float("nan"), 4.0], [3.0, 4.0], float("inf"), id="nan"),
        pytest.param([float("inf"), 4.0], [3.0, 4.0], float("inf"), id="inf"),
        pytest.param([], [], 0.0, id="empty"),
    ],
)
def test_relative_error_is_of_the_norms(y: list[float], reference: list[float], error: float) -> None:
    """Never NaN: what cannot be compared is infinitely wrong."""
    assert relative_error(torch.tensor(y), torch.tensor(reference)) == error


def test_pieces_add_up_to_the_whole() -> None:
    """The relative error of all pieces together, and the largest difference in any; NaN stays."""
    generator = torch.Generator().manual_seed(0)
    y, reference = torch.randn(2, 37, 5, generator=generator)
    distance = Distance()
    for rows in (slice(0, 1), slice(1, 30), slice(30, 37), slice(0, 0)):
        distance.add(y[rows], reference[rows])
    assert distance.relative() == pytest.approx(relative_error(y, reference))
    assert distance.largest == pytest.approx(float((y.double() - reference.double()).abs().max()))
    distance.add(torch.tensor([math.nan]), torch.zeros(1))
    distance.add(torch.tensor([100.0]), torch.zeros(1))
    assert math.isnan(distance.largest) and distance.relative() == math.inf
