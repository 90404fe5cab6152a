"""Would a cache of experts help: hit rate, loads and time of a token, by capacity, policy and prefetch.

The tokens are taken one at a time, sequence after sequence, as a decoder at batch 1 sees them. Every layer has a cache
of C experts (cache_policies.py). With M the misses, P the loads of a prefetch, b the bytes of an expert:

    hit_rate        1 - M / (experts that the tokens use); interval over sequences (intervals.ratio_of_sums)
    mb_per_token    (M + P) b over the tokens, all layers
    ms_per_token    max(compute_ms, P b / bandwidth) + M b / bandwidth: a miss is waited for, a prefetch is not as long
                    as it takes less than the computation; from given rates (analyses of SpecMD, 2602.03921, and of
                    llama.cpp pull requests 24524 and 27861)

`static` holds the C experts of a layer that the other parts of the trace use most; a part is a text, or a half of the
trace (routes.py). `static_hindsight` knows the text itself. A prefetch loads as many experts as a token uses, guessed
(guesses.py) from the token before, the token's id, its experts in the layer before, or by its own router, asked before
its input is there. Without a guess nothing is prefetched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moe_lab.analyses.cache_policies import POLICIES as SIMULATED
from moe_lab.analyses.cache_policies import implementation, simulate
from moe_lab.analyses.findings import Findings, Plot, columns, line, percent
from moe_lab.analyses.guesses import RECORDED, guess, uses
from moe_lab.analyses.routes import Routes, View
from moe_lab.intervals import ratio_of_sums
from moe_lab.records.trace import Layer

POLICIES = ("lru", "lfu", "lfru", "arc", "static", "static_hindsight", "belady")
PREFETCHES = ("none", "previous_token", "token_id", "layer_before", "ahead", "pre_attention")
_KNOWS_WHAT_COMES = ("static_hindsight", "belady")

Counts = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]
"""By policy and prefetch: (misses, loads) of each capacity and unit, [C, U]."""


def capacities(cfg: Mapping[str, Any], layers: Sequence[Layer]) -> list[int]:
    """Those asked for, or eighths of the experts."""
    E = max(layer.n_experts for layer in layers)
    return sorted(set(cfg["capacity"] or [max(E * eighths // 8, 1) for eighths in range(1, 8)]))


def of_layer(routes: Routes, cfg: Mapping[str, Any], layers: Sequence[Layer]) -> tuple[Counts, np.ndarray]:
    """(counts, experts used in each unit [U]) of one layer."""
    ids_TK, view, sizes = routes.ids_TK, routes.view, capacities(cfg, layers)
    found: Counts = {}
    for prefetch in cfg["prefetch"]:
        guessed_TK = guess(prefetch, routes) if prefetch != "none" else None
        if prefetch == "token_id" and guessed_TK is None:
            continue  # the trace has no token ids
        if prefetch in RECORDED and prefetch not in routes.guesses:
            raise ValueError(
                f"expert_cache.prefetch={prefetch}: the trace has no such guesses; record one with "
                "moe-lab trace --guesses."
            )
        if guessed_TK is None and prefetch != "none":
            guessed_TK = np.full_like(ids_TK, -1)  # there is none before the first layer
        for policy in cfg["policy"]:
            if policy == "belady" and prefetch != "none":
                continue  # it knows what comes, so nothing is to be guessed
            if policy in SIMULATED:
                pair = simulate(policy, ids_TK, routes.layer.n_experts, sizes, guessed_TK)
            else:
                pair = _static(routes, sizes, guessed_TK, hindsight=policy == "static_hindsight")
            misses, loads = (np.stack([view.by_unit(values_T) for values_T in values_CT]) for values_CT in pair)
            found[policy, prefetch] = misses, loads
    return found, view.by_unit((ids_TK >= 0).sum(axis=1))


def _static(
    routes: Routes, sizes: Sequence[int], guessed_TK: np.ndarray | None, *, hindsight: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(misses, loads) [C, T] of the experts that were used most in the other parts, or in all."""
    ids_TK, view, uses_PE = routes.ids_TK, routes.view, uses(routes)
    total_E, part_T = uses_PE.sum(axis=0), view.part[view.unit]
    fitted_PE = np.broadcast_to(total_E, uses_PE.shape) if hindsight or len(uses_PE) == 1 else total_E - uses_PE
    place_PE = np.empty(uses_PE.shape, np.int64)  # 0: the most used one
    order_PE = np.argsort(-fitted_PE, axis=1, kind="stable")
    np.put_along_axis(place_PE, order_PE, np.arange(len(total_E))[None], axis=1)
    place_TK = np.where(ids_TK >= 0, place_PE[part_T[:, None], ids_TK], -1)
    if guessed_TK is None:
        misses = [(place_TK >= size).sum(axis=1) for size in sizes]
        return np.stack(misses), np.stack(misses)
    guessed_place_TK = np.where(guessed_TK >= 0, place_PE[part_T[:, None], guessed_TK], -1)
    is_guessed_TK = np.zeros(ids_TK.shape, bool)
    for guessed_T in guessed_TK.T:
        is_guessed_TK |= ids_TK == guessed_T[:, None]
    misses = [((place_TK >= size) & ~is_guessed_TK).sum(axis=1) for size in sizes]
    loads = [missed + (guessed_place_TK >= size).sum(axis=1) for missed, size in zip(misses, sizes, strict=True)]
    return np.stack(misses), np.stack(loads)


def conclude(
    parts: Sequence[tuple[Counts, np.ndarray]], view: View, cfg: Mapping[str, Any], layers: Sequence[Layer]
) -> Findings:
    """The findings, from what `of_layer` gave for each of `layers`."""
    found = Findings(
        "expert_cache",
        "A cache of experts",
        "Every layer keeps some of its experts in fast memory; tokens come one at a time, sequence after sequence. An "
        "expert that a token uses and the cache does not hold is a miss, and is loaded.",
    )
    if not parts[0][0]:
        found.notes.append("There is nothing to compute: belady has no prefetch, and a prefetch by token_id needs ids.")
        return found
    table = _table(parts, view, cfg, layers)
    found.tables = {"expert_cache": table}
    whole = table[(table["part"] == "all") & (table["prefetch"] == cfg["prefetch"][0])]
    found.sentences = _sentences(table, whole, view, layers)
    lines = [line(str(policy), rows, "capacity", "hit_rate") for policy, rows in whole.groupby("policy", sort=False)]
    found.plots = [Plot("expert_cache", "Hit rate", "experts held in each layer", "hit rate", lines)]
    if len(view.parts) == 1 and "static" in cfg["policy"]:
        found.notes.append("static is fitted on what it is judged on: the trace has one sequence of one token.")
    if "token_id" in cfg["prefetch"] and not any(prefetch == "token_id" for _, prefetch in parts[0][0]):
        found.notes.append("The trace does not say the tokens' ids, so nothing is prefetched by them.")
    if implementation() == "python":
        found.notes.append("There is no C++ compiler here, so the policies were computed by Python, slowly.")
    return found


def _table(
    parts: Sequence[tuple[Counts, np.ndarray]], view: View, cfg: Mapping[str, Any], layers: Sequence[Layer]
) -> pd.DataFrame:
    used_U = np.sum([used for _, used in parts], axis=0)
    tokens_U = view.by_unit(np.ones(view.n_tokens))
    given_mb = cfg["expert_mb"]
    sizes_mb = [given_mb or (layer.bytes_per_expert or np.nan) / 1e6 for layer in layers]
    rows = []
    for policy, prefetch in parts[0][0]:
        of_layers = [counts[policy, prefetch] for counts, _ in parts]
        misses_CU, loads_CU = (np.sum([pair[side] for pair in of_layers], axis=0) for side in (0, 1))
        mb_CU, miss_mb_CU = (
            np.sum([pair[side] * size for pair, size in zip(of_layers, sizes_mb, strict=True)], axis=0)
            for side in (1, 0)
        )
        for place, capacity in enumerate(capacities(cfg, layers)):
            for part in (None, *(range(len(view.parts)) if len(view.parts) > 1 else ())):
                chosen = slice(None) if part is None else view.part == part
                used, tokens = used_U[chosen], tokens_U[chosen]
                mb, miss_mb = (float(values[place][chosen].sum() / tokens.sum()) for values in (mb_CU, miss_mb_CU))
                rows.append(
                    {
                        "policy": policy,
                        "prefetch": prefetch,
                        "capacity": capacity,
                        "part": "all" if part is None else view.parts[part],
                        **columns("hit_rate", ratio_of_sums(used - misses_CU[place][chosen], used, (0.0, 1.0))),
                        "misses_per_token": float(misses_CU[place][chosen].sum() / tokens.sum()),
                        "loads_per_token": float(loads_CU[place][chosen].sum() / tokens.sum()),
                        "mb_per_token": mb,
                        "ms_per_token": _ms(mb, miss_mb, cfg),
                        "tokens": int(tokens.sum()),
                        "units": len(tokens),
                        "computed_by": implementation() if policy in SIMULATED else "numpy",
                    }
                )
    return pd.DataFrame(rows)


def _ms(mb: float, miss_mb: float, cfg: Mapping[str, Any]) -> float | None:
    if cfg["gb_per_s"] is None or cfg["compute_ms"] is None or np.isnan(mb):
        return None
    return float(max(cfg["compute_ms"], (mb - miss_mb) / cfg["gb_per_s"]) + miss_mb / cfg["gb_per_s"])


def _sentences(table: pd.DataFrame, whole: pd.DataFrame, view: View, layers: Sequence[Layer]) -> list[str]:
    E = max(layer.n_experts for layer in layers)
    capacity = min(whole["capacity"], key=lambda size: abs(size - E / 2))
    here = whole[whole["capacity"] == capacity].set_index("policy")
    real = here[~here.index.isin(_KNOWS_WHAT_COMES)]
    if real.empty:
        return []
    best = real.loc[real["hit_rate"].idxmax()]
    rate = percent(best["hit_rate"], _number(best["hit_rate_ci95_low"]), _number(best["hit_rate_ci95_high"]))
    fitted = " (fitted on the other parts of the trace)" if best.name == "static" else ""
    sentences = [
        f"A cache of {capacity} of {E} experts a layer holds {rate} of the experts that a token uses, with "
        f"{best.name}{fitted}, the best of {', '.join(real.index)}."
    ]
    gaps = []
    if "lru" in real.index and best.name != "lru":
        gaps.append(f"lru is {100 * (best['hit_rate'] - here.loc['lru', 'hit_rate']):.1f} points below it")
    if "belady" in here.index:
        gaps.append(f"belady, the bound, {100 * (here.loc['belady', 'hit_rate'] - best['hit_rate']):.1f} above")
    if "static_hindsight" in here.index and "static" in here.index:
        gain = 100 * (here.loc["static_hindsight", "hit_rate"] - here.loc["static", "hit_rate"])
        gaps.append(f"a static choice that knows the text itself has {gain:+.1f} points over one that does not")
    if gaps:
        sentences.append(f"At that capacity {'; '.join(gaps)}.")
    if best["mb_per_token"] == best["mb_per_token"]:
        time = "" if best["ms_per_token"] is None else f", {best['ms_per_token']:.3g} ms at the given rates"
        sentences.append(f"Its misses load {best['mb_per_token']:.3g} MB for a token{time}.")
    others = table[
        (table["policy"] == best.name)
        & (table["capacity"] == capacity)
        & (table["part"] == "all")
        & (table["prefetch"] != best["prefetch"])
    ]
    if len(others) and best["prefetch"] == "none":
        fewest = others.loc[others["misses_per_token"].idxmin()]
        sentences.append(
            f"With a prefetch by {fewest['prefetch']} it waits for {fewest['misses_per_token']:.3g} experts a token in "
            f"place of {best['misses_per_token']:.3g}, and loads {fewest['loads_per_token']:.3g}."
        )
    of_parts = table[
        (table["policy"] == best.name)
        & (table["capacity"] == capacity)
        & (table["part"] != "all")
        & (table["prefetch"] == best["prefetch"])
    ]
    if len(of_parts) > 1 and len(view.parts) <= 20:
        low, high = (of_parts.loc[pick] for pick in (of_parts["hit_rate"].idxmin(), of_parts["hit_rate"].idxmax()))
        sentences.append(
            f"It holds from {percent(low['hit_rate'])} ({low['part']}) to {percent(high['hit_rate'])} ({high['part']})."
        )
    return sentences


def _number(value: Any) -> float | None:
    return None if value is None or np.isnan(value) else float(value)
