"""analyses/cache_loads.py: one cache for all layers against the reference, static, layers of unlike sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_lab.analyses import cache_policies
from moe_lab.analyses.cache_loads import Part, in_all, of_layer, of_model
from moe_lab.analyses.routes import Routes, routes_of, view_of
from moe_lab.records.trace import Layer, Trace, TraceWriter, tokens_of
from tests.analyses import traces

CFG: dict[str, Any] = {"scope": ["model"], "policy": ["lru"], "prefetch": ["none"], "capacity": [2]}


def unlike(path: Path, sequences: int = 6, length: int = 20) -> Path:
    """Three layers of 3, 6 and 4 experts, with 1, 3 and 2 for a token; two texts in turn."""
    rng, layers = np.random.default_rng(1), [Layer(0, 3, 1), Layer(2, 6, 3), Layer(3, 4, 2)]
    with TraceWriter(path, layers, domains=["a", "b"]) as writer:
        for index in range(sequences):
            ids = [rng.permuted(np.tile(np.arange(at.n_experts), (length, 1)), axis=1)[:, : at.top_k] for at in layers]
            writer.add(tokens_of(np.full(length, index), np.arange(length), domain=index % 2), ids)
    return path


def all_routes(path: Path) -> tuple[list[Routes], list[Layer]]:
    with Trace(path) as trace:
        view = view_of(trace)
        found = [routes_of(trace, index, view, with_before=True) for index in range(len(trace.layers))]
        return found, list(trace.layers)


def shared(path: Path, **changes: Any) -> list[Part]:
    routes, layers = all_routes(path)
    return of_model(lambda: routes, CFG | changes, layers, 2)


@pytest.mark.parametrize("prefetch", [pytest.param(name, id=name) for name in ("none", "previous_token")])
@pytest.mark.parametrize("policy", [pytest.param(policy, id=policy) for policy in cache_policies.POLICIES])
def test_layers_in_turn(policy: str, prefetch: str, tmp_path: Path) -> None:
    """Row by row in Python: token by token, layer by layer, experts numbered through; 2 a layer are 6 in all."""
    routes, layers = all_routes(unlike(tmp_path / "x.trace"))
    view, first, slots = routes[0].view, [0, 3, 9], 3
    ids, guessed = [], []
    for t in range(view.n_tokens):
        for layer, at in enumerate(routes):
            for rows, of in ((ids, t), (guessed, t - 1 if not view.is_first[t] else None)):
                row = [] if of is None else [first[layer] + expert for expert in at.ids_TK[of].tolist()]
                rows.append([*row, *[-1] * (slots - len(row))])
    given = None if prefetch == "none" else np.array(guessed)
    wanted = cache_policies.reference(policy, np.array(ids), 6, np.repeat([0, 1, 2], [3, 6, 4]), given)
    found = shared(tmp_path / "x.trace", policy=[policy], prefetch=[prefetch])
    if policy == "belady" and prefetch != "none":
        assert all(counts == {} for counts, _ in found)
        return
    for layer, (counts, used_U) in enumerate(found):
        for sums_CU, values_T in zip(counts[policy, prefetch], wanted, strict=True):
            assert sums_CU[0].tolist() == view.by_unit(values_T[layer::3]).tolist()
        assert used_U.tolist() == [20 * layers[layer].top_k] * 6


def test_a_layer_with_fewer_experts_than_room_counts_what_it_has() -> None:
    """So that both scopes hold as many in all."""
    assert [in_all(capacity, [Layer(0, 3, 1), Layer(1, 6, 1)]) for capacity in (2, 4, 9)] == [4, 7, 9]


def test_static_shares_by_use(tmp_path: Path) -> None:
    """Text a uses 0 in both layers, text b 1 and 2. Room for one a layer holds the two that the other text uses.

    Room for two has four: also the first two that were not used, which are of the first layer.
    """
    layers = [Layer(0, 4, 1), Layer(1, 4, 1)]
    with TraceWriter(tmp_path / "x.trace", layers, domains=["a", "b"]) as writer:
        for domain, used in enumerate(((0, 0), (1, 2))):
            ids = [np.full((3, 1), expert) for expert in used]
            writer.add(tokens_of(np.full(3, domain), np.arange(3), domain=domain), ids)
    (first, _), (second, _) = shared(tmp_path / "x.trace", policy=["static", "static_hindsight"], capacity=[1, 2])
    assert first["static", "none"][0].tolist() == [[3, 3], [0, 0]]
    assert second["static", "none"][0].tolist() == [[3, 3], [3, 3]]
    # In hindsight each of the four has 3 uses; 0 and 1 of the first layer come first, then those of the second
    assert first["static_hindsight", "none"][0].tolist() == [[0, 0], [0, 0]]
    assert second["static_hindsight", "none"][0].tolist() == [[3, 3], [0, 0]]


def test_each_scope_is_computed_where_it_is_asked_for(tmp_path: Path) -> None:
    """least_stale in layers that do not share is lru, and is left out; the trace is not read for nothing."""
    routes, layers = all_routes(unlike(tmp_path / "x.trace"))
    asked = CFG | {"policy": ["lru", "least_stale"]}
    assert of_layer(routes[0], asked, layers)[0] == {}
    assert list(of_layer(routes[0], asked | {"scope": ["layer"]}, layers)[0]) == [("lru", "none")]

    def read() -> list[Routes]:
        raise AssertionError

    assert of_model(read, asked | {"scope": ["layer"]}, layers, 1) == []


def test_a_prefetch_by_the_layer_before_has_none_in_the_first(tmp_path: Path) -> None:
    """Its loads are its misses; those of the others are more."""
    path = traces.random(tmp_path / "x.trace", 4, 16)
    (first, _), (second, _) = shared(path, prefetch=["layer_before"])
    misses_CU, loads_CU = first["lru", "layer_before"]
    assert np.array_equal(misses_CU, loads_CU)
    assert (second["lru", "layer_before"][1] > second["lru", "layer_before"][0]).any()


def test_too_many_experts_are_one_line(tmp_path: Path) -> None:
    """Before anything is read."""
    routes, layers = all_routes(unlike(tmp_path / "x.trace"))
    large = [replace(layer, n_experts=20_000) for layer in layers[:2]]
    with pytest.raises(ValueError, match=r"expert_cache\.scope=model: .* 40000 experts .* expert_cache\.scope=layer"):
        of_model(lambda: routes, CFG, large, 1)
