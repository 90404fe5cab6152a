"""Would a cache of experts help: hit rate, loads and time of a token, by capacity, policy and prefetch.

The tokens are taken one at a time, sequence after sequence, as a decoder at batch 1 sees them. Every layer has a cache
of C experts, or all L layers share one of L C (cache_loads.py). With M the misses, P the loads of a prefetch, b the
bytes of an expert:

    hit_rate        1 - M / (experts that the tokens use); interval over sequences (intervals.ratio_of_sums)
    over_lru        hit_rate minus that of lru with the same scope, capacity and prefetch; the interval is that of the
                    differences of the sequences
    over_layers     of a shared cache: hit_rate minus that of caches of the layers, which hold as many experts together,
                    with the same policy (least_stale: lru) and prefetch
    mb_per_token    (M + P) b over the tokens, all layers
    ms_per_token    max(compute_ms, P b / bandwidth) + M b / bandwidth: a miss is waited for, a prefetch is not as long
                    as it takes less than the computation; from rates that are given or measured (token_time.py;
                    analyses of SpecMD, 2602.03921, and of llama.cpp pull requests 24524 and 27861)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moe_lab.analyses.cache_loads import SCOPES, Part, capacities, in_all, of_layer, of_model
from moe_lab.analyses.cache_policies import POLICIES as SIMULATED
from moe_lab.analyses.cache_policies import implementation
from moe_lab.analyses.findings import Findings, Plot, columns, line, percent
from moe_lab.analyses.routes import View
from moe_lab.intervals import Estimate, ratio_of_sums
from moe_lab.records.trace import Layer

__all__ = ["POLICIES", "PREFETCHES", "SCOPES", "conclude", "of_layer", "of_model"]

POLICIES = ("lru", "least_stale", "lfu", "lfru", "arc", "static", "static_hindsight", "belady")
PREFETCHES = ("none", "previous_token", "token_id", "layer_before", "ahead", "pre_attention")
_KNOWS_WHAT_COMES = ("static_hindsight", "belady")


def conclude(
    parts: Sequence[Part], view: View, cfg: Mapping[str, Any], layers: Sequence[Layer], shared: Sequence[Part] = ()
) -> Findings:
    """The findings, from what `of_layer` gave for each of `layers`, and `of_model` for all."""
    found = Findings(
        "expert_cache",
        "A cache of experts",
        "Every layer keeps some of its experts in fast memory, or all layers share a cache of as many; tokens come one "
        "at a time, sequence after sequence. An expert that a token uses and the cache does not hold is a miss, and is "
        "loaded.",
    )
    of_scopes = {scope: of for scope, of in zip(SCOPES, (parts, shared), strict=True) if of and of[0][0]}
    if not of_scopes:
        found.notes.append(
            "There is nothing to compute: belady has no prefetch, least_stale is for a cache that layers share, and a "
            "prefetch by token_id needs ids."
        )
        return found
    table = pd.concat([_table(scope, of_scopes, view, cfg, layers) for scope in of_scopes], ignore_index=True)
    found.tables = {"expert_cache": table}
    for scope in of_scopes:
        of_scope = table[table["scope"] == scope]
        plain = of_scope[(of_scope["part"] == "all") & (of_scope["prefetch"] == cfg["prefetch"][0])]
        found.sentences += _sentences(of_scope, plain, view, layers, cfg)
        name = "expert_cache" if scope == "layer" else "expert_cache_shared"
        title, x = "Hit rate", "experts held in each layer"
        if scope == "model":
            title, x = "Hit rate of one cache for all layers", "experts held, over the layers"
        lines = [
            line(str(policy), rows, "capacity", "hit_rate") for policy, rows in plain.groupby("policy", sort=False)
        ]
        found.plots.append(Plot(name, title, x, "hit rate", lines))
    if len(view.parts) == 1 and "static" in cfg["policy"]:
        found.notes.append("static is fitted on what it is judged on: the trace has one sequence of one token.")
    if "token_id" in cfg["prefetch"] and "token_id" not in set(table["prefetch"]):
        found.notes.append("The trace does not say the tokens' ids, so nothing is prefetched by them.")
    if cfg["gb_per_s"] is not None and table["mb_per_token"].isna().any():
        found.notes.append(
            "The trace does not say the bytes of an expert, so no time is told: set expert_cache.expert_mb."
        )
    if cfg["decode_run"] is not None and cfg["model"] is None:
        found.notes.append(
            "The trace does not name its model: that expert_cache.decode_run is a run of it was not checked."
        )
    if implementation() == "python":
        found.notes.append("There is no C++ compiler here, so the policies were computed by Python, slowly.")
    return found


def _table(
    scope: str, of_scopes: Mapping[str, Sequence[Part]], view: View, cfg: Mapping[str, Any], layers: Sequence[Layer]
) -> pd.DataFrame:
    parts = of_scopes[scope]
    used_U = np.sum([used for _, used in parts], axis=0)
    tokens_U = view.by_unit(np.ones(view.n_tokens))
    sizes_mb = [cfg["expert_mb"] or (layer.bytes_per_expert or np.nan) / 1e6 for layer in layers]

    def summed(of: Sequence[Part], key: tuple[str, str], side: int, sizes: Sequence[float]) -> np.ndarray:
        """Misses (side 0) or loads (1) of all layers, each times its size, [C, U]."""
        return np.asarray(np.sum([part[0][key][side] * size for part, size in zip(of, sizes, strict=True)], axis=0))

    rows, once = [], [1.0] * len(layers)
    for policy, prefetch in parts[0][0]:
        key = policy, prefetch
        misses_CU, loads_CU = (summed(parts, key, side, once) for side in (0, 1))
        miss_mb_CU, mb_CU = (summed(parts, key, side, sizes_mb) for side in (0, 1))
        peers = {"over_lru": (parts, ("lru", prefetch) if policy != "lru" else None), "over_layers": (parts, None)}
        if scope == "model" and "layer" in of_scopes:
            peers["over_layers"] = of_scopes["layer"], ("lru" if policy == "least_stale" else policy, prefetch)
        peer_CU = {
            name: None if peer is None or peer not in of[0][0] else summed(of, peer, 0, once)
            for name, (of, peer) in peers.items()
        }
        for place, capacity in enumerate(capacities(cfg, layers)):
            for part in (None, *(range(len(view.parts)) if len(view.parts) > 1 else ())):
                chosen = slice(None) if part is None else view.part == part
                used, tokens, misses = used_U[chosen], tokens_U[chosen], misses_CU[place][chosen]
                mb, miss_mb = (float(values[place][chosen].sum() / tokens.sum()) for values in (mb_CU, miss_mb_CU))
                row = {
                    "scope": scope,
                    "policy": policy,
                    "prefetch": prefetch,
                    "capacity": capacity,
                    "experts_held": in_all(capacity, layers),
                    "part": "all" if part is None else view.parts[part],
                    **columns("hit_rate", ratio_of_sums(used - misses, used, (0.0, 1.0))),
                }
                for name, of_peer in peer_CU.items():
                    over = Estimate(None, None, None)
                    if of_peer is not None:
                        over = ratio_of_sums(of_peer[place][chosen] - misses, used)
                    row |= columns(name, over)
                rows.append(
                    {
                        **row,
                        "misses_per_token": float(misses.sum() / tokens.sum()),
                        "loads_per_token": float(loads_CU[place][chosen].sum() / tokens.sum()),
                        "mb_per_token": mb,
                        "ms_per_token": _ms(mb, miss_mb, cfg),
                        "tokens": int(tokens.sum()),
                        "units": len(tokens),
                        "computed_by": implementation() if policy in SIMULATED else "numpy",
                    }
                )
    floats = [f"{name}{end}" for name in ("over_lru", "over_layers") for end in ("", "_ci95_low", "_ci95_high")]
    return pd.DataFrame(rows).astype(dict.fromkeys(floats, float))


def _ms(mb: float, miss_mb: float, cfg: Mapping[str, Any]) -> float | None:
    if cfg["gb_per_s"] is None or np.isnan(mb):
        return None
    return float(max(cfg["compute_ms"], (mb - miss_mb) / cfg["gb_per_s"]) + miss_mb / cfg["gb_per_s"])


def _sentences(
    table: pd.DataFrame, plain: pd.DataFrame, view: View, layers: Sequence[Layer], cfg: Mapping[str, Any]
) -> list[str]:
    """Of one scope at half of the experts; `plain` are the rows of all parts and the first prefetch."""
    E, is_shared = max(layer.n_experts for layer in layers), table["scope"].iloc[0] == "model"
    capacity = min(plain["capacity"], key=lambda size: abs(size - E / 2), default=0)
    here = plain[plain["capacity"] == capacity].set_index("policy")
    real = here[~here.index.isin(_KNOWS_WHAT_COMES)]
    if real.empty:
        return []
    best = real.loc[real["hit_rate"].idxmax()]
    rate = percent(best["hit_rate"], _number(best["hit_rate_ci95_low"]), _number(best["hit_rate_ci95_high"]))
    fitted = " (fitted on the other parts of the trace)" if best.name == "static" else ""
    prefetch = "" if best["prefetch"] == "none" else f" and a prefetch by {best['prefetch']}"
    cache = f"A cache of {capacity} of {E} experts a layer"
    if is_shared:
        cache = f"One cache of {best['experts_held']} of {in_all(E, layers)} experts, which all layers share,"
    sentences = [
        f"{cache} holds {rate} of the experts that a token uses, with {best.name}{fitted}{prefetch}, the best of "
        f"{', '.join(real.index)}."
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
        time = ""
        if cfg["gb_per_s"] is not None:
            rates = f"at {cfg['gb_per_s']:.3g} GB/s, with {cfg['compute_ms']:.3g} ms of computation"
            time = f": {best['ms_per_token']:.3g} ms {rates}"
        sentences.append(f"It loads {best['mb_per_token']:.3g} MB for a token{time}.")
    if is_shared:
        return sentences + _shared_sentences(here, best)
    same = table[(table["policy"] == best.name) & (table["capacity"] == capacity)]
    others = same[(same["part"] == "all") & (same["prefetch"] != best["prefetch"])]
    if len(others) and best["prefetch"] == "none":
        fewest = others.loc[others["misses_per_token"].idxmin()]
        sentences.append(
            f"With a prefetch by {fewest['prefetch']} it waits for {fewest['misses_per_token']:.3g} experts a token in "
            f"place of {best['misses_per_token']:.3g}, and loads {fewest['loads_per_token']:.3g}."
        )
    of_parts = same[(same["part"] != "all") & (same["prefetch"] == best["prefetch"])]
    if len(of_parts) > 1 and len(view.parts) <= 20:
        low, high = (of_parts.loc[pick] for pick in (of_parts["hit_rate"].idxmin(), of_parts["hit_rate"].idxmax()))
        sentences.append(
            f"It holds from {percent(low['hit_rate'])} ({low['part']}) to {percent(high['hit_rate'])} ({high['part']})."
        )
    return sentences


def _shared_sentences(here: pd.DataFrame, best: pd.Series) -> list[str]:
    """What sharing gains, and what least_stale does on lru."""
    sentences = []
    if not np.isnan(best["over_layers"]):
        sentences.append(
            f"With {best.name} sharing has {_points(best, 'over_layers')} over caches of the layers that hold as many "
            "experts together."
        )
    if "least_stale" in here.index and not np.isnan(here.loc["least_stale", "over_lru"]):
        sentences.append(f"In it least_stale has {_points(here.loc['least_stale'], 'over_lru')} over lru.")
    return sentences


def _points(row: pd.Series, name: str) -> str:
    """`+1.2 points [1.0, 1.4]`."""
    value, low, high = (100 * row[f"{name}{end}"] for end in ("", "_ci95_low", "_ci95_high"))
    return f"{value:+.1f} points" + ("" if np.isnan(low) else f" [{low:.1f}, {high:.1f}]")


def _number(value: Any) -> float | None:
    return None if value is None or np.isnan(value) else float(value)
