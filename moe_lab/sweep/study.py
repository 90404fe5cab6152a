"""Optuna's part of a search, by ask and tell: a space and what came of earlier batches in, the next batch out.

Each batch has a sampler of its own, seeded with the number of its first trial. So what it asks for depends on the seed,
that number and the outcomes told before it, and on nothing that a killed process had in its memory: a study that is
told the same batches again goes on in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from moe_lab.records.search import Outcome, Search, Trial
from moe_lab.sweep.space import Choice, Space

_MOST_REPEATS, _NONE_LEFT = 20, 1000
"""After so many choices in a row that were made before, one is taken from the space by chance, or there is none."""


class Study:
    """Asks for choices that were not made before, and is told what came of them."""

    def __init__(self, space: Space, search: Search):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._search = space, search
        self._study = optuna.create_study(directions=[one.direction for one in search.objectives])
        self._made: set[tuple[str, ...]] = set()
        self._asked: list[optuna.Trial] = []
        self._n = 0

    def ask(self, n: int) -> list[Choice]:
        """The next `n` choices; fewer if no more is found, and none when the space is exhausted. Tell of them next."""
        self._begin()
        found: list[Choice] = []
        repeats = 0
        size = self._space.size
        while len(found) < n and repeats < _NONE_LEFT and (size is None or len(self._made) < size):
            if repeats >= _MOST_REPEATS and size is not None:
                self._study.enqueue_trial(self._untried(size).params)
            elif repeats == _MOST_REPEATS:  # numbers of an interval are rounded, so they repeat too
                self._study.sampler = optuna.samplers.RandomSampler(seed=self._seed)
            trial = self._study.ask()
            choice = self._space.choose(trial)
            if tuple(choice.overrides) in self._made:
                self._study.tell(trial, state=TrialState.FAIL)  # which samplers do not learn from
                repeats += 1
                continue
            repeats = 0
            self._take(trial, choice)
            found.append(choice)
        return found

    def repeat(self, batch: Sequence[Trial]) -> None:
        """Ask for what was asked for in an earlier session. Tell of it next."""
        self._begin()
        for asked in batch:
            self._study.enqueue_trial(asked.params)
            trial = self._study.ask()
            self._take(trial, self._space.choose(trial))

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """What came of the choices asked for last, in their order."""
        for trial, outcome in zip(self._asked, outcomes, strict=True):
            if outcome.state in ("ok", "outside"):
                for limit, by in outcome.excess.items():
                    trial.set_constraint(limit, by)
                self._study.tell(trial, outcome.values)
            else:
                is_pruned = outcome.state == "pruned"
                self._study.tell(trial, state=TrialState.PRUNED if is_pruned else TrialState.FAIL)
        self._asked = []

    def _begin(self) -> None:
        assert not self._asked, "told of the last batch"
        self._seed = int(np.random.SeedSequence([self._search.seed, self._n]).generate_state(1)[0])
        self._study.sampler = _sampler(self._search, self._seed)

    def _take(self, trial: optuna.Trial, choice: Choice) -> None:
        self._asked.append(trial)
        self._made.add(tuple(choice.overrides))
        self._n += 1

    def _untried(self, size: int) -> Choice:
        """The first point, from a random one on, that was not chosen."""
        start = int(np.random.default_rng([self._seed, len(self._made)]).integers(size))
        points = (self._space.point((start + step) % size) for step in range(size))
        return next(point for point in points if tuple(point.overrides) not in self._made)


def _sampler(search: Search, seed: int) -> Any:
    if search.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    if search.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=search.population, seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)
