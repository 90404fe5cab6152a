"""records/observations.py: what a run was asked to look at."""

from __future__ import annotations

from typing import Any

import pytest

from moe_lab.records.observations import ASKED, asked, differing, lacking

ROUTER, OTHER = {"_target_": "a.B", "top_k": 2}, {"_target_": "a.B", "top_k": 4}


@pytest.mark.parametrize(
    ("wanted", "recorded", "expected"),
    [
        pytest.param({"energy": True}, {"energy": False}, ["energy"], id="more"),
        pytest.param({"energy": True}, {}, ["energy"], id="key_is_younger_than_the_record"),
        pytest.param({"energy": False}, {"energy": True, "profile": True}, [], id="less"),
        pytest.param({"reference_router": ROUTER}, {"reference_router": ROUTER}, [], id="same_router"),
        pytest.param({"reference_router": ROUTER}, {"reference_router": OTHER}, ["reference_router"], id="other"),
        pytest.param({"reference_router": None}, {"reference_router": OTHER}, [], id="no_router"),
        pytest.param({"profile": True, "routing": True}, {}, ["routing", "profile"], id="several"),
        pytest.param({"max_time_s": 3, "target_ci": 0.1}, {"max_time_s": 1}, [], id="how_long_is_no_observation"),
    ],
)
def test_what_is_lacking(wanted: dict[str, Any], recorded: dict[str, Any], expected: list[str]) -> None:
    """By the configurations: what could not be had was asked for all the same."""
    assert lacking({"measure": wanted}, {"measure": recorded}) == expected


def test_a_record_without_a_configuration_lacks_everything() -> None:
    """As of a run that failed before it was composed."""
    assert lacking({"measure": dict.fromkeys(ASKED, True)}, {}) == list(ASKED)
    assert asked({}) == {}


def test_differing_is_symmetric() -> None:
    """In the order of the keys."""
    one, other = {"measure": {"energy": True, "quality": True}}, {"measure": {"routing": True, "quality": True}}
    assert differing(one, other) == differing(other, one) == ["routing", "energy"]
