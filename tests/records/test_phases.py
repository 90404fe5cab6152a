"""records/phases.py: milliseconds where they agree with the latency, shares everywhere."""

from __future__ import annotations

import pytest

from moe_lab.records.phases import AGREES, split

MEASURED = {"execution": "eager", "router": 2.0, "experts": 5.0, "attention": None, "other": 3.0}
WHOLE = {**MEASURED, "sum_ms": 10.0, "launch_gap_ms": 1.0}


@pytest.mark.parametrize(
    ("p50_ms", "agrees"),
    [
        pytest.param(10.0, True, id="equal"),
        pytest.param(10 / (1 + AGREES) * 1.001, True, id="just_longer"),
        pytest.param(10 / (1 - AGREES) * 0.999, True, id="just_shorter"),
        pytest.param(10 / (1 + AGREES) * 0.999, False, id="longer"),
        pytest.param(10 / (1 - AGREES) * 1.001, False, id="shorter"),
        pytest.param(1.22, False, id="eight_times_as_long"),
        pytest.param(float("nan"), False, id="not_timed"),
    ],
)
def test_milliseconds_only_where_they_agree(p50_ms: float, agrees: bool) -> None:
    """What is said of the whole pass stays, so that it can be seen why."""
    phases_ms, shares = split(WHOLE, p50_ms)
    assert shares == {"router": 0.2, "experts": 0.5, "attention": None, "other": 0.3}
    assert phases_ms == (WHOLE if agrees else {**WHOLE, "router": None, "experts": None, "other": None})
