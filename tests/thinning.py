"""What the fast tests have of a product of parameters: mark `thinned`; the rest of the product is slow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import combinations

import pytest

Case = Sequence[str]
"""Of each `parametrize` the id of its value."""


def covering(cases: Sequence[Case], of: int, empty: Collection[str] = ()) -> list[Case]:
    """Few of the cases that have every value of every parameter (of=1), or every pair of values (of=2).

    A case with an `empty` value (no token, say) checks little: it stands for what no other case has. Among equals the
    one whose values were chosen least: what must be there often is with different values.
    """
    values = [set(enumerate(case)) for case in cases]
    parts = [set(combinations(enumerate(case), min(of, len(case)))) for case in cases]
    is_full = [not set(case) & set(empty) for case in cases]
    of_full = set().union(*(part for part, full in zip(parts, is_full, strict=True) if full))
    parts = [part if full else part - of_full for part, full in zip(parts, is_full, strict=True)]
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
    """Mark as slow what the marked tests can do without. What is slow, skipped, or for a GPU stands for nothing."""
    functions: dict[str, list[pytest.Function]] = {}
    for item in items:
        if not item.get_closest_marker("thinned"):
            continue
        assert isinstance(item, pytest.Function)
        name = item.nodeid.split("[")[0]
        if any(mark.name in ("slow", "gpu") for mark in item.function.pytestmark):  # of the whole function
            raise pytest.UsageError(f"{name}: `thinned` has no effect beside `slow` or `gpu`; remove it.")
        if not any(item.get_closest_marker(mark) for mark in ("slow", "gpu", "skip")):
            functions.setdefault(name, []).append(item)
    for found in functions.values():
        marker = found[0].get_closest_marker("thinned")
        assert marker is not None
        chosen = covering([item.callspec._idlist for item in found], *marker.args, **marker.kwargs)
        for item in found:
            if item.callspec._idlist not in chosen:
                item.add_marker(pytest.mark.slow)
