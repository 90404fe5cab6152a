"""Which answer holds where on a grid of settings, in the fewest words: `T <= 64`, `batch 1 to 8`, `decoder_moe`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

TOKENS = "T"
"""The tokens of a pass: the axis that is looked at first."""
_ALLOWANCE = 0.02
"""A further region has to explain at least this share of the settings."""

Place = Mapping[str, Any]
"""Where a setting lies: its value of each key that varies; numbers are an axis, texts are names."""


class Region(NamedTuple):
    """Neighbouring settings with the same answer."""

    where: str
    """Such as `T <= 64`; empty if it is everywhere."""
    answer: Any
    members: list[int]
    """The settings in it that have this answer, by their place in the list."""
    size: int
    """How many settings it has, those with another answer too."""

    @property
    def at(self) -> str:
        """` at T <= 64 (7 of 8 settings)`, behind a sentence; nothing where it holds everywhere."""
        rest = f" ({len(self.members)} of {self.size} settings)" if len(self.members) < self.size else ""
        return (f" at {self.where}" if self.where else "") + rest


class _Split(NamedTuple):
    regions: list[Region]
    cost: float


def regions(answers: Sequence[Hashable], places: Sequence[Place]) -> list[Region]:
    """The regions that explain the answers best, the largest first.

    They are cut along no key, one, or one within another. Of all cuts, the one is taken with the fewest settings whose
    answer is not that of most in their region, where each region counts as much as a few such settings: so a handful
    of odd ones among hundreds make no sentence, and two settings with two answers make two.
    """
    if not answers:
        return []
    keys = [key for key in _keys(places) if len({place.get(key) for place in places}) > 1]
    ones = [(None, None), *((None, key) for key in keys)]
    pairs = sorted(itertools.permutations(keys, 2), key=lambda cut: cut[0] == TOKENS)  # rather the tokens within a name
    best = min((_split(answers, places, *cut) for cut in ones), key=lambda split: split.cost)
    if best.cost > 2 * _cost(answers):  # else no two regions are better
        best = min((best, *(_split(answers, places, *cut) for cut in pairs)), key=lambda split: split.cost)
    return sorted(best.regions, key=lambda region: -len(region.members))


def _keys(places: Sequence[Place]) -> list[str]:
    """The tokens first, a name before the numbers it stands for."""
    keys = dict.fromkeys(key for place in places for key in place)
    return sorted(keys, key=lambda key: (key != TOKENS, key.startswith("config.") and not key.endswith(".name")))


def _split(answers: Sequence[Hashable], places: Sequence[Place], outer: str | None, inner: str | None) -> _Split:
    cells: dict[Any, dict[Any, list[int]]] = {}
    for index, place in enumerate(places):
        value = place.get(inner) if inner else None
        cells.setdefault(place.get(outer) if outer else None, {}).setdefault(value, []).append(index)
    most = {o: {i: _most(answers, at) for i, at in row.items()} for o, row in cells.items()}
    found = []
    for alike in _alike(most):
        profile = {value: answer for o in alike for value, answer in most[o].items()}
        for values in _runs(profile):
            inside = [index for o in alike for value in values for index in cells[o].get(value, ())]
            answer = profile[values[0]]
            words = [_words(outer, alike, list(most)), _words(inner, values, list(profile))]
            members = [index for index in inside if answers[index] == answer]
            found.append(Region(", ".join(filter(None, words)), answer, members, len(inside)))
    odd = len(answers) - sum(len(region.members) for region in found)
    return _Split(found, odd + len(found) * _cost(answers))


def _cost(answers: Sequence[Hashable]) -> float:
    """Of a region, in odd settings."""
    return max(0.6, _ALLOWANCE * len(answers))


def _most(answers: Sequence[Hashable], at: Sequence[int]) -> Hashable:
    return Counter(answers[index] for index in at).most_common(1)[0][0]


def _alike(most: Mapping[Any, Mapping[Any, Hashable]]) -> list[list[Any]]:
    """The outer values in groups; of numbers only neighbours are grouped."""
    groups: list[list[Any]] = []
    for value in _ordered(most):
        open_ = [groups[-1]] if groups and _is_number(value) else groups
        group = next((each for each in open_ if most[each[0]] == most[value]), None)
        if group is None:
            groups.append([value])
        else:
            group.append(value)
    return groups


def _runs(profile: Mapping[Any, Hashable]) -> Iterator[list[Any]]:
    """The inner values with one answer; of numbers only neighbours."""
    ordered = _ordered(profile)
    if all(map(_is_number, ordered)):
        for _, run in itertools.groupby(ordered, lambda value: profile[value]):
            yield list(run)
        return
    for answer in dict.fromkeys(profile[value] for value in ordered):
        yield [value for value in ordered if profile[value] == answer]


def _ordered(values: Mapping[Any, Any]) -> list[Any]:
    if all(map(_is_number, values)):
        return sorted(values)
    return sorted(values, key=lambda value: (value is None, str(value)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _words(key: str | None, values: Sequence[Any], all_values: Sequence[Any]) -> str:
    if key is None or len(values) == len(all_values):
        return ""
    if not all(map(_is_number, all_values)):
        return " and ".join(named(key, value) for value in values)
    low, high = values[0], values[-1]
    if key != TOKENS:
        return f"{_last(key)} {low:g}" if low == high else f"{_last(key)} {low:g} to {high:g}"
    if low == high:
        return f"T = {low}"
    if low == min(all_values):
        return f"T <= {high}"
    return f"T >= {low}" if high == max(all_values) else f"T = {low} to {high}"


def named(key: str, value: Any) -> str:
    """An option by its name, a value of the configuration with its key: `bf16`, `top_k=2`."""
    if value is None:
        return f"no {_last(key)}"
    return f"{_last(key)}={value}" if key.startswith("config.") or _is_number(value) else str(value)


def _last(key: str) -> str:
    """Of `config.model.shape.name`, it is the shape that has this name."""
    return key.removesuffix(".name").rsplit(".", 1)[-1]
