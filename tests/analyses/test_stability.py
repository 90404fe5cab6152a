"""analyses/stability.py: what is the same, what changed and where first, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_lab.analyses import stability
from moe_lab.records.trace import Layer, TraceWriter, tokens_of
from tests.analyses import traces


def write(path: Path, layers: list[list[list[int]]], token: int = 7, numbers: tuple[int, ...] = (1, 3)) -> Path:
    """Two experts of six for each token, in two layers."""
    n = len(layers[0])
    with TraceWriter(path, [Layer(number, 6, 2) for number in numbers]) as writer:
        tokens = tokens_of(np.arange(n) // 2, np.arange(n) % 2, token=np.full(n, token))
        writer.add(tokens, [np.array(ids) for ids in layers])
    return path


FIRST = [[0, 1], [2, 3], [4, 5], [0, 1]]


def test_changes_by_hand(tmp_path: Path) -> None:
    """The order of a token's experts does not count. Token 1 changes in both layers, token 2 in the second."""
    a = write(tmp_path / "a.trace", [FIRST, FIRST])
    b = write(tmp_path / "b.trace", [[[1, 0], [2, 4], [4, 5], [0, 1]], [[0, 1], [5, 4], [4, 0], [0, 1]]])
    findings = traces.found(a, stability, {"against": str(b), "phase": None})
    first, second = findings.tables["stability"].to_dict("records")
    assert (first["layer"], first["same"], first["changed"], first["first_change"]) == (1, 7 / 8, 1 / 4, 1 / 4)
    assert (second["same"], second["changed"], second["first_change"]) == (5 / 8, 2 / 4, 1 / 4)
    assert findings.sentences[0].startswith("75 %") and "; 50.0 %" in findings.sentences[0]
    assert "Most change in layer 3 (50 % of the tokens)" in findings.sentences[1]
    same = traces.found(a, stability, {"against": str(a), "phase": None})
    assert same.tables["stability"]["same"].tolist() == [1, 1] and len(same.sentences) == 1


def test_other_predictions_by_hand(tmp_path: Path) -> None:
    """Of four tokens one is unknown in a, and one of the three others is predicted otherwise."""
    for name, predicted in (("a", [3, 4, 5, -1]), ("b", [3, 4, 6, 7])):
        with TraceWriter(tmp_path / f"{name}.trace", [Layer(0, 6, 2)], token_columns={"predicted": 1}) as writer:
            tokens = tokens_of(np.arange(4) // 2, np.arange(4) % 2)
            writer.add(tokens, [np.array(FIRST)], {"predicted": np.array(predicted)})
    a, b = tmp_path / "a.trace", tmp_path / "b.trace"
    findings = traces.found(a, stability, {"against": str(b), "phase": None})
    assert findings.sentences[-1].startswith("33 % [") and "another likeliest next token" in findings.sentences[-1]
    without = write(tmp_path / "c.trace", [FIRST], token=-1, numbers=(0,))
    assert len(traces.found(a, stability, {"against": str(without), "phase": None}).sentences) == 1


def test_fewer_experts_are_a_change(tmp_path: Path) -> None:
    """On either side."""
    a = write(tmp_path / "a.trace", [FIRST, FIRST])
    b = write(tmp_path / "b.trace", [[[0, -1], *FIRST[1:]], FIRST])
    for one, other, same in ((a, b, 7 / 8), (b, a, 1)):
        table = traces.found(one, stability, {"against": str(other), "phase": None}).tables["stability"]
        assert (table["same"][0], table["changed"][0]) == (same, 1 / 4)


def test_a_trace_that_does_not_fit_is_said(tmp_path: Path) -> None:
    """Other tokens, other layers, no trace."""
    a = write(tmp_path / "a.trace", [FIRST, FIRST])
    for b, message in (
        (write(tmp_path / "b.trace", [FIRST, FIRST], token=8), "has other tokens"),
        (write(tmp_path / "c.trace", [FIRST[:2], FIRST[:2]]), "has other tokens"),
        (write(tmp_path / "d.trace", [FIRST, FIRST], numbers=(1, 2)), "has no layer 3 of 6 experts"),
        (tmp_path / "nowhere", "not a trace that can be read"),
    ):
        with pytest.raises(ValueError, match=message):
            traces.found(a, stability, {"against": str(b), "phase": None})
