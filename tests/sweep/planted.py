"""A surface with two objectives whose front is known, in place of cells: what a search is compared on.

`time` falls and `bits` rises with `x` along the front, as fewer experts do; every other key only makes `bits` worse, so
at the best choice of all others the front is bits = 1 - sqrt(time) (ZDT1: Zitzler, Deb and Thiele 2000, with other
distances). One of the three entries has no number of its own, and the number of each other one has its own best value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser

from moe_lab.records.search import Constraint, Objective, Outcome, Search
from moe_lab.sweep import space as spaces
from moe_lab.sweep.space import Choice, Space

if TYPE_CHECKING:
    from moe_lab.sweep.study import Study

AXES = ("x=interval(0,1)", "n=tag(log,range(1,65))", "impl=a,b,c,d", "scale=interval(0.0,2.0)")
ENTRIES = (("router=top_p", "router.p=interval(0,1)"), ("router=min_p", "router.p=interval(0,1)"), ("router=plain",))
WORST = (1.1, 3.0)
"""What the hypervolume is measured from."""

_OF_IMPL = {"a": 0.5, "b": 0.0, "c": 1.0, "d": 0.8}
_PARSER = OverridesParser.create()


def space(axes: Sequence[str] = AXES, entries: Sequence[Sequence[str]] = ENTRIES) -> Space:
    """The space that these words span."""
    found, _ = spaces.of([_PARSER.parse_overrides(list(entry)) for entry in entries], _PARSER.parse_overrides([*axes]))
    return found


def search(sampler: str = "tpe", seed: int = 0, *, directions: str = "minimize minimize", **limits: float) -> Search:
    """A search for both, or for as many as there are directions."""
    objectives = [Objective(name, way) for name, way in zip(("time", "bits"), directions.split(), strict=False)]
    constraints = [Constraint(name, max=most) for name, most in limits.items()]
    return Search(objectives, constraints, space().lines(), sampler, 16, seed)


def values(choice: Choice) -> tuple[float, float]:
    """(time, bits) of a choice."""
    said = dict(text.split("=", 1) for text in choice.overrides)
    best = {"top_p": 0.3, "min_p": 0.7}.get(said["router"])
    of_router = {"top_p": 0.0, "min_p": 0.3, "plain": 0.9}[said["router"]]
    far = 0.0 if best is None else abs(float(said["router.p"]) - best)
    distance = of_router + 2 * far + abs(math.log10(int(said["n"]) / 8)) + _OF_IMPL[said["impl"]]
    g = 1 + distance + abs(float(said["scale"]) - 0.5)
    x = float(said["x"])
    return x, g * (1 - math.sqrt(x / g))


def row(choice: Choice) -> dict[str, object]:
    """The row of a cell that ran."""
    time, bits = values(choice)
    return {"status": "ok", "cell_id": " ".join(choice.overrides), "time": time, "bits": bits}


def study_of(asked: Search, over: Space | None = None) -> Study:
    """Of a search over the planted space, or another; whoever has no Optuna still has the surface."""
    from moe_lab.sweep.study import Study

    return Study(over or space(), asked)


def run(
    asked: Search,
    n: int,
    of: Callable[[Choice], dict[str, object]] = row,
    *,
    batch: int = 4,
    over: Space | None = None,
) -> list[tuple[Choice, Outcome]]:
    """A search of n trials, each with the row that `of` gives it."""
    study, found = study_of(asked, over), []
    while len(found) < n and (choices := study.ask(min(batch, n - len(found)))):
        outcomes = [asked.outcome(of(choice)) for choice in choices]
        study.tell(outcomes)
        found += list(zip(choices, outcomes, strict=True))
    return found


def hypervolume(points: Sequence[tuple[float, ...]], worst: tuple[float, float] = WORST) -> float:
    """The area of what is worse than a point, and better than the worst."""
    area, above = 0.0, worst[1]
    for time, bits in sorted(points):
        if time < worst[0] and bits < above:
            area += (worst[0] - time) * (above - bits)
            above = bits
    return area
