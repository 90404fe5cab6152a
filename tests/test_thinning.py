"""thinning: few cases, and none of their values or pairs lost."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.thinning import Case, covering, thin


def cases(*sizes: int) -> list[Case]:
    """A product of parameters with so many values."""
    return list(product(*(map(str, range(size)) for size in sizes)))


@pytest.mark.parametrize("of", [pytest.param(1, id="values"), pytest.param(2, id="pairs")])
@pytest.mark.parametrize(
    "sizes", [pytest.param(s, id="x".join(map(str, s))) for s in ((1,), (7,), (17, 2, 3, 2), (3, 3, 3, 3), (2, 9, 1))]
)
def test_nothing_is_lost_and_little_kept(sizes: tuple[int, ...], of: int) -> None:
    """All the values or pairs, in hardly more cases than the largest parameters have."""
    every = cases(*sizes)
    chosen = covering(every, of)

    def parts(some: list[Case]) -> set[tuple[tuple[int, str], ...]]:
        return {part for case in some for part in combinations(enumerate(case), min(of, len(case)))}

    assert parts(chosen) == parts(every)
    largest = sorted(sizes)[-of:]
    assert len(chosen) <= 1.7 * largest[0] * (largest[-1] if len(largest) > 1 else 1)


def test_a_hole_in_the_product_does_no_harm() -> None:
    """What only one case has, it keeps."""
    few = [("0", "0"), ("1", "0"), ("1", "1")]
    assert covering(few, 1) == [few[0], few[2]]
    assert sorted(map(tuple, covering(few, 2))) == few


def test_values_that_come_often_come_with_different_ones() -> None:
    """Not the rest of them with the first value."""
    chosen = covering(cases(36, 6), 1)
    assert [sum(case[1] == str(value) for case in chosen) for value in range(6)] == [6] * 6


@pytest.mark.parametrize("of", [pytest.param(1, id="values"), pytest.param(2, id="pairs")])
def test_what_checks_little_stands_for_itself(of: int) -> None:
    """What a case without 0 and x has is there in such a case; what none of them has (c, 0, x) is there too."""
    every = [case for case in product("0123", "abc", "xy") if case[1:] != ("c", "y")]
    chosen = covering(every, of, empty=("0", "x"))

    def parts(some: list[Case]) -> set[tuple[tuple[int, str], ...]]:
        return {part for case in some for part in combinations(enumerate(case), of)}

    def full(some: list[Case]) -> list[Case]:
        return [case for case in some if case[0] != "0" and case[2] != "x"]

    assert parts(chosen) == parts(list(every))
    assert parts(full(chosen)) == parts(full(list(every)))


@pytest.mark.thinned(1)
@pytest.mark.skip_where(lambda case: case["b"] == 2 and case["a"] < 4, reason="of this very test")
@pytest.mark.parametrize("a", [pytest.param(n, id=str(n)) for n in range(5)])
@pytest.mark.parametrize("b", [pytest.param(n, id=str(n)) for n in range(3)])
def test_what_is_skipped_stands_for_nothing(a: int, b: int, request: pytest.FixtureRequest) -> None:
    """The one case with b=2 that runs is fast."""
    assert b < 2 or a == 4
    assert (a, b) != (4, 2) or not request.node.get_closest_marker("slow")


@pytest.mark.parametrize("beside", [pytest.param(name, id=name) for name in ("slow", "gpu")])
def test_a_mark_without_effect_is_refused(beside: str, request: pytest.FixtureRequest) -> None:
    """The whole function is left out anyway."""

    def test() -> None: ...

    for mark in (pytest.mark.thinned(1), getattr(pytest.mark, beside)):
        mark(test)
    with pytest.raises(pytest.UsageError, match="test: `thinned` has no effect"):
        thin([pytest.Function.from_parent(request.node.parent, name="test", callobj=test)])


@pytest.mark.thinned(1)
@pytest.mark.parametrize("a", [pytest.param(n, id=str(n)) for n in range(5)])
@pytest.mark.parametrize("b", [pytest.param(n, id=str(n)) for n in range(3)])
@pytest.mark.parametrize("c", [pytest.param(0, id="0", marks=pytest.mark.slow), pytest.param(1, id="1")])
def test_the_mark_keeps_what_it_says(a: int, b: int, c: int, request: pytest.FixtureRequest) -> None:
    """Of this very test five of thirty are fast: none that is slow of itself, and in the others each value once."""
    if request.node.get_closest_marker("slow"):
        assert c == 0 or (a, b) not in FAST
    else:
        assert c == 1 and (a, b) in FAST


FAST = {(0, 0), (1, 1), (2, 2), (3, 0), (4, 1)}
