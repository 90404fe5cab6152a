"""Metrics of a routing: how even the load is, how sure the router, what capacity would drop.

Per layer, pooled (the layers' counts and sums added) and worst (each metric's worst layer). Natural logarithms. With
c_e the slots of expert e, N = sum c_e the used slots, f_e = c_e / N, p the softmax of the logits, P_e its mean over the
tokens:

    load_max_over_mean, load_min_over_mean    max c, min c over N / E
    load_cv                                   std(c) / mean(c), ddof 0
    load_gini                                 sum_ij |c_i - c_j| / (2 E N)
    load_entropy, effective_experts           H(f) / ln E;  exp H(f)
    dead_experts, unique_experts              experts with c = 0, with c > 0
    aux_loss                                  E sum_e f_e P_e: Switch (2101.03961), balanced = 1
    z_loss                                    mean_t logsumexp(l_t)^2: ST-MoE (2202.08906)
    token_entropy                             mean_t H(p_t)
    mutual_information                        H(P) - mean_t H(p_t): specialisation without collapse
    top1_prob, top1_margin, boundary_margin   means of p_(1), p_(1) - p_(2), p_(k) - p_(k+1), p sorted
    topk_mass                                 mean_t of p over the chosen experts
    dropped_fraction, dropped_tokens_fraction unused slots over T K; tokens with no used slot over T
    tile_waste_64, tile_waste_128             sum_e ceil(c_e / B) B / N - 1: padding of a grouped matrix product

A metric that has no value here (no tokens, no (k+1)-th expert, one expert's entropy) is None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lab.routers.base import Routing

Metrics = dict[str, float | None]

# For each metric, which of two layers is the worse: the larger value or the smaller.
WORSE: dict[str, Callable[[Sequence[float]], float]] = {
    "load_max_over_mean": max,
    "load_min_over_mean": min,
    "load_cv": max,
    "load_gini": max,
    "load_entropy": min,
    "effective_experts": min,
    "dead_experts": max,
    "unique_experts": min,
    "aux_loss": max,
    "z_loss": max,
    "token_entropy": max,
    "mutual_information": min,
    "top1_prob": min,
    "top1_margin": min,
    "boundary_margin": min,
    "topk_mass": min,
    "dropped_fraction": max,
    "dropped_tokens_fraction": max,
    "tile_waste_64": max,
    "tile_waste_128": max,
}
TILES = (64, 128)


@dataclass
class RoutingStats:
    """Sums over the tokens of one layer, or of several layers added."""

    counts_E: np.ndarray
    prob_sum_E: np.ndarray
    tokens: int
    slots: int
    dropped_tokens: int
    tiled_rows: np.ndarray
    sums: dict[str, float]

    @classmethod
    def of(cls, logits_TE: Tensor, routing: Routing) -> RoutingStats:
        """From router logits [T, E] of any dtype and the routing of the same tokens."""
        T, E = logits_TE.shape
        ids_TK = routing.expert_ids_TK.long()
        K = ids_TK.shape[1]
        used_TK = ids_TK >= 0
        counts_E = torch.bincount(ids_TK[used_TK], minlength=E).cpu().numpy()
        log_p_TE = logits_TE.float().log_softmax(-1)
        p_TE = log_p_TE.exp()
        sorted_TE = p_TE.sort(-1, descending=True).values
        chosen_TK = p_TE.gather(-1, ids_TK.clamp(min=0)) * used_TK
        per_token = {
            "z_loss": logits_TE.float().logsumexp(-1).square(),
            "token_entropy": -(p_TE * log_p_TE.clamp(min=-1e30)).sum(-1),
            "top1_prob": sorted_TE[:, 0],
            "topk_mass": chosen_TK.sum(-1),
        }
        if E > 1:
            per_token["top1_margin"] = sorted_TE[:, 0] - sorted_TE[:, 1]
        if E > K:
            per_token["boundary_margin"] = sorted_TE[:, K - 1] - sorted_TE[:, K]
        return cls(
            counts_E=counts_E,
            prob_sum_E=p_TE.double().sum(0).cpu().numpy(),
            tokens=T,
            slots=T * K,
            dropped_tokens=int((~used_TK.any(-1)).sum()),
            tiled_rows=np.array([int((-(-counts_E // tile) * tile).sum()) for tile in TILES]),
            sums={name: float(values.double().sum()) for name, values in per_token.items()},
        )

    def __add__(self, other: RoutingStats) -> RoutingStats:
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        sums = {name: value + theirs["sums"][name] for name, value in mine.pop("sums").items()}
        return RoutingStats(**{name: value + theirs[name] for name, value in mine.items()}, sums=sums)


def _entropy(shares: np.ndarray) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


def metrics(stats: RoutingStats) -> Metrics:
    """Every metric of the table above."""
    result: Metrics = dict.fromkeys(WORSE)
    c, E, used = stats.counts_E.astype(float), len(stats.counts_E), int(stats.counts_E.sum())
    if stats.tokens == 0:
        return result
    result.update({name: total / stats.tokens for name, total in stats.sums.items()})
    mean_p = stats.prob_sum_E / stats.tokens
    token_entropy = stats.sums["token_entropy"] / stats.tokens
    result["mutual_information"] = max(_entropy(mean_p) - token_entropy, 0.0)
    result["dropped_fraction"] = (stats.slots - used) / stats.slots
    result["dropped_tokens_fraction"] = stats.dropped_tokens / stats.tokens
    result["dead_experts"] = int((c == 0).sum())
    result["unique_experts"] = int((c > 0).sum())
    if used == 0:
        return result
    share = c / used
    rank = np.arange(1, E + 1)
    result.update(
        load_max_over_mean=float(c.max() / c.mean()),
        load_min_over_mean=float(c.min() / c.mean()),
        load_cv=float(c.std() / c.mean()),
        load_gini=float(2 * (rank * np.sort(c)).sum() / (E * used) - (E + 1) / E),
        load_entropy=_entropy(share) / float(np.log(E)) if E > 1 else None,
        effective_experts=float(np.exp(_entropy(share))),
        aux_loss=float(E * (share * mean_p).sum()),
    )
    result.update({f"tile_waste_{B}": float(rows / used - 1) for B, rows in zip(TILES, stats.tiled_rows, strict=True)})
    return result


def summarize(layers: Sequence[RoutingStats], layer_ids: Sequence[int]) -> dict[str, Any]:
    """The record's `routing`: {pooled, worst, layers} of at least one layer."""
    per_layer = [metrics(stats) for stats in layers]
    pooled = layers[0]
    for stats in layers[1:]:
        pooled = pooled + stats
    worst: Metrics = {}
    for name, worse in WORSE.items():
        values = [value for one in per_layer if (value := one[name]) is not None]
        worst[name] = worse(values) if values else None
    return {
        "pooled": metrics(pooled),
        "worst": worst,
        "layers": [{"layer": layer, **one} for layer, one in zip(layer_ids, per_layer, strict=True)],
    }
