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
    unused_slots_fraction, dropped_tokens_fraction unused slots over T K; tokens with no used slot over T
    tile_waste_64, tile_waste_128             sum_e ceil(c_e / B) B / N - 1: padding of a grouped matrix product
    uniform_unique_experts                    E (1 - (1 - N / (T E))^T): unique_experts expected of uniform routing
    expert_mb                                 weights of the experts with c > 0: what one pass has to read of them
    shared_with_previous                      sum_t |S_t and S_(t-1)| / sum_t |S_t|, tokens t that follow another of
                                              their sequence, S_t their experts; uniform routing: k / E
    first_choice_repeats                      those whose expert of largest weight is the one before's, over all those
    rank_load_PLACEMENT_R                     slots of the fullest of R ranks over the mean (measure/placement.py)

Names, units and which of two layers is the worse stand in records/fields.py.

A metric that has no value here (no tokens, no (k+1)-th expert, one expert's entropy, more ranks than experts) is None.

Pooled, `expert_mb` is that of all layers, and the fullest ranks and the means are added up: the ranks wait for each
other in every layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lab.measure import placement
from moe_lab.ops.routing_sums import NAMES, first_tokens, routing_sums
from moe_lab.records import fields
from moe_lab.routers.base import Routing

Metrics = dict[str, float | None]

WORSE = fields.worse(fields.METRICS)
"""For each metric, which of two layers is the worse: the larger value or the smaller."""
TILES = (64, 128)
_MEANS = [name for name in NAMES if name in WORSE]
"""Sums that, over the tokens, are a metric as they stand."""


@dataclass
class RoutingStats:
    """Sums over the tokens of one layer, or of several layers added."""

    pairs_EE: np.ndarray
    """Tokens that use both experts; on the diagonal, `counts_E`."""
    prob_sum_E: np.ndarray
    tokens: int
    slots: int
    sums: np.ndarray
    """As `ops.routing_sums.NAMES`."""
    tiled_rows: np.ndarray
    touched_bytes: float
    """Of the weights of experts in use; NaN where the size of an expert is not known."""
    fullest_ranks: np.ndarray
    """As `placement.NAMES`."""

    @classmethod
    def of(
        cls,
        logits_TE: Tensor,
        routing: Routing,
        *,
        seq_start_B1: Tensor | None = None,
        bytes_per_expert: float = np.nan,
    ) -> RoutingStats:
        """From router logits [T, E] of any dtype and the routing of the same tokens.

        Without `seq_start_B1` (int [B + 1]) all tokens are one sequence.
        """
        (T, E), ids_TK = logits_TE.shape, routing.expert_ids_TK
        first_T = first_tokens(T, seq_start_B1, logits_TE.device)
        totals = routing_sums(logits_TE, ids_TK, routing.weights_TK, first_T)
        packed = torch.cat([totals.pairs_EE.flatten().double(), totals.prob_E, totals.sums]).cpu().numpy()  # read once
        pairs_EE = packed[: E * E].reshape(E, E).astype(np.int64)
        counts_E = pairs_EE.diagonal()
        return cls(
            pairs_EE=pairs_EE,
            prob_sum_E=packed[E * E : -len(NAMES)],
            tokens=T,
            slots=ids_TK.numel(),
            sums=packed[-len(NAMES) :],
            tiled_rows=np.array([int((-(-counts_E // tile) * tile).sum()) for tile in TILES]),
            touched_bytes=int((counts_E > 0).sum()) * bytes_per_expert,
            fullest_ranks=placement.fullest_ranks(counts_E),
        )

    @property
    def counts_E(self) -> np.ndarray:  # noqa: N802 - a shape, as every name of a tensor
        """Slots of each expert."""
        return self.pairs_EE.diagonal()

    def __add__(self, other: RoutingStats) -> RoutingStats:
        names = [part.name for part in dataclasses.fields(self)]
        return RoutingStats(**{name: getattr(self, name) + getattr(other, name) for name in names})


def by_layer(of_calls: Sequence[Any], n_layers: int) -> list[Any]:
    """Sums by layer of what was seen at each call: a prefill in chunks calls a layer more than once."""
    return [sum(of_calls[i + n_layers :: n_layers], of_calls[i]) for i in range(n_layers)]


def _entropy(shares: np.ndarray) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


def metrics(stats: RoutingStats) -> Metrics:
    """Every metric of the table above."""
    result: Metrics = dict.fromkeys(WORSE)
    c, E, used = stats.counts_E.astype(float), len(stats.counts_E), int(stats.counts_E.sum())
    if stats.tokens == 0:
        return result
    sums, K = dict(zip(NAMES, stats.sums.tolist(), strict=True)), stats.slots / stats.tokens
    result.update({name: sums[name] / stats.tokens for name in _MEANS})
    if E == 1:
        result["top1_margin"] = None
    if K >= E or K == 0:
        result["boundary_margin"] = None
    mean_p = stats.prob_sum_E / stats.tokens
    result["mutual_information"] = max(_entropy(mean_p) - sums["token_entropy"] / stats.tokens, 0.0)
    result["unused_slots_fraction"] = (stats.slots - used) / stats.slots if stats.slots else None
    result["dropped_tokens_fraction"] = sums["unrouted"] / stats.tokens
    result["dead_experts"] = int((c == 0).sum())
    result["unique_experts"] = int((c > 0).sum())
    result["uniform_unique_experts"] = E * (1 - (1 - used / (stats.tokens * E)) ** stats.tokens)
    if np.isfinite(stats.touched_bytes):
        result["expert_mb"] = stats.touched_bytes / 1e6
    if sums["followers"]:
        result["first_choice_repeats"] = sums["repeats"] / sums["followers"]
    if sums["followed_slots"]:
        result["shared_with_previous"] = sums["shared_slots"] / sums["followed_slots"]
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
    for name, fullest in zip(placement.NAMES, stats.fullest_ranks.tolist(), strict=True):
        if np.isfinite(fullest):
            result[name] = fullest * int(name.rsplit("_", 1)[1]) / used
    return result


def worst_of(layers: Sequence[Metrics], worse: Mapping[str, Callable[[Sequence[float]], float]]) -> Metrics:
    """For each name the worse of the layers that have a value; None if none has."""
    known = {name: [value for layer in layers if (value := layer[name]) is not None] for name in worse}
    return {name: worse[name](values) if values else None for name, values in known.items()}


def summarize(layers: Sequence[RoutingStats], layer_ids: Sequence[int]) -> dict[str, Any]:
    """The record's `routing`: {pooled, worst, layers} of at least one layer."""
    per_layer = [metrics(stats) for stats in layers]
    pooled = layers[0]
    for stats in layers[1:]:
        pooled = pooled + stats
    return {
        "pooled": metrics(pooled),
        "worst": worst_of(per_layer, WORSE),
        "layers": [{"layer": layer, **values} for layer, values in zip(layer_ids, per_layer, strict=True)],
    }


def mean_of(summaries: Sequence[Any]) -> Any:
    """One summary of several alike (those of decoding steps): each number their mean, None where one has none."""
    first = summaries[0]
    if len(summaries) == 1:
        return first
    if isinstance(first, dict):
        return {
            key: first[key] if key == "layer" else mean_of([summary[key] for summary in summaries]) for key in first
        }
    if isinstance(first, list):
        return [mean_of(of_place) for of_place in zip(*summaries, strict=True)]
    return None if any(value is None for value in summaries) else float(np.mean(summaries))
