"""sweep/study.py on a planted surface: better than random, the same again, and nothing chosen twice."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import groupby

import pytest

from moe_lab.records.search import Outcome, Search, Trial
from moe_lab.sweep.space import Choice
from tests.sweep import planted

pytestmark = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="pip install 'moe-lab[search]'")
SAMPLERS = [pytest.param(name, id=name) for name in ("tpe", "nsga2", "random")]
SEEDS = [pytest.param(n, id=f"seed-{n}", marks=[pytest.mark.slow] if n else []) for n in range(3)]
FINITE = ("k=1,2,3", "n=range(0,5)")


def area(found: list[tuple[Choice, Outcome]]) -> float:
    return planted.hypervolume([outcome.values for _, outcome in found])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_front_is_better_than_that_of_random_search(seed: int) -> None:
    """60 trials in batches of 4: at least 1.2 times the hypervolume."""
    by_chance = area(planted.run(planted.search("random", seed), 60))
    assert area(planted.run(planted.search("tpe", seed), 60)) >= 1.2 * by_chance


@pytest.mark.slow
def test_generations_are_better_than_chance_too() -> None:
    """Over six seeds, for one of them may be unlucky."""
    gains = [
        area(planted.run(replace(planted.search("nsga2", seed), population=8), 60))
        / area(planted.run(planted.search("random", seed), 60))
        for seed in range(6)
    ]
    assert sum(gains) / len(gains) > 1.1


@pytest.mark.parametrize("seed", SEEDS)
def test_the_planted_optimum_is_found_sooner_than_by_chance(seed: int) -> None:
    """One objective, to be made large: the best of 40 trials, over the planted optimum of 0."""

    def best(sampler: str) -> float:
        asked = planted.search(sampler, seed, directions="maximize")
        found = planted.run(asked, 40, lambda choice: {**planted.row(choice), "time": -planted.values(choice)[1]})
        return max(outcome.values[0] for _, outcome in found)

    assert 0 > best("tpe") > best("random")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_and_values_ask_for_the_same_trials(sampler: str) -> None:
    """And another seed for others."""
    first, again, other = (
        [choice.overrides for choice, _ in planted.run(planted.search(sampler, seed), 20)] for seed in (5, 5, 6)
    )
    assert first == again != other


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "n", [pytest.param(4, id="after-4", marks=[pytest.mark.slow]), pytest.param(20, id="after-20")]
)
def test_a_study_that_is_told_the_same_again_goes_on_in_the_same_way(sampler: str, n: int) -> None:
    """What a killed process had in its memory is not needed: trials, of which some failed, and their outcomes are."""
    asked = planted.search(sampler, 3)

    def row(choice: Choice) -> dict[str, object]:
        status = {"a": "failed", "d": "skipped"}.get(dict(text.split("=") for text in choice.overrides)["impl"], "ok")
        return {**planted.row(choice), "status": status}

    whole = planted.run(asked, 28, row)
    trials = [Trial(at, at // 4, choice.params, choice.overrides) for at, (choice, _) in enumerate(whole[:n])]
    study = planted.study_of(asked)
    for number, batch in groupby(trials, key=lambda trial: trial.batch):
        study.repeat([*batch])
        study.tell([outcome for _, outcome in whole[4 * number : 4 * number + 4]])
    going_on = []
    while n + len(going_on) < 28:
        choices = study.ask(4)
        study.tell([asked.outcome(row(choice)) for choice in choices])
        going_on += choices
    assert [choice.overrides for choice in going_on] == [choice.overrides for choice, _ in whole[n:]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_finite_space_ends_with_every_point_once(sampler: str) -> None:
    """Also when the sampler would rather choose one again: here the same point is always the best."""
    asked = planted.search(sampler, directions="minimize")
    over = planted.space(FINITE, ())
    found = planted.run(
        asked, 99, lambda choice: {"status": "ok", "cell_id": "", "time": float(choice.overrides != ["k=2", "n=3"])},
        over=over,
    )  # fmt: skip
    texts = {tuple(choice.overrides) for choice, _ in found}
    assert len(found) == len(texts) == over.size == 15


@pytest.mark.slow
def test_an_interval_ends_too() -> None:
    """Its numbers are rounded, so there are some thousand of them; whoever asks for more is given what there is."""
    found = planted.run(
        planted.search("random", directions="minimize"),
        9000,
        lambda choice: {"status": "ok", "cell_id": "", "time": 0.0},
        batch=300,
        over=planted.space(["k=interval(0,0.1)"], ()),
    )
    assert 900 < len(found) == len({tuple(choice.overrides) for choice, _ in found}) <= 1001


def inside(found: list[tuple[Choice, Outcome]]) -> int:
    return sum(outcome.state == "ok" for _, outcome in found[-30:])


@pytest.mark.slow
def test_constraints_draw_the_search_inside() -> None:
    """Of the last 30 of 60 trials more are within the limit than without it, and those outside have their values."""
    limited = planted.search("tpe", 1, bits=1.0)
    found = planted.run(limited, 60)
    free = [(choice, limited.outcome(planted.row(choice))) for choice, _ in planted.run(planted.search("tpe", 1), 60)]
    assert inside(found) > inside(free)
    assert all(outcome.values and outcome.excess["bits max"] > 0 for _, outcome in found if outcome.state == "outside")


@pytest.mark.parametrize("status", [pytest.param("failed", id="failed"), pytest.param("skipped", id="pruned")])
def test_what_fails_does_not_end_a_search(status: str) -> None:
    """Not even if all of it does."""
    found = planted.run(planted.search(), 16, lambda choice: {**planted.row(choice), "status": status})
    assert {outcome.state for _, outcome in found} == {"failed" if status == "failed" else "pruned"}
    assert len(found) == 16


@pytest.mark.slow
def test_what_cannot_run_is_asked_for_less() -> None:
    """A pruned trial tells the sampler something: a third of the space cannot run, and it leaves that third."""

    def run(asked: Search, cannot: bool) -> int:
        def row(choice: Choice) -> dict[str, object]:
            is_out = cannot and choice.overrides[0] == "router=top_p"
            return {**planted.row(choice), "status": "skipped" if is_out else "ok"}

        return sum(choice.overrides[0] == "router=top_p" for choice, _ in planted.run(asked, 60, row))

    asked = [planted.search("tpe", seed) for seed in range(2)]
    assert 1.5 * sum(run(one, True) for one in asked) < sum(run(one, False) for one in asked)
