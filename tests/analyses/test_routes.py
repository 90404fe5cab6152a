"""analyses/routes.py: tokens sequence by sequence, and the units and parts that numbers rest on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_lab.analyses.routes import STRETCHES, routes_of, view_of
from moe_lab.records.trace import Layer, Trace, TraceWriter, tokens_of
from tests.analyses import traces


def test_steps_of_a_batch_become_sequences(tmp_path: Path) -> None:
    """Tokens that were decoded in turn are put in a row, and back."""
    ids = np.arange(6)[:, None]
    with TraceWriter(tmp_path / "x.trace", [Layer(0, 6, 1)]) as writer:
        writer.add(tokens_of(np.array([0, 1, 0, 1, 0, 1]), np.array([5, 0, 6, 1, 7, 2]), "decode"), [ids])
    with Trace(tmp_path / "x.trace") as trace:
        view = view_of(trace)
        routes = routes_of(trace, 0, view)
    assert routes.ids_TK[:, 0].tolist() == [0, 2, 4, 1, 3, 5]
    assert np.array_equal(routes.ids_TK[view.computed], ids)
    assert view.is_first.tolist() == [True, False, False, True, False, False]
    assert view.unit.tolist() == [0, 0, 0, 1, 1, 1]
    assert (view.parts, view.part.tolist()) == (("the first half", "the second half"), [0, 1])
    assert view.by_unit(np.array([1, 2, 3, 4, 5, 6])).tolist() == [6, 15]


def test_the_token_that_follows_is_the_next_of_the_sequence(tmp_path: Path) -> None:
    """Not behind a gap, not of another sequence; across phases; unknown ids stay unknown."""
    with TraceWriter(tmp_path / "x.trace", [Layer(0, 6, 1)]) as writer:
        sequence, position = np.array([0, 1, 0, 1, 0]), np.array([0, 5, 1, 6, 3])
        tokens = tokens_of(sequence, position, "prefill", np.array([10, 20, 11, -1, 13]))
        writer.add(tokens, [np.zeros((5, 1))])
        writer.add(tokens_of(np.array([0]), np.array([4]), "decode", np.array([14])), [np.zeros((1, 1))])
    with Trace(tmp_path / "x.trace") as trace:
        view, prefill = view_of(trace), view_of(trace, "prefill")
    assert view.token.tolist() == [10, 11, 13, 14, 20, -1]
    assert view.target.tolist() == [11, -1, 14, -1, -1, -1]
    assert prefill.token.tolist() == [10, 11, 13, 20, -1] and prefill.target.tolist() == [11, -1, 14, -1, -1]


def test_texts_are_parts(tmp_path: Path) -> None:
    """A unit belongs to the text of its sequence."""
    path = traces.write(tmp_path / "x.trace", [[[0]], [[1]], [[2]]], 3, domains=[1, 0, 1])
    with Trace(path) as trace:
        view = view_of(trace)
    assert view.parts == ("text 0", "text 1") and view.part.tolist() == [1, 0, 1]


def test_one_sequence_is_cut_into_stretches(tmp_path: Path) -> None:
    """So that there are intervals."""
    path = traces.write(tmp_path / "x.trace", [[[0]] * 40], 3)
    with Trace(path) as trace:
        view = view_of(trace)
    assert view.n_units == STRETCHES and view.is_first.sum() == 1
    assert np.bincount(view.unit).tolist() == [3 if i % 2 == 0 else 2 for i in range(16)]


def test_one_phase_is_chosen(tmp_path: Path) -> None:
    """One that is not there is said."""
    with TraceWriter(tmp_path / "x.trace", [Layer(0, 6, 1)]) as writer:
        writer.add(tokens_of(np.zeros(3), np.arange(3), "prefill"), [np.array([[0], [1], [2]])])
        writer.add(tokens_of(np.zeros(1), np.array([3]), "decode"), [np.array([[3]])])
    with Trace(tmp_path / "x.trace") as trace:
        assert routes_of(trace, 0, view_of(trace, "decode")).ids_TK.tolist() == [[3]]
        with pytest.raises(ValueError, match=r"phase=unknown: .* no such tokens, only prefill, decode"):
            view_of(trace, "unknown")
