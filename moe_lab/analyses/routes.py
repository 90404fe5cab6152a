"""A trace as the analyses read it: one layer at a time, its tokens sequence by sequence, and what intervals rest on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from moe_lab.records.trace import PHASES, Layer, Tokens, Trace

STRETCHES = 16
"""Of a trace without sequences: as many equal stretches of it are what intervals rest on."""


@dataclass(frozen=True)
class View:
    """The tokens of a trace, [T], sequence by sequence, by position.

    Attributes:
        rows: their places in the trace.
        computed: puts an array of this order into the order in which the tokens were computed.
        token: ids in the vocabulary, -1 where unknown.
        target: the id of the token that follows in the sequence, -1 where unknown.
        is_first: whether a token is the first of its sequence.
        unit: the unit of intervals that a token belongs to, from 0: its sequence, or a stretch of the only one.
        part: [U] the part of the trace that a unit belongs to: its text, or a half of a trace that has fewer than two
            texts. What is fitted is fitted on all parts but the one that it is judged on.
        parts: their names.
        of_tokens: by name, those of `TOKEN_COLUMNS` (records/trace.py) that the trace has.
    """

    rows: np.ndarray
    computed: np.ndarray
    token: np.ndarray
    target: np.ndarray
    is_first: np.ndarray
    unit: np.ndarray
    part: np.ndarray
    parts: tuple[str, ...]
    of_tokens: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        return len(self.rows)

    @property
    def n_units(self) -> int:
        return len(self.part)

    def by_unit(self, values_T: np.ndarray) -> np.ndarray:
        """Sums over the tokens of each unit, [U]."""
        return np.bincount(self.unit, weights=values_T, minlength=self.n_units)


@dataclass(frozen=True)
class Routes:
    """One layer: ids int16 [T, K] in the order of the view, -1 where unused; and those of the layer before, if any.

    `guesses`: by name, what the trace recorded of what the router would choose earlier, int16 [T, W].
    """

    layer: Layer
    ids_TK: np.ndarray
    view: View
    before: Routes | None = None
    guesses: Mapping[str, np.ndarray] = field(default_factory=dict)


def view_of(trace: Trace, phase: str | None = None) -> View:
    """The order of a trace's tokens; those of one phase, or all.

    Raises:
        ValueError: it has no tokens of that phase.
    """
    tokens = trace.tokens()
    rows = np.lexsort((tokens.position, tokens.sequence))
    target = _targets(tokens, rows)
    if phase is not None:
        is_of_phase = tokens.phase[rows] == PHASES.index(phase)
        if not is_of_phase.any():
            found = ", ".join(PHASES[index] for index in np.unique(tokens.phase))
            raise ValueError(f"phase={phase}: {trace.path} has no such tokens, only {found}; leave it out.")
        rows, target = rows[is_of_phase], target[is_of_phase]
    sequence = tokens.sequence[rows]
    is_first = np.concatenate([[True], sequence[1:] != sequence[:-1]])
    unit = np.cumsum(is_first) - 1
    if unit[-1] == 0:
        unit = np.arange(len(rows)) * min(STRETCHES, len(rows)) // len(rows)
    part, parts = _parts(tokens, rows, unit, trace.domains)
    of_tokens = {name: trace.of_tokens(name)[rows] for name in trace.token_columns}
    computed = np.argsort(rows, kind="stable")
    return View(rows, computed, tokens.token[rows], target, is_first, unit, part, parts, of_tokens)


def _targets(tokens: Tokens, rows: np.ndarray) -> np.ndarray:
    """The token at the next position of each token's sequence, of all tokens in the order of `rows`."""
    sequence, position, token = (values[rows] for values in (tokens.sequence, tokens.position, tokens.token))
    follows = (sequence[1:] == sequence[:-1]) & (position[1:] == position[:-1] + 1)
    return np.append(np.where(follows, token[1:], -1), -1)


def _parts(
    tokens: Tokens, rows: np.ndarray, unit: np.ndarray, domains: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...]]:
    n_units = int(unit[-1]) + 1
    starts = np.searchsorted(unit, np.arange(n_units))
    domain = tokens.domain[rows][starts]
    known = np.unique(domain)
    if len(known) > 1:
        names = tuple("unknown" if index < 0 else domains[index] for index in known)
        return np.searchsorted(known, domain), names
    if n_units == 1:
        return np.zeros(1, np.int64), ("all",)
    return np.arange(n_units) * 2 // n_units, ("the first half", "the second half")


def routes_of(
    trace: Trace, index: int, view: View, *, with_before: bool = False, guesses: Collection[str] = ()
) -> Routes:
    """One layer of a trace, by its place in `trace.layers`, with those of `guesses` that it has."""
    before = routes_of(trace, index - 1, view) if with_before and index else None
    recorded = {
        name: np.concatenate(list(trace.pieces_of(index, name)))[view.rows] for name in guesses if name in trace.columns
    }
    return Routes(trace.layers[index], trace.ids(index)[view.rows], view, before, recorded)
