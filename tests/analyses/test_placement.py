"""analyses/placement.py: what is seen comes before what is judged; loads and recoveries by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_lab.analyses import placement
from moe_lab.analyses.findings import Findings
from moe_lab.analyses.placement import points
from tests.analyses import traces

CFG: dict[str, Any] = {
    "plan": ["contiguous", "greedy"],
    "ranks": [2],
    "copies": None,
    "step_tokens": 2,
    "window": [1],
    "age": [0],
    "horizon": 1,
}


def found(path: Path, **changes: Any) -> Findings:
    return traces.found(path, placement, CFG | changes)


def test_a_plan_that_comes_too_late(tmp_path: Path) -> None:
    """Four experts on two ranks, a token uses two. Even steps use 0 and 1, odd ones 0 and 2.

    Contiguous, 0 and 1 are together: steps of (4, 0) and (2, 2). A greedy plan has the two experts of the step that it
    saw apart, and each of the two others with one of them, 2 or 1 with 0: so the next step has (4, 0), always.
    """
    path = traces.write(tmp_path / "x.trace", [[[0, 1], [0, 1], [0, 2], [0, 2]] * 4], 4)
    table = found(path).tables["placement"].set_index("plan")
    assert table["points"].tolist() == [7, 7]
    # Contiguous, from step 1 on: 2 4 2 4 2 4 2 at the fullest, a mean of 2.
    assert table["load"]["contiguous"] == pytest.approx(20 / 14)
    assert table["load"]["greedy"] == pytest.approx(28 / 14) and table["oracle_load"]["greedy"] == 1
    assert table["recovery"]["greedy"] == pytest.approx((20 - 28) / (20 - 14))
    # From two steps it has seen that 0 is the heaviest, and puts 1 and 2 with the other rank.
    longer = found(path, window=[2]).tables["placement"].set_index("plan")
    assert longer["load"]["greedy"] == 1 and longer["recovery"]["greedy"] == 1


def test_the_age_says_which_load_is_seen(tmp_path: Path) -> None:
    """For four steps 0 and 1 are used, for four 0 and 2, in turn, on two ranks.

    A plan has the two that it saw apart and the third with 0. So one of the four steps before has all slots of the next
    four on one rank, and one of the four steps before those, which were alike, has half of them.
    """
    path = traces.write(tmp_path / "x.trace", [([[0], [1]] * 4 + [[0], [2]] * 4) * 6], 4)
    table = found(path, age=[0, 4], window=[4], horizon=4).tables["placement"].set_index(["plan", "age"])
    assert table["load"]["greedy", 0] == 2 and table["load"]["greedy", 4] == 1
    assert (table["oracle_load"].drop("contiguous") == 1).all()


def test_points_by_hand() -> None:
    """Every horizon, from the first for which the longest window lies in the trace."""
    assert points(10, CFG | {"window": [2, 3], "age": [0, 1], "horizon": 2}) == [4, 6, 8]


def test_what_a_trace_is_too_short_for_is_said(tmp_path: Path) -> None:
    """How many tokens it would need."""
    path = traces.write(tmp_path / "x.trace", [[[0], [1], [2]]], 4)
    findings = found(path, window=[8])
    assert not findings.tables and "has 3 tokens, and window, age and horizon need 18" in findings.notes[0]
    assert found(traces.random(tmp_path / "y.trace", 4, 40), ranks=[99]).notes


def test_the_sentences_say_what_a_plan_recovers(tmp_path: Path) -> None:
    """Beside the contiguous placement and an older load."""
    path = traces.random(tmp_path / "x.trace", 40, 32)
    changes = {"plan": ["contiguous", "greedy", "eplb", "unique"], "step_tokens": 16, "window": [4], "age": [0, 8]}
    findings = found(path, horizon=4, **changes)
    table = findings.tables["placement"]
    assert sorted(set(table["copies"])) == [0, 2, 4]
    assert (table["oracle_load"] <= table["load"] + 1e-9)[table["plan"] == "greedy"].all()
    best = table[(table["window"] > 0) & (table["age"] == 0)].sort_values("load").iloc[0]
    assert f"{best['plan']}" in findings.sentences[0] and f"{best['load']:.2f}" in findings.sentences[0]
    assert "if it knew the load to come" in findings.sentences[1] and "8 steps old" in findings.sentences[2]
    (plot,) = findings.plots
    assert {line.name for line in plot.lines} == {"contiguous", "greedy", "eplb", "unique"}
