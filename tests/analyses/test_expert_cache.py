"""analyses/expert_cache.py: hit rates, loads and times by hand, and what is fitted where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_lab.analyses import cache_policies, expert_cache
from moe_lab.analyses.findings import Findings
from moe_lab.analyses.routes import routes_of, view_of
from moe_lab.intervals import ratio_of_sums
from moe_lab.records.trace import Layer, Trace, TraceWriter, tokens_of
from tests.analyses import traces

CFG: dict[str, Any] = {
    "scope": ["layer"],
    "policy": ["lru", "static", "static_hindsight", "belady"],
    "prefetch": ["none"],
    "capacity": [1],
    "expert_mb": None,
    "gb_per_s": None,
    "compute_ms": None,
    "decode_run": None,
    "model": None,
}


def found(path: Path, **changes: Any) -> Findings:
    return traces.found(path, expert_cache, CFG | changes)


def rows(findings: Findings, **chosen: Any) -> pd.DataFrame:
    table = findings.tables["expert_cache"]
    for name, value in chosen.items():
        table = table[table[name] == value]
    return table


def test_a_cache_of_more_than_a_layer_has_is_refused(tmp_path: Path) -> None:
    """It would hold all, and look like a result."""
    path = traces.write(tmp_path / "x.trace", [[[0], [1]]], 4)
    with pytest.raises(ValueError, match=r"expert_cache\.capacity=5: a layer has 4 experts"):
        found(path, capacity=[2, 5])


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
    findings = found(
        path,
        scope=["layer", "model"],
        policy=list(expert_cache.POLICIES),
        capacity=None,
        prefetch=["none", "previous_token"],
    )
    table = findings.tables["expert_cache"]
    assert sorted(set(table["capacity"])) == [2, 4, 6, 8, 10, 12, 14]
    assert not ((table["policy"] == "belady") & (table["prefetch"] == "previous_token")).any()
    assert set(rows(findings, scope="layer")["policy"]) == set(expert_cache.POLICIES) - {
        "least_stale"
    }  # it is lru there
    assert set(rows(findings, scope="model")["policy"]) == set(expert_cache.POLICIES)
    opens = {"layer": "A cache of 8 of 16 experts a layer", "model": "One cache of 16 of 32 experts, which all layers"}
    for scope, first in opens.items():
        here = rows(findings, scope=scope, part="all", prefetch="none", capacity=8).set_index("policy")["hit_rate"]
        best = here.drop(["belady", "static_hindsight"]).idxmax()
        (at,) = (index for index, sentence in enumerate(findings.sentences) if sentence.startswith(first))
        assert f"with {best}" in findings.sentences[at] and f"{100 * here[best]:.0f}" in findings.sentences[at]
        assert f"belady, the bound, {100 * (here['belady'] - here[best]):.1f} above" in findings.sentences[at + 1]
        for capacity in set(table["capacity"]):
            chosen = rows(findings, scope=scope, part="all", prefetch="none", capacity=capacity)
            chosen = chosen.set_index("policy")["hit_rate"]
            assert (chosen <= chosen["belady"] + 1e-12).all()
    of_layers, of_all = findings.plots
    assert (
        {line.name for line in of_all.lines}
        == set(expert_cache.POLICIES)
        == {
            "least_stale",
            *(line.name for line in of_layers.lines),
        }
    )


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


def test_what_sharing_and_a_policy_gain_by_hand(tmp_path: Path) -> None:
    """Two layers of two experts, one held in each or two in all; two sequences of two tokens.

    The first layer takes 0 0, then 1 1; the second 0 1, then 0 1. Of their own: misses of the layers 1 + 2, then 1 + 2.
    Shared, lru: 0 and a miss, 0 is there and b takes the place of a; 1 takes that of 0, a that of b; 1 is there, and b
    takes that of a: misses 3 and 3. Over the caches of the layers that is nothing, with an interval of nothing.
    """
    layers = [Layer(0, 2, 1, 1_000_000), Layer(1, 2, 1, 1_000_000)]
    with TraceWriter(tmp_path / "x.trace", layers) as writer:
        for index, first in enumerate(([0, 0], [1, 1])):
            ids = [np.array(first)[:, None], np.array([[0], [1]])]
            writer.add(tokens_of(np.full(2, index), np.arange(2)), ids)
    cfg = {"scope": ["layer", "model"], "policy": ["lru", "least_stale", "belady"], "capacity": [1, 2]}
    findings = found(tmp_path / "x.trace", **cfg)
    (own,) = rows(findings, scope="layer", policy="lru", part="all", capacity=1).to_dict("records")
    assert (own["hit_rate"], own["experts_held"]) == (1 - 6 / 8, 2) and np.isnan(own["over_layers"])
    of_lru, of_stale = (
        rows(findings, scope="model", policy=policy, part="all", capacity=1).iloc[0]
        for policy in ("lru", "least_stale")
    )
    assert (of_lru["hit_rate"], of_lru["experts_held"], of_lru["misses_per_token"]) == (1 - 6 / 8, 2, 6 / 4)
    assert of_lru["over_layers"] == of_lru["over_layers_ci95_low"] == 0 and np.isnan(of_lru["over_lru"])
    assert of_stale["over_lru"] == of_stale["hit_rate"] - of_lru["hit_rate"] and of_stale["over_layers"] == 0
    everything = rows(findings, scope="model", part="all", capacity=2).set_index("policy")
    assert everything["misses_per_token"].to_dict() == {"lru": 1, "least_stale": 1, "belady": 0}
    assert (everything["experts_held"] == 4).all()


def test_differences_have_the_interval_of_pairs(tmp_path: Path) -> None:
    """As ratio_of_sums gives it for the misses of each sequence, which are counted again here."""
    path = traces.random(tmp_path / "x.trace", 12, 40)
    findings = found(path, scope=["layer", "model"], policy=["lru", "lfu"], capacity=[4])
    with Trace(path) as trace:
        view = view_of(trace)
        all_routes = [routes_of(trace, index, view) for index in range(2)]
    misses = {}
    for policy in ("lru", "lfu"):
        of_layers = [cache_policies.reference(policy, r.ids_TK, 4, np.zeros(16, int))[0] for r in all_routes]
        misses["layer", policy] = view.by_unit(np.sum(of_layers, axis=0))
        ids = np.stack([all_routes[0].ids_TK, all_routes[1].ids_TK + 16], axis=1).reshape(-1, 2)
        of_rows = cache_policies.reference(policy, ids, 8, np.repeat([0, 1], 16))[0]
        misses["model", policy] = view.by_unit(of_rows.reshape(-1, 2).sum(axis=1))
    used = np.full(12, 40 * 2 * 2)
    for scope, policy, name, peer in (
        ("layer", "lfu", "over_lru", ("layer", "lru")),
        ("model", "lfu", "over_lru", ("model", "lru")),
        ("model", "lru", "over_layers", ("layer", "lru")),
        ("model", "lfu", "over_layers", ("layer", "lfu")),
    ):
        (row,) = rows(findings, scope=scope, policy=policy, part="all").to_dict("records")
        estimate = ratio_of_sums(misses[peer] - misses[scope, policy], used)
        assert [row[f"{name}{end}"] for end in ("", "_ci95_low", "_ci95_high")] == pytest.approx(list(estimate))
    sentence = next(text for text in findings.sentences if "sharing has" in text)
    best = max(("lru", "lfu"), key=lambda policy: -misses["model", policy].sum())
    gained = 100 * (misses["layer", best] - misses["model", best]).sum() / used.sum()
    assert f"With {best} sharing has {gained:+.1f} points [" in sentence


def test_bytes_of_an_expert_that_nobody_knows_are_said(tmp_path: Path) -> None:
    """Where a time is asked for."""
    path = traces.write(tmp_path / "x.trace", [[[0], [1]]], 4, mb=None)
    timed: dict[str, Any] = {"policy": ["lru"], "gb_per_s": 4.0, "compute_ms": 1.0}
    assert "set expert_cache.expert_mb" in found(path, **timed).notes[-1]
    assert "expert_cache.decode_run is a run of it was not checked" in found(path, **timed, decode_run="x").notes[-1]
    assert "expert_cache.decode_run" not in found(path, **timed, decode_run="x", model="olmoe").notes[-1]
    assert not any("expert_mb" in note for note in found(path, policy=["lru"]).notes)
