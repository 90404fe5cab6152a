"""What the fast tests have of a product of parameters: mark `thinned`; the rest of the product is slow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import pytest

Case = Sequence[str]
"""Of each `parametrize` the id of its value."""


def covering(cases: Sequence[Case], of: int) -> list[Case]:
    """Few of the cases that have every value of every parameter (of=1), or every pair of values (of=2).

    Among equals the one whose values were chosen least: what must be there often is with different values.
    """
    values = [set(enumerate(case)) for case in cases]
    parts = [set(combinations(enumerate(case), min(of, len(case)))) for case in cases]
    left = set().union(*parts)
    chosen: list[Case] = []
    used: Counter[tuple[int, str]] = Counter()
    while left:
        best = max(
            range(len(cases)), key=lambda index: (len(parts[index] & left), -sum(used[v] for v in values[index]))
        )
        chosen.append(cases[best])
        left -= parts[best]
        used.update(values[best])
    return chosen


def thin(items: Sequence[pytest.Item]) -> None:
    """Mark as slow what the marked tests can do without. What is slow, or for a GPU, stands for nothing here."""
    functions: dict[str, list[pytest.Function]] = {}
    for item in items:
        if item.get_closest_marker("thinned") and not (
            item.get_closest_marker("slow") or item.get_closest_marker("gpu")
        ):
            assert isinstance(item, pytest.Function)
            functions.setdefault(item.nodeid.split("[")[0], []).append(item)
    for found in functions.values():
        marker = found[0].get_closest_marker("thinned")
        assert marker is not None
        chosen = covering([item.callspec._idlist for item in found], *marker.args)
        for item in found:
            if item.callspec._idlist not in chosen:
                item.add_marker(pytest.mark.slow)
