"""analyses/speculation.py: times of steps joined with a trace, by hand, and folders that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_lab.analyses import speculation
from moe_lab.analyses.speculation import accepted, cells
from tests.analyses import traces
from tests.analyses.steps import write


def test_accepted_tokens() -> None:
    """1 + 1/2 + 1/4, one more for each accepted in a row; all; none but the model's own."""
    assert accepted(0.5, 3) == pytest.approx(1.75)
    assert accepted(1.0, 4) == 4 and accepted(0.9, 1) == pytest.approx(1)


@pytest.mark.parametrize(
    ("acceptance", "drafted", "speed"),
    [
        pytest.param(0.6, 2, 1.96, id="0.6-2"),
        pytest.param(0.7, 3, 2.53, id="0.7-3"),
        pytest.param(0.8, 2, 2.44, id="0.8-2"),
        pytest.param(0.8, 5, 3.69, id="0.8-5"),
        pytest.param(0.9, 2, 2.71, id="0.9-2"),
        pytest.param(0.9, 10, 6.86, id="0.9-10"),
    ],
)
def test_published_speed_ups(acceptance: float, drafted: int, speed: float) -> None:
    """Table 1 of Leviathan et al., 2211.17192: drafting costs nothing, and a step takes as long as one token."""
    assert accepted(acceptance, drafted + 1) == pytest.approx(speed, abs=0.005)


def test_a_case_by_hand(tmp_path: Path) -> None:
    """T 2 and 4 ms, in rounds 2.5 apart: efficiency 0.4; acceptance 0.5 gives 1.5 tokens, drafting one takes 1 ms."""
    one = write(tmp_path / "r", 1, 1, 2.0)
    write(tmp_path / "r", 1, 2, 4.0, (2.5, one))
    write(tmp_path / "r", 1, 4, 8.0, (3.0, "another anchor"))
    write(tmp_path / "r", 2, 2, 5.0)
    write(tmp_path / "r", 9, 9, 5.0, status="failed")
    found = cells(str(tmp_path / "r"))
    assert [(cell["batch"], cell["window"]) for cell in found] == [(1, 1), (1, 2), (1, 4), (2, 2)]
    assert [cell["target_efficiency"] for cell in found] == [1.0, pytest.approx(0.4), 0.25, None]
    assert found[1]["target_efficiency_ci95_low"] == pytest.approx(1 / 2.75)
    assert [cell["experts_measured"] for cell in found] == [2.5, 3.0, 4.0, 3.0]
    path = traces.write(tmp_path / "x.trace", [[[0], [1], [1], [2]], [[3], [3], [3], [3]]], 4)
    cfg = {"cells": found, "acceptance": [0.5], "draft_ms": 1.0}
    findings = traces.found(path, speculation, cfg)
    rows = findings.tables["speculation"].to_dict("records")
    # Windows of two tokens: 01 12 33 33; at batch 2 one window of each sequence
    assert [row["experts_predicted"] for row in rows] == [1.0, 1.5, 2.0, 2.5 + 0.5]
    assert rows[0]["speed_up_0.5"] == 1 and rows[1]["speed_up_0.5"] == pytest.approx(1.5 * 0.4 * 4 / 5)
    assert rows[1]["speed_up_0.5_ci95_high"] == pytest.approx(1.5 / 2.25 * 4 / 5)
    assert rows[2]["speed_up_0.5"] == pytest.approx(1.875 * 2 / 11) and np.isnan(rows[3]["speed_up_0.5"])
    assert "steps of 1 tokens are the fastest: 1.00 times" in findings.sentences[0]
    assert not findings.notes


def test_the_best_window_is_said(tmp_path: Path) -> None:
    """With what it loads more, measured and by the trace; drafting that costs nothing is said."""
    one = write(tmp_path / "r", 1, 1, 2.0)
    write(tmp_path / "r", 1, 2, 2.2, (1.1, one))
    path = traces.write(tmp_path / "x.trace", [[[0], [1], [1], [2]], [[3], [3], [3], [3]]], 4)
    cfg = {"cells": cells(str(tmp_path / "r")), "acceptance": [0.5], "draft_ms": None}
    findings = traces.found(path, speculation, cfg)
    assert findings.sentences == [
        "At batch 1 and an acceptance of 0.5, steps of 2 tokens are the fastest: 1.36 [1.24, 1.52] times as fast as "
        "decoding; one takes 1.10 times as long and loads 1.20 times the experts (by the trace 1.50)."
    ]
    assert "Drafting is taken to cost nothing" in findings.notes[0]


def test_draws_of_replayed_windows_are_pooled(tmp_path: Path) -> None:
    """Two seeds: geometric means, an interval over the draws; and replay is compared with the model's own routes."""
    for load, seed, ms in (("native", 0, 2.0), ("replay", 0, 1.0), ("replay", 1, 4.0)):
        one = write(tmp_path / "r", 1, 1, ms, load=load, seed=seed)
        write(tmp_path / "r", 1, 2, 2 * ms, (2.0 + 6 * seed, one), load=load, seed=seed)
    found = cells(str(tmp_path / "r"))
    assert [(cell["load"], cell["window"], cell["draws"]) for cell in found] == [
        ("native", 1, 1),
        ("native", 2, 1),
        ("replay", 1, 2),
        ("replay", 2, 2),
    ]
    assert [cell["ms"] for cell in found] == [2.0, 4.0, 2.0, 4.0]
    pooled = found[3]
    assert pooled["target_efficiency"] == pytest.approx(1 / 4)  # of 1/2 and 1/8
    assert pooled["target_efficiency_ci95_low"] < 1 / 8 < 1 / 2 < pooled["target_efficiency_ci95_high"]
    path = traces.write(tmp_path / "x.trace", [[[0], [1], [1], [2]], [[3], [3], [3], [3]]], 4)
    findings = traces.found(path, speculation, {"cells": found, "acceptance": [0.5], "draft_ms": None})
    assert "a step takes 1.00 to 1.00 times as long as with the model's own" in findings.sentences[-1]
    assert len(findings.plots[0].lines) == 2


def test_bytes_by_the_trace(tmp_path: Path) -> None:
    """A step of one token moves 11 MB and loads 2.5 experts of 2 MB; windows of two tokens load 1.5 by the trace."""
    for window in (1, 2):
        write(tmp_path / "r", 1, window, 2.0)
    path = traces.write(tmp_path / "x.trace", [[[0], [1], [1], [2]], [[3], [3], [3], [3]]], 4)
    cfg = {"cells": cells(str(tmp_path / "r")), "acceptance": [0.5], "draft_ms": None}
    table = traces.found(path, speculation, cfg).tables["speculation"]
    assert list(table["mb_measured"]) == [11, 12]
    assert list(table["mb_predicted"]) == [11 - 1.5 * 2, 11 - 2.0]


def test_folders_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    """Nothing there, and two sweeps in one."""
    with pytest.raises(ValueError, match=r"speculation\.results=.*no results of steps of decoding"):
        cells(str(tmp_path))
    write(tmp_path / "a", 1, 2, 2.0)
    write(tmp_path / "b", 1, 2, 2.0)
    with pytest.raises(ValueError, match=r"speculation\.results=.*two results for batch=1, workload\.window=2"):
        cells(str(tmp_path))
