"""analyses/counterfactual.py: regret by hand, by confidence, and in a trace without other routes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_lab.analyses import counterfactual
from moe_lab.records.trace import Layer, TraceWriter, tokens_of
from tests.analyses import traces


def write(path: Path, probabilities: list[list[float]], n_sequences: int = 2) -> Path:
    """Of each token: the largest, its own, and those of other routes."""
    p_TN = np.array(probabilities)
    T = len(p_TN)
    with TraceWriter(path, [Layer(0, 4, 1)], token_columns={"log_p": p_TN.shape[1]}, piece=3) as writer:
        sequence = np.arange(T) * n_sequences // T
        writer.add(tokens_of(sequence, np.arange(T)), [np.zeros((T, 1))], {"log_p": np.log(p_TN)})
    return path


def test_regret_by_hand(tmp_path: Path) -> None:
    """Bits 1, 2, 0, 3 by the own routes; the best of one other 1, 1, 0, 3, the best of two 0, 1, 0, 2."""
    path = write(
        tmp_path / "x.trace",
        [
            [0.6, 1 / 2, 1 / 4, 1.0],
            [0.3, 1 / 4, 1 / 2, 1 / 8],
            [1.0, 1.0, 1 / 2, 1 / 2],
            [0.2, 1 / 8, 1 / 16, 1 / 4],
        ],
    )
    findings = traces.found(path, counterfactual, {"routes": [1, 4]})
    one, two = findings.tables["counterfactual"].to_dict("records")
    assert (one["routes"], two["routes"]) == (1, 2)
    assert one["bits"] == pytest.approx(6 / 4) and one["best"] == pytest.approx(5 / 4)
    assert one["regret"] == pytest.approx(1 / 4) and one["share_with_a_better_route"] == 1 / 4
    assert two["best"] == pytest.approx(3 / 4) and two["regret"] == pytest.approx(3 / 4)
    # regrets 1 and 1 in the first sequence, 0 and 1 in the second
    assert two["regret_ci95_low"] < 3 / 4 < two["regret_ci95_high"]
    classes = findings.tables["counterfactual_confidence"].set_index("confidence_from")
    assert classes["share_of_tokens"].to_dict() == {0.0: 1 / 4, 0.25: 1 / 4, 0.5: 1 / 4, 0.9: 1 / 4}
    assert classes["regret"].to_dict() == pytest.approx({0.0: 1, 0.25: 1, 0.5: 1, 0.9: 0})
    assert classes["share_of_regret"].sum() == pytest.approx(1)
    assert classes["by_chance"].to_dict() == pytest.approx({0.0: 1, 0.25: -1, 0.5: 1, 0.9: 1})
    assert findings.notes == ["The trace has 2 routes of each token, so there is no best of [4]."]
    assert "would need 0.75" in findings.sentences[0] and "with the best of 2 other routes" in findings.sentences[0]
    assert "Where the likeliest next token has less than 25 %" in findings.sentences[1]


def test_more_routes_are_never_worse(tmp_path: Path) -> None:
    """And the own route is among them: no regret is below 0, even where every other route is worse."""
    rng = np.random.default_rng(0)
    p_TN = rng.uniform(0.01, 0.5, (50, 10))
    p_TN[:, 0] = 0.5
    p_TN[:7, 2:] = 0.001
    path = write(tmp_path / "x.trace", p_TN.tolist(), n_sequences=5)
    table = traces.found(path, counterfactual, {"routes": [1, 2, 4]}).tables["counterfactual"]
    assert table["routes"].tolist() == [1, 2, 4, 8]
    assert (table["regret"].diff().dropna() >= 0).all() and table["regret"].iloc[0] >= 0
    assert table["share_with_a_better_route"].iloc[-1] <= 43 / 50


def test_a_trace_without_them_says_how_to_record_them(tmp_path: Path) -> None:
    """A note, and no tables."""
    findings = traces.found(traces.random(tmp_path / "x.trace", 2, 5), counterfactual, {"routes": [1]})
    assert not findings.tables and "moe-lab trace --routes" in findings.notes[0]
