"""sweep/space.py: axes as they are typed become what a sampler chooses from, and every point is a cell's overrides."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.sweep import space as spaces
from moe_lab.sweep.space import Choice, Space
from tests.sweep import planted


class Chosen:
    """A chooser that takes what it is told, a share of each range."""

    def __init__(self, share: float):
        self.share = share

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        return choices[round(self.share * (len(choices) - 1))]

    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> int:
        return low + round(self.share * (high - low))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        return low + self.share * (high - low)


def of(*axes: str, entries: Sequence[Sequence[str]] = ()) -> Space:
    return planted.space(axes, entries)


@pytest.mark.parametrize(
    ("line", "first", "last", "size"),
    [
        pytest.param("k=1,[1,2],3", "k=1", "k=3", 3, id="list"),
        pytest.param("router=choice(a,b)", "router=a", "router=b", 2, id="choice"),
        pytest.param("k=a,b,a", "k=a", "k=b", 2, id="twice-the-same"),
        pytest.param("k=range(1,9)", "k=1", "k=8", 8, id="range"),
        pytest.param("k=range(0,1,0.25)", "k=0.0", "k=0.75", 4, id="range-of-floats"),
        pytest.param("k=range(9,1,-4)", "k=9", "k=5", 2, id="range-down"),
        pytest.param("k=int(interval(1,8))", "k=1", "k=8", 8, id="whole-numbers"),
        pytest.param("k=tag(log,range(3,101))", "k=3", "k=100", 98, id="log-range"),
        pytest.param("k=interval(0.1,0.9)", "k=0.1", "k=0.9", None, id="interval"),
        pytest.param("k=tag(log,interval(0.001,10))", "k=0.001", "k=10.0", None, id="log-interval"),
        pytest.param("k=tag(log,interval(1.23456,1.23459))", "k=1.23456", "k=1.23459", None, id="narrow-log-interval"),
        pytest.param("k=interval(0.123456,0.123459)", "k=0.123456", "k=0.123459", None, id="narrower-than-four-digits"),
    ],
)
def test_an_axis_has_these_ends(line: str, first: str, last: str, size: int | None) -> None:
    """The texts are those of a sweep over the same axis; a rounded number stays within."""
    space = of(line)
    assert (space.choose(Chosen(0)).overrides, space.choose(Chosen(1)).overrides) == ([first], [last])
    assert space.size == size


def test_a_number_of_an_interval_is_short_in_the_override_and_whole_for_the_sampler() -> None:
    """A thousandth of the interval tells two cells apart; the sampler goes on from what it chose."""
    choice = of("k=interval(0,1)", "n=tag(log,interval(0.001,3))").choose(Chosen(1 / 3))
    assert choice == Choice({"k": 1 / 3, "n": 0.001 + 2.999 / 3}, ["k=0.333", "n=1.001"])


def test_an_entry_brings_its_own_axes() -> None:
    """One key may have other values in each; a plain entry has no number."""
    space = of("x=1,2", entries=[["router=a", "p=range(0,3)"], ["router=b", "p=range(7,9)"], ["router=c"]])
    points = [space.point(place) for place in range(space.size or 0)]
    assert len(points) == 2 * (3 + 2 + 1)
    texts = {" ".join(point.overrides) for point in points}
    assert len(texts) == len(points)
    assert {"router=a p=2 x=1", "router=b p=8 x=2", "router=c x=2"} <= texts
    assert space.searched() == {"router", "p", "x"}


@settings(max_examples=20)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4).filter(lambda sizes: max(sizes) > 1))
def test_points_are_all_different_and_as_many_as_the_size(sizes: list[int]) -> None:
    """Whatever the axes."""
    axes = [f"k{at}={','.join(f'v{n}' for n in range(size))},w" for at, size in enumerate(sizes)]
    space = of(*axes)
    assert space.size is not None
    assert len({tuple(space.point(place).overrides) for place in range(space.size)}) == space.size


def test_what_is_no_axis_is_fixed() -> None:
    """And stands in every job."""
    overrides = OverridesParser.create().parse_overrides(["batch=2", "k=1,2", "name='a b'"])
    _, fixed = spaces.of([], overrides)
    assert fixed == ["batch=2", "name='a b'"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        pytest.param("k=1", "nothing is searched", id="no-axis"),
        pytest.param("k=interval(2,1)", "the first end must be less", id="backwards"),
        pytest.param("k=interval(1,1)", "the first end must be less", id="empty-interval"),
        pytest.param("k=tag(log,interval(0,1))", "both ends must be more than 0", id="log-of-0"),
        pytest.param("k=tag(log,choice(1,2))", "needs numbers", id="log-of-words"),
        pytest.param("k=tag(log,range(1,9,2))", "a step of 1", id="log-with-a-step"),
        pytest.param("k=tag(log,range(0,9))", "from 1 on", id="log-range-of-0"),
        pytest.param("k=tag(fast,range(1,9))", "tag fast is not known", id="tag"),
        pytest.param("k=range(3,3)", "has no value", id="empty-range"),
        pytest.param("k=range(1,3,0)", "has no value", id="no-step"),
        pytest.param("k=range(0,1000000)", "1,000,000 values", id="huge"),
        pytest.param("k=int(interval(0,1000000))", "1,000,001 values", id="huge-interval"),
        pytest.param("k=shuffle(range(1,4))", "remove shuffle", id="shuffle"),
    ],
)
def test_a_mistake_is_a_line(line: str, says: str) -> None:
    """It names the axis or the remedy."""
    with pytest.raises(ValueError, match=says) as error:
        of(line)
    assert "\n" not in str(error.value)
