"""analyses/expert_cache.py: hit rates, loads and times by hand, and what is fitted where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_lab.analyses import expert_cache
from moe_lab.analyses.findings import Findings
from moe_lab.records.trace import Layer, TraceWriter, tokens_of
from tests.analyses import traces

CFG: dict[str, Any] = {
    "policy": ["lru", "static", "static_hindsight", "belady"],
    "prefetch": ["none"],
    "capacity": [1],
    "expert_mb": None,
    "gb_per_s": None,
    "compute_ms": None,
}


def found(path: Path, **changes: Any) -> Findings:
    return traces.found(path, expert_cache, CFG | changes)


def rows(findings: Findings, **chosen: Any) -> pd.DataFrame:
    table = findings.tables["expert_cache"]
    for name, value in chosen.items():
        table = table[table[name] == value]
    return table


def test_a_static_cache_is_fitted_on_the_other_text(tmp_path: Path) -> None:
    """Text 0 uses expert 0 twice and 1 once, text 1 uses 1 three times: each is judged by what the other likes."""
    path = traces.write(tmp_path / "x.trace", [[[0], [0], [1]], [[1], [1], [1]]], 4, domains=[0, 1])
    findings = found(path)
    static = rows(findings, policy="static").set_index("part")["hit_rate"]
    assert static.to_dict() == pytest.approx({"text 0": 1 / 3, "text 1": 0, "all": 1 / 6})
    knowing = rows(findings, policy="static_hindsight").set_index("part")["hit_rate"]
    assert knowing["all"] == pytest.approx(4 / 6)  # expert 1 has four of six uses
    assert rows(findings, policy="lru", part="all")["hit_rate"].item() == pytest.approx(4 / 6)


def test_loads_and_times_by_hand(tmp_path: Path) -> None:
    """0 1 0 with room for one: three misses of 2 MB; at 4 GB/s each takes 0.5 ms, on top of 1 ms of computation."""
    path = traces.write(tmp_path / "x.trace", [[[0], [1], [0]]], 4)
    (row,) = rows(found(path, gb_per_s=4.0, compute_ms=1.0), policy="lru", part="all").to_dict("records")
    assert (row["hit_rate"], row["misses_per_token"], row["mb_per_token"]) == (0, 1, 2)
    assert row["ms_per_token"] == pytest.approx(1.5) and (row["tokens"], row["units"]) == (3, 3)
    other = rows(found(path, gb_per_s=4.0, compute_ms=1.0, expert_mb=8.0), policy="lru", part="all")
    assert other["ms_per_token"].item() == pytest.approx(3.0)
    path = traces.write(tmp_path / "y.trace", [[[0], [1], [0]]], 4, mb=None)
    assert rows(found(path, gb_per_s=4.0, compute_ms=1.0), policy="lru", part="all")["mb_per_token"].isna().all()


def test_a_prefetch_by_hand(tmp_path: Path) -> None:
    """The experts of the token before, in a buffer: static holds 0 only, so 1 after 1 is found there.

    0 1 1 0: with the prefetch 1 is missed once and prefetched twice (before the third and the fourth token). At 1 GB/s
    an expert takes 2 ms: the two of the prefetch, 1 ms a token, fit behind 1.5 ms of computation.
    """
    path = traces.write(tmp_path / "x.trace", [[[0], [1], [1], [0]], [[0]] * 6], 4, domains=[0, 1])
    findings = found(path, policy=["static"], prefetch=["none", "previous_token"], gb_per_s=1.0, compute_ms=1.5)
    none, previous = rows(findings, part="text 0").to_dict("records")
    assert (none["hit_rate"], none["misses_per_token"], none["loads_per_token"]) == (0.5, 0.5, 0.5)
    assert (previous["hit_rate"], previous["misses_per_token"], previous["loads_per_token"]) == (0.75, 0.25, 0.75)
    assert none["ms_per_token"] == pytest.approx(1.5 + 1.0) and previous["ms_per_token"] == pytest.approx(1.5 + 0.5)


def test_a_sequence_does_not_prefetch_from_the_one_before(tmp_path: Path) -> None:
    """Its first token has none before it."""
    path = traces.write(tmp_path / "x.trace", [[[3]], [[1], [1]]], 4)
    with_lru = rows(found(path, policy=["lru"], prefetch=["previous_token"]), part="all")
    assert with_lru["loads_per_token"].item() == pytest.approx(2 / 3)


def test_the_bound_has_no_prefetch(tmp_path: Path) -> None:
    """Alone with one there is nothing to compute, which is said."""
    path = traces.write(tmp_path / "x.trace", [[[0], [1]]], 4)
    findings = found(path, policy=["belady"], prefetch=["previous_token"])
    assert "There is nothing to compute" in findings.notes[0] and not findings.tables


def test_the_sentences_name_the_best_and_the_bound(tmp_path: Path) -> None:
    """And the capacity nearest to half of the experts."""
    path = traces.random(tmp_path / "x.trace", 12, 40)
    findings = found(path, policy=list(expert_cache.POLICIES), capacity=None, prefetch=["none", "previous_token"])
    table = findings.tables["expert_cache"]
    assert sorted(set(table["capacity"])) == [2, 4, 6, 8, 10, 12, 14]
    assert not ((table["policy"] == "belady") & (table["prefetch"] == "previous_token")).any()
    here = rows(findings, part="all", prefetch="none", capacity=8).set_index("policy")["hit_rate"]
    best = here.drop(["belady", "static_hindsight"]).idxmax()
    assert f"with {best}" in findings.sentences[0] and f"{100 * here[best]:.0f}" in findings.sentences[0]
    assert f"belady, the bound, {100 * (here['belady'] - here[best]):.1f} above" in findings.sentences[1]
    for policy in set(table["policy"]) - {"belady"}:
        for capacity in set(table["capacity"]):
            chosen = rows(findings, part="all", prefetch="none", capacity=capacity).set_index("policy")["hit_rate"]
            assert chosen[policy] <= chosen["belady"] + 1e-12
    (plot,) = findings.plots
    assert {line.name for line in plot.lines} == set(expert_cache.POLICIES)


def test_a_prefetch_by_the_layer_before_by_hand(tmp_path: Path) -> None:
    """In both texts 0 is followed by 3 and 1 by 2: what is fitted on one text is right on the other.

    The first layer has none before it: its misses stay. In the second none is left, and each token loads what it needs.
    """
    with TraceWriter(tmp_path / "x.trace", [Layer(0, 4, 1, 1), Layer(1, 4, 1, 1)], domains=["a", "b"]) as writer:
        for domain, first in enumerate(([0, 1, 0, 1], [1, 0, 1, 0])):
            ids = np.array(first)[:, None]
            writer.add(tokens_of(np.full(4, domain), np.arange(4), domain=domain), [ids, 3 - ids])
    none, by_layer, by_id = (
        found(tmp_path / "x.trace", policy=["lru"], prefetch=[prefetch])
        for prefetch in ("none", "layer_before", "token_id")
    )
    (plain,), (guessed,) = (rows(findings, part="all").to_dict("records") for findings in (none, by_layer))
    assert plain["misses_per_token"] == plain["loads_per_token"] == 2 - 2 / 8  # 1 after 1 where the texts meet
    assert guessed["misses_per_token"] == 1 - 1 / 8 and guessed["loads_per_token"] == plain["loads_per_token"]
    assert "needs ids" in by_id.notes[0]


def test_a_prefetch_by_guesses_needs_a_trace_that_has_them(tmp_path: Path) -> None:
    """The guess is the first k choices: of two tokens, the second's expert is among them and costs no miss."""
    layers, ids = [Layer(0, 4, 1, 1_000_000)], np.array([[0], [1]])
    ahead = np.array([[2, 0], [1, 3]])
    with TraceWriter(tmp_path / "x.trace", layers, ("ahead",)) as writer:
        writer.add(tokens_of(np.zeros(2), np.arange(2)), [ids], ahead=[ahead])
    findings = found(tmp_path / "x.trace", policy=["lru"], capacity=[1], prefetch=["ahead"])
    row = rows(findings, part="all").to_dict("records")[0]
    assert row["hit_rate"] == 1 / 2 and row["loads_per_token"] == 3 / 2  # of 2, 0 and 1
    path = traces.random(tmp_path / "y.trace", 2, 4)
    with pytest.raises(ValueError, match=r"expert_cache\.prefetch=ahead: the trace has no such guesses"):
        found(path, policy=["lru"], capacity=[1], prefetch=["ahead"])
