"""What a cache of experts loads for each unit of a trace, by policy and prefetch: one cache a layer, or one for all.

Both have room for the same number of experts, C in each layer. The policies are those of cache_policies.py, and two
that never change what they hold: `static` holds the experts that the other parts of the trace use most; a part is a
text, or a half of the trace (routes.py). `static_hindsight` knows the text itself. A prefetch loads as many experts as
a token uses, guessed (guesses.py) from the token before, the token's id, its experts in the layer before, or by its own
router, asked before its input is there. Without a guess nothing is prefetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from moe_lab.analyses.cache_policies import MOST_EXPERTS, simulate
from moe_lab.analyses.cache_policies import POLICIES as SIMULATED
from moe_lab.analyses.guesses import RECORDED, guess, uses
from moe_lab.analyses.routes import Routes
from moe_lab.records.trace import Layer

SCOPES = ("layer", "model")

Counts = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]
"""By policy and prefetch: (misses, loads) of each capacity and unit, [C, U]."""
Part = tuple[Counts, np.ndarray]
"""Of one layer: (counts, experts used in each unit [U])."""


def capacities(cfg: Mapping[str, Any], layers: Sequence[Layer]) -> list[int]:
    """Those asked for, or eighths of the experts of a layer. Raises `ValueError` for more than a layer has."""
    E = max(layer.n_experts for layer in layers)
    if (most := max(cfg["capacity"] or [1])) > E:
        raise ValueError(f"expert_cache.capacity={most}: a layer has {E} experts; give at most as many.")
    return sorted(set(cfg["capacity"] or [max(E * eighths // 8, 1) for eighths in range(1, 8)]))


def in_all(capacity: int, layers: Sequence[Layer]) -> int:
    """Experts that caches of `capacity` in each layer hold together."""
    return sum(min(capacity, layer.n_experts) for layer in layers)


def of_layer(routes: Routes, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> Part:
    """What the caches of their own load in one layer; no counts without that scope."""
    view, found, sizes = routes.view, Counts(), capacities(cfg, layers)
    layer_E, places = np.zeros(routes.layer.n_experts, int), _places(uses(routes))
    for prefetch, (guessed_TK,) in _guessed([routes], cfg) if "layer" in cfg["scope"] else ():
        for policy in _policies(cfg, "layer", prefetch):
            if policy in SIMULATED:
                found[policy, prefetch] = simulate(policy, routes.ids_TK, sizes, layer_E, view.unit, guessed_TK)
            else:
                found[policy, prefetch] = _static(routes, places[policy], sizes, guessed_TK)
    return found, view.by_unit((routes.ids_TK >= 0).sum(axis=1))


def of_model(
    read: Callable[[], list[Routes]], cfg: Mapping[str, Any], layers: Sequence[Layer], n_threads: int
) -> list[Part]:
    """What one cache for all layers loads in each layer; nothing without that scope. `read` gives all layers.

    Raises:
        ValueError: the layers have too many experts together.
    """
    if "model" not in cfg["scope"]:
        return []
    first_L = np.cumsum([0, *(layer.n_experts for layer in layers)])
    if first_L[-1] > MOST_EXPERTS:
        raise ValueError(
            f"expert_cache.scope=model: the layers have {first_L[-1]} experts together, more than {MOST_EXPERTS}; "
            "write expert_cache.scope=layer."
        )
    all_routes = read()
    view, L = all_routes[0].view, len(layers)
    ids_TK = _in_turn([routes.ids_TK for routes in all_routes], first_L)
    layer_E = np.repeat(np.arange(L), np.diff(first_L))
    unit_T = (view.unit[:, None].astype(np.int32) * L + np.arange(L, dtype=np.int32)).reshape(-1)
    sizes = [in_all(capacity, layers) for capacity in capacities(cfg, layers)]
    places = _places(np.concatenate([uses(routes) for routes in all_routes], axis=1))
    parts: list[Part] = [(Counts(), view.by_unit((routes.ids_TK >= 0).sum(axis=1))) for routes in all_routes]
    for prefetch, guessed in _guessed(all_routes, cfg):
        policies = list(_policies(cfg, "model", prefetch))
        guessed_TK = None if prefetch == "none" else _in_turn(guessed, first_L)
        with ThreadPoolExecutor(n_threads) as threads:  # the compiled simulator does not hold Python's lock
            asked = {
                policy: threads.submit(simulate, policy, ids_TK, sizes, layer_E, unit_T, guessed_TK)
                for policy in policies
                if policy in SIMULATED
            }
        for index, ((counts, _), routes) in enumerate(zip(parts, all_routes, strict=True)):
            experts = slice(first_L[index], first_L[index + 1])
            for policy in policies:
                if policy in asked:
                    misses_CT, loads_CT = (sums_CU[:, index::L] for sums_CU in asked[policy].result())
                    counts[policy, prefetch] = misses_CT, loads_CT
                else:
                    counts[policy, prefetch] = _static(routes, places[policy][:, experts], sizes, guessed[index])
    return parts


def _policies(cfg: Mapping[str, Any], scope: str, prefetch: str) -> Iterator[str]:
    for policy in cfg["policy"]:
        if policy == "belady" and prefetch != "none":
            continue  # it knows what comes, so nothing is to be guessed
        if policy == "least_stale" and scope == "layer":
            continue  # it is lru there
        yield policy


def _guessed(all_routes: Sequence[Routes], cfg: Mapping[str, Any]) -> Iterator[tuple[str, list[np.ndarray | None]]]:
    """Each prefetch and what it guesses in each layer; None of each layer for none."""
    for prefetch in cfg["prefetch"]:
        if prefetch == "none":
            yield prefetch, [None] * len(all_routes)
            continue
        if prefetch in RECORDED and prefetch not in all_routes[0].guesses:
            raise ValueError(
                f"expert_cache.prefetch={prefetch}: the trace has no such guesses; record one with "
                "moe-lab trace --guesses."
            )
        guessed = [guess(prefetch, routes) for routes in all_routes]
        if prefetch == "token_id" and guessed[0] is None:
            continue  # the trace has no token ids
        yield (
            prefetch,
            [  # there is none before the first layer
                np.full_like(routes.ids_TK, -1) if guessed_TK is None else guessed_TK
                for guessed_TK, routes in zip(guessed, all_routes, strict=True)
            ],
        )


def _in_turn(layers: Sequence[np.ndarray | None], first_L: np.ndarray) -> np.ndarray:
    """Ids of each layer [T, K] as rows of one trace [T L, K], numbered through: token by token, layer by layer."""
    arrays = [ids_TK for ids_TK in layers if ids_TK is not None]
    in_turn_TLK = np.full((len(arrays[0]), len(arrays), max(ids.shape[1] for ids in arrays)), -1, np.int16)
    for index, ids_TK in enumerate(arrays):
        in_turn_TLK[:, index, : ids_TK.shape[1]] = np.where(ids_TK >= 0, ids_TK + np.int16(first_L[index]), -1)
    return in_turn_TLK.reshape(-1, in_turn_TLK.shape[2])


def _places(uses_PE: np.ndarray) -> dict[str, np.ndarray]:
    """The place of each expert among those that a static cache of a part holds, [P, E], 0 for the first."""
    total_E = uses_PE.sum(axis=0)
    fitted = {
        "static": total_E - uses_PE if len(uses_PE) > 1 else uses_PE,
        "static_hindsight": np.broadcast_to(total_E, uses_PE.shape),
    }
    found = {}
    for policy, fitted_PE in fitted.items():
        order_PE = np.argsort(-fitted_PE, axis=1, kind="stable")
        found[policy] = np.empty(uses_PE.shape, np.int64)
        np.put_along_axis(found[policy], order_PE, np.arange(len(total_E))[None], axis=1)
    return found


def _static(
    routes: Routes, place_PE: np.ndarray, sizes: Sequence[int], guessed_TK: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(misses, loads) [C, U] of a cache that holds the experts of the first places."""
    ids_TK, view = routes.ids_TK, routes.view
    part_T = view.part[view.unit]
    place_TK = np.where(ids_TK >= 0, place_PE[part_T[:, None], ids_TK], -1)
    if guessed_TK is None:
        misses_CU = np.stack([view.by_unit((place_TK >= size).sum(axis=1)) for size in sizes])
        return misses_CU, misses_CU
    guessed_place_TK = np.where(guessed_TK >= 0, place_PE[part_T[:, None], guessed_TK], -1)
    is_guessed_TK = np.zeros(ids_TK.shape, bool)
    for guessed_T in guessed_TK.T:
        is_guessed_TK |= ids_TK == guessed_T[:, None]
    misses = [view.by_unit(((place_TK >= size) & ~is_guessed_TK).sum(axis=1)) for size in sizes]
    prefetched = [view.by_unit((guessed_place_TK >= size).sum(axis=1)) for size in sizes]
    return np.stack(misses), np.stack(misses) + np.stack(prefetched)
