"""results/panels.py: what plots and page share; charts are tested in test_charts.py."""

from __future__ import annotations

import pytest

from moe_lab.results.panels import Chart, Panel, Series, is_log, log_ticks


@pytest.mark.parametrize(
    ("low", "high"),
    [
        pytest.param(3.0, 27.0, id="under_a_decade"),
        pytest.param(0.011, 0.09, id="within_a_decade"),
        pytest.param(1.0, 8.0, id="the_least"),
        pytest.param(2.0, 80.0, id="over_one"),
        pytest.param(5.0, 8000.0, id="three"),
        pytest.param(1e-3, 1e3, id="six"),
        pytest.param(1e-9, 1e3, id="twelve"),
    ],
)
def test_a_logarithmic_axis_has_three_to_fifteen_labels(low: float, high: float) -> None:
    """All within it, rising, none written like another; up to five decades also between the powers of ten."""
    ticks = log_ticks(low, high)
    assert is_log([low, high]) and 3 <= len(ticks) <= 15
    assert ticks == sorted(ticks) and low <= ticks[0] and ticks[-1] <= high
    assert len({f"{tick:,g}" for tick in ticks}) == len(ticks)
    assert high / low > 2e6 or any(f"{tick:e}"[0] != "1" for tick in ticks)


def test_a_panel_lacks_an_interval_only_where_there_could_be_one() -> None:
    """Throughput has none anywhere."""
    bare = Panel("", [Series("v", [1, 2], [1.0, 2.0], [None, 1.9], [None, 2.1], ["", ""])])
    whole = Panel("", [Series("v", [1], [1.0], [0.9], [1.1], [""])])
    chart = Chart("c", "lines", "", "", "", [bare, whole], has_intervals=True)
    assert chart.lacks(bare) and not chart.lacks(whole)
    assert not chart._replace(has_intervals=False).lacks(bare)
