"""results/pareto.py: what dominates what, from intervals."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moe_lab.results.contest import Cell, Quality, Setting
from moe_lab.results.pareto import Dominance, dominated, sentences

NAN = math.nan


def cell(variant: str, bits: float | None, ratio: float = NAN, mb: float = NAN, **more: Any) -> Cell:
    """Intervals of 0.02 bits, and of 2 % of the ratio."""
    quality = None if bits is None else Quality("delta", bits, bits - 0.01, bits + 0.01, 2.0)
    found = Cell(variant, variant == "native", (ratio, 0.99 * ratio, 1.01 * ratio), quality, True, variant, mb)
    return found._replace(**more)


def of(*cells: Cell, **place: Any) -> Setting:
    return Setting(place, "native", list(cells))


NATIVE = cell("native", 0.0, 1.0, 10.0)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        pytest.param(cell("x", 0.0, 1.2, 10.0), "no better quality at more time", id="slower"),
        pytest.param(cell("x", 0.0, 1.0, 12.0), "no better quality at more bytes", id="reads-more"),
        pytest.param(cell("x", 0.0, 1.2, 12.0), "no better quality at more time and bytes", id="both"),
        pytest.param(cell("x", 0.3, 1.0, 10.0), "worse quality and no less time seen", id="worse"),
        pytest.param(cell("x", 0.3, 1.2, 10.0), "worse quality at more time", id="worse-and-slower"),
        pytest.param(cell("x", 0.3, 1.2, 9.0), None, id="reads-less"),
        pytest.param(cell("x", 0.3, 0.9, 10.0), None, id="faster"),
        pytest.param(cell("x", 0.3, 1.0)._replace(ratio=(0.99, 0.7, 0.97)), None, id="surely-faster-by-little"),
        pytest.param(cell("x", 0.0, 1.0, 10.2), None, id="reads-hardly-more"),
        pytest.param(cell("x", -0.1, 1.2, 12.0), None, id="better"),
        pytest.param(cell("x", -0.02, 1.2, 12.0), None, id="looks-better"),
        pytest.param(cell("x", -0.005, 1.2, 12.0), "no better quality at more time and bytes", id="does-not-matter"),
        pytest.param(cell("x", 0.0, 1.02, 10.0), None, id="as-good-in-all"),
        pytest.param(cell("x", 0.3, 1.0), "worse quality and no less time seen", id="bytes-unknown"),
        pytest.param(cell("x", 0.0, NAN, 12.0), "no better quality at more bytes", id="not-timed"),
        pytest.param(cell("x", 0.3, NAN, 10.0), "worse quality and no fewer bytes seen", id="not-timed-worse"),
        pytest.param(cell("x", 0.3), None, id="quality-alone"),
        pytest.param(cell("x", None, 1.2, 12.0), None, id="quality-unknown"),
        pytest.param(cell("x", 0.0, 1.2, 12.0, choice="native"), None, id="another-kernel-of-the-same"),
    ],
)
def test_one_is_dominated_or_not(other: Cell, why: str | None) -> None:
    """By native; native never is."""
    expected = {} if why is None else {"x": Dominance("native", why)}
    assert dominated(of(NATIVE, other)) == expected


def test_what_sees_later_tokens_dominates_nothing_that_does_not() -> None:
    """Its bits are flattered; another like it may be dominated by it."""
    seer, other = cell("seer", -0.5, 0.5, 5.0, is_causal=False), cell("other", 0.0, 1.2, 12.0, is_causal=False)
    assert dominated(of(NATIVE, seer)) == {}
    assert dominated(of(seer, other)) == {"other": Dominance("seer", "worse quality at more time and bytes")}


def test_the_one_that_dominates_is_on_the_front() -> None:
    """`b` dominates `c`, and is dominated itself by `a`."""
    a, b, c = cell("a", 0.0, 1.0, 5.0), cell("b", 0.0, 1.2, 6.0), cell("c", 0.5, 1.5, 7.0)
    assert {variant: at.by for variant, at in dominated(of(c, b, a)).items()} == {"b": "a", "c": "a"}


def test_an_interval_that_is_missing_dominates_nothing() -> None:
    """Bits without an interval, unless they are the checkpoint's own."""
    bare = cell("bare", 0.3, 1.2, 12.0, quality=Quality("delta", 0.3, NAN, NAN, 2.0))
    assert dominated(of(NATIVE, bare)) == {}
    own = cell("native", 0.0, 1.0, 10.0, quality=Quality("delta", 0.0, NAN, NAN, 2.0))
    assert dominated(of(own, cell("x", 0.3, 1.2, 12.0))).keys() == {"x"}


def test_sentences_say_who_and_where() -> None:
    """Those with one reason share one; a region is named where it does not hold everywhere."""
    worse = [cell(name, 0.3, 1.2, 12.0) for name in ("x", "y")]
    settings = [of(NATIVE, *worse, cell("z", 0.3, 0.8, 8.0), T=16), of(NATIVE, *worse, cell("z", 0.3, 1.2, 12.0), T=64)]
    assert sentences(settings) == [
        "x and y are dominated by native: worse quality at more time and bytes",
        "z is dominated by native at T = 64: worse quality at more time and bytes",
    ]
    assert sentences([of(NATIVE, cell("z", 0.3, 0.8, 8.0))]) == []
