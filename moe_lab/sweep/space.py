"""The space of a search: its axes, as they are typed for a sweep, and those of the entries of `sweep.variants`.

An axis is read as Hydra reads it: `a,b` and `choice(a, b)` are options without an order, `range(1, 9)` numbers in their
order, `interval(0.1, 1)` every number between, `int(interval(1, 8))` every whole one. With `tag(log, ...)` equal ratios
are equally likely. An axis in an entry is searched only where that entry is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from moe_lab.config import entries

_MOST_VALUES = 10_000
_DIGITS = 4  # of a number from an interval that spans decades; of another a thousandth of its width, or finer
ENTRY = entries.KEY

Value = float | int | str


class Chooser(Protocol):
    """Who chooses: Optuna's trial has these."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """One of the choices."""
        ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> int:
        """A whole number, the ends included."""
        ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        """A number."""
        ...


@dataclass(frozen=True)
class Axis:
    """A key, and the values that it may have."""

    key: str
    line: str
    """As it was typed."""
    texts: tuple[str, ...] = ()
    """The values, as they are typed; none of an interval."""
    is_ordered: bool = False
    is_log: bool = False
    first: int = 0
    """The number that stands for the first value of an ordered axis: with `is_log` the value itself."""
    ends: tuple[float, float] = (0.0, 0.0)

    def choose(self, chooser: Chooser, name: str) -> tuple[Value, str]:
        """What the chooser says, and the value as it is typed."""
        if not self.texts:
            low, high = self.ends
            number = chooser.suggest_float(name, low, high, log=self.is_log)
            return number, repr(min(max(self._rounded(number), low), high))
        if self.is_ordered:
            place = chooser.suggest_int(name, self.first, self.first + len(self.texts) - 1, log=self.is_log)
            return place, self.texts[place - self.first]
        text = chooser.suggest_categorical(name, self.texts)
        return text, text

    def _rounded(self, number: float) -> float:
        low, high = self.ends
        if self.is_log and high >= 10 * low:
            return float(f"{number:.{_DIGITS}g}")
        return round(number, _DIGITS - 1 - math.floor(math.log10(high - low)))

    def at(self, place: int) -> tuple[Value, str]:
        """As `choose`, the value at a place of `texts`."""
        return (self.first + place if self.is_ordered else self.texts[place]), self.texts[place]


@dataclass(frozen=True)
class Entry:
    """What an entry of `sweep.variants` sets, and what is searched in it."""

    label: str
    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Choice:
    """A point of the space."""

    params: dict[str, Value]
    overrides: list[str]


@dataclass(frozen=True)
class Space:
    """All combinations of the axes, with every entry where there are entries."""

    axes: tuple[Axis, ...]
    entries: tuple[Entry, ...]

    def lines(self) -> list[str]:
        """The axes as they are typed, then the entries."""
        return [*(axis.line for axis in self.axes), *(f"{ENTRY}: {entry.label}" for entry in self.entries)]

    def searched(self) -> set[str]:
        """Every key that is searched, or set by an entry."""
        of_entries = {key for entry in self.entries for key in (*_keys(entry.fixed), *(a.key for a in entry.axes))}
        return {axis.key for axis in self.axes} | of_entries

    def choose(self, chooser: Chooser) -> Choice:
        """What the chooser chooses, axis by axis."""
        number = None
        if self.entries:
            labels = [entry.label for entry in self.entries]
            number = labels.index(chooser.suggest_categorical(ENTRY, labels))
        return self._choice(number, lambda name, axis: axis.choose(chooser, name))

    @property
    def size(self) -> int | None:
        """How many points there are; None if an axis is an interval."""
        sizes = [self._size_of(number) for number in self._numbers()]
        return None if 0 in sizes else sum(sizes)

    def point(self, place: int) -> Choice:
        """The point at a place of a finite space, from 0 to `size` - 1."""
        number = None
        for number in self._numbers():
            if place < (size := self._size_of(number)):
                break
            place -= size

        def pick(_: str, axis: Axis) -> tuple[Value, str]:
            nonlocal place
            place, at = divmod(place, len(axis.texts))
            return axis.at(at)

        return self._choice(number, pick)

    def _numbers(self) -> Sequence[int | None]:
        return range(len(self.entries)) or [None]

    def _named(self, number: int | None) -> dict[str, Axis]:
        """The axes that are searched with an entry; one key may have other values in each."""
        of_entry = () if number is None else self.entries[number].axes
        return {f"{number}:{axis.key}": axis for axis in of_entry} | {axis.key: axis for axis in self.axes}

    def _size_of(self, number: int | None) -> int:
        return math.prod(len(axis.texts) for axis in self._named(number).values())

    def _choice(self, number: int | None, pick: Callable[[str, Axis], tuple[Value, str]]) -> Choice:
        params: dict[str, Value] = {} if number is None else {ENTRY: self.entries[number].label}
        overrides = [] if number is None else [*self.entries[number].fixed]
        for name, axis in self._named(number).items():
            params[name], text = pick(name, axis)
            overrides.append(f"{axis.key}={text}")
        return Choice(params, overrides)


def _keys(overrides: Sequence[str]) -> Iterator[str]:
    return (override.partition("=")[0] for override in overrides)


def of(variants: Sequence[Sequence[Override]], overrides: Sequence[Override]) -> tuple[Space, list[str]]:
    """The space that overrides span with the entries of `sweep.variants`, and the overrides that are no axes.

    Raises:
        ValueError: nothing is searched, or an axis cannot be read.
    """
    axes, fixed = _split(overrides)
    made = [Entry(" ".join(str(one.input_line) for one in entry), *_fixed_first(entry)) for entry in variants]
    space = Space(tuple(axes), tuple({entry.label: entry for entry in made}.values()))
    if not axes and len(space.entries) < 2 and not any(entry.axes for entry in space.entries):
        raise ValueError(
            "hydra/sweeper=moe_lab_optuna: nothing is searched; give keys several values, such as "
            "'router.top_k=range(1,9)' or 'router.threshold=interval(0.1,0.9)'."
        )
    return space, fixed


def _fixed_first(entry: Sequence[Override]) -> tuple[tuple[str, ...], tuple[Axis, ...]]:
    axes, fixed = _split(entry)
    return tuple(fixed), tuple(axes)


def _split(overrides: Sequence[Override]) -> tuple[list[Axis], list[str]]:
    axes, fixed = [], []
    for override in overrides:
        if override.is_sweep_override():
            axes.append(_axis(override))
        else:
            fixed.append(f"{override.get_key_element()}={override.get_value_element_as_str()}")
    return axes, fixed


def _axis(override: Override) -> Axis:
    line, key, sweep = str(override.input_line), override.get_key_element(), override.value()
    tags: set[str] = getattr(sweep, "tags", set())
    if unknown := sorted(tags - {"log"}):
        raise ValueError(f"{line}: tag {unknown[0]} is not known; the only one is log.")
    if getattr(sweep, "shuffle", False):
        raise ValueError(f"{line}: a search has an order of its own; remove shuffle(...).")
    is_log = bool(tags)
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None and sweep.end is not None
        if not (sweep.start < sweep.end and math.isfinite(sweep.start) and math.isfinite(sweep.end)):
            raise ValueError(f"{line}: the first end must be less than the second.")
        if is_log and sweep.start <= 0:
            raise ValueError(f"{line}: with tag(log, ...) both ends must be more than 0.")
        if isinstance(sweep.start, float) or isinstance(sweep.end, float):
            return Axis(key, line, is_log=is_log, ends=(float(sweep.start), float(sweep.end)))
        numbers = range(sweep.start, sweep.end + 1)
        _require_few(line, len(numbers))
        return _ordered(key, line, [str(number) for number in numbers], is_log)
    if isinstance(sweep, RangeSweep):
        _require_few(line, _length(sweep, line))
        return _ordered(key, line, list(override.sweep_string_iterator()), is_log)
    if is_log:
        raise ValueError(f"{line}: tag(log, ...) needs numbers: write tag(log, interval(A, B)).")
    texts = list(dict.fromkeys(override.sweep_string_iterator()))
    if not texts:
        raise ValueError(f"{line}: no value matches, so there is nothing to search.")
    return Axis(key, line, texts=tuple(texts))


def _ordered(key: str, line: str, texts: list[str], is_log: bool) -> Axis:
    if not is_log:
        return Axis(key, line, tuple(texts), is_ordered=True)
    steps = [str(number) for number in range(int(float(texts[0])), int(float(texts[0])) + len(texts))]
    if steps != texts or int(steps[0]) < 1:
        raise ValueError(f"{line}: tag(log, ...) needs whole numbers from 1 on with a step of 1, or an interval.")
    return Axis(key, line, tuple(texts), is_ordered=True, is_log=True, first=int(texts[0]))


def _length(sweep: RangeSweep, line: str) -> int:
    start, stop, step = (float(number or 0) for number in (sweep.start, sweep.stop, sweep.step))
    length = math.ceil((stop - start) / step) if step else 0
    if length < 1:
        raise ValueError(f"{line}: has no value; write range(FIRST, BEHIND_THE_LAST, STEP).")
    return length


def _require_few(line: str, n: int) -> None:
    if n > _MOST_VALUES:
        raise ValueError(f"{line}: these are {n:,} values; write interval(A, B), or a larger step.")
