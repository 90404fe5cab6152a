"""Expert loads by request: the router's ids are replaced so that every expert gets a chosen share of the slots.

    balanced   every expert T K / E slots, up to rounding; expert-parallel ranks too, contiguous or strided
    random     as router=random draws them
    zipf       expert of rank r: a share proportional to r^-exponent
    hot        `hot_experts` experts take `hot_share` of the slots between them, the others the rest
    one_hot    one expert takes every token; with K > 1 the others share the other slots
    replay     the ids that another run recorded; for another T its tokens are drawn from those recorded, or follow
               each other from a place that the seed draws
    fitted     power_law: zipf with the exponent that is fitted to such a recording; dirichlet: slots drawn from a
               Dirichlet distribution of a step's shares, fitted to its steps of T tokens (fits.py)

A token cannot have an expert twice, so none gets more than T slots: what a share would ask beyond that goes to the
next. Which experts are the loaded ones is drawn from the seed. Any counts of at most T that add up to T K can be dealt
out exactly: with the slots sorted by expert, slot i goes to token i mod T.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe_lab.ops.hash_uniform import hash_integers, hash_scores, stream_of
from moe_lab.ops.softmax_topk import top_k
from moe_lab.routers.base import Routing
from moe_lab.workloads.fits import drawn_counts, step_counts, zipf_exponent, zipf_shares


def dealing_order(E: int) -> np.ndarray:
    """The experts in an order of which every prefix is spread over expert-parallel ranks of any degree that divides E.

    Greedy: the next expert is the one whose contiguous ranks (e // (E / R)) and strided ranks (e mod R) have the fewest
    so far, over all degrees R.
    """
    degrees = [R for R in range(2, E + 1) if E % R == 0]
    ranks = [np.arange(E) // (E // R) for R in degrees] + [np.arange(E) % R for R in degrees]
    counts = [np.zeros(E) for _ in ranks]
    widths = 2 * degrees
    left = np.ones(E, dtype=bool)
    order = np.empty(E, dtype=np.int64)
    for place in range(E):
        cost = sum((2 * count[rank] + 1) * R for count, rank, R in zip(counts, ranks, widths, strict=True))
        order[place] = chosen = int(np.where(left, cost, np.inf).argmin()) if degrees else 0
        left[chosen] = False
        for count, rank in zip(counts, ranks, strict=True):
            count[rank[chosen]] += 1
    return order


def apportion(shares_E: np.ndarray, T: int, K: int) -> np.ndarray:
    """Whole numbers of slots, T K in all and at most T each, nearest to the shares (largest remainders)."""
    full_E = np.zeros(len(shares_E), dtype=bool)
    while True:
        weights_E = np.where(full_E, 0.0, shares_E)
        if not weights_E.any():
            weights_E = (~full_E).astype(float)
        exact_E = weights_E / max(weights_E.sum(), 1e-300) * (T * K - T * int(full_E.sum()))
        over_E = exact_E > T
        if not over_E.any():
            break
        full_E |= over_E  # what they cannot take goes to the others
    counts_E = np.where(full_E, T, np.floor(exact_E).astype(np.int64))
    remainders_E = np.where(counts_E < T, exact_E - np.floor(exact_E), -1.0)
    counts_E[np.argsort(-remainders_E, kind="stable")[: T * K - int(counts_E.sum())]] += 1
    return np.asarray(counts_E)


def deal(counts_E: np.ndarray, order_E: Sequence[int] | np.ndarray, T: int, K: int) -> np.ndarray:
    """Ids [T, K] int32, different in each row, with `counts_E` slots per expert."""
    assert int(counts_E.sum()) == T * K and (not T or int(counts_E.max()) <= T)
    slots_N = np.repeat(np.asarray(order_E), counts_E[order_E])
    return slots_N.reshape(K, T).T.astype(np.int32) if T else np.empty((0, K), dtype=np.int32)


def _balanced(T: int, E: int, K: int) -> np.ndarray:
    order_E = dealing_order(E)
    ids_TK: np.ndarray = order_E[np.arange(T * K) % E].reshape(T, K).astype(np.int32)
    return ids_TK


def _by_shares(shares_E: np.ndarray, T: int, K: int, seed: int) -> np.ndarray:
    E = len(shares_E)
    key = hash_scores(torch.arange(1), E, stream_of(seed, "load"))[0].numpy()
    experts_E = np.argsort(-key, kind="stable")  # which expert has which share
    counts_E = np.empty(E, dtype=np.int64)
    counts_E[experts_E] = apportion(shares_E, T, K)
    return deal(counts_E, experts_E, T, K)


def hot_shares(E: int, hot_experts: int, hot_share: float) -> np.ndarray:
    """`hot_share` over the first `hot_experts`, the rest over the others."""
    if not 1 <= hot_experts <= E:
        raise ValueError(f"workload.hot_experts={hot_experts}: must be between 1 and {E} (the number of experts).")
    cold = (1 - hot_share) / (E - hot_experts) if hot_experts < E else 0.0
    return np.where(np.arange(E) < hot_experts, hot_share / hot_experts, cold)


def _random(T: int, E: int, K: int, seed: int) -> np.ndarray:
    ids_TK: np.ndarray = top_k(hash_scores(torch.arange(T), E, stream_of(seed, "load", "random")), K).numpy()
    return ids_TK


def loaded(load: str, native: Routing, n_experts: int, **keys: float) -> Routing:
    """`native` with other ids; its weights stay where they are.

    Args:
        load: one of `config.LOADS`.
        native: a routing that uses every slot.
        keys: seed, zipf_exponent, hot_experts, hot_share, as far as the load reads them.

    Raises:
        ValueError: a key that does not fit the number of experts.
    """
    if load == "native":
        return native
    (T, K), device = native.expert_ids_TK.shape, native.expert_ids_TK.device
    seed, shares_E = int(keys["seed"]), asked_shares(load, n_experts, K, **keys)
    if load == "balanced":
        ids_TK = _balanced(T, n_experts, K)
    else:
        ids_TK = _random(T, n_experts, K, seed) if shares_E is None else _by_shares(shares_E, T, K, seed)
    return Routing(torch.from_numpy(ids_TK).to(device), native.weights_TK)


def replayed(
    recorded_TK: np.ndarray,
    native: Routing,
    n_experts: int,
    seed: int,
    *,
    rows_T: Tensor | None = None,
    consecutive: bool = False,
) -> Routing:
    """`native` with recorded ids [T', K], of the rows `rows_T`.

    Without `rows_T` they are all rows; if T' is not T, they are drawn with replacement.

    `consecutive`: T tokens that follow each other, from a place that the seed draws.

    Raises:
        ValueError: the recording has another number of experts per token, ids that the layer does not have, or fewer
            than T consecutive tokens.
    """
    T, device = len(native.expert_ids_TK), native.expert_ids_TK.device
    n_recorded = len(recorded_TK)
    _require_fit(recorded_TK, native, n_experts)
    if consecutive and n_recorded < T:
        raise ValueError(
            f"workload.trace_consecutive=true: the recording has {n_recorded} tokens, but {T} are needed; lower batch "
            "or seq_len, or use a longer trace."
        )
    if rows_T is None:
        rows_T = _rows(T, n_recorded, seed, consecutive)
    return Routing(torch.from_numpy(recorded_TK)[rows_T].to(device, torch.int32), native.weights_TK)


def _rows(T: int, n_recorded: int, seed: int, consecutive: bool) -> Tensor:
    """Which recorded tokens are replayed."""
    if n_recorded == T:
        return torch.arange(T)
    among, n = (n_recorded - T + 1, 1) if consecutive else (n_recorded, T)
    drawn = hash_integers((n,), stream_of(seed, "load", "replay"), among, torch.device("cpu"))
    return drawn + torch.arange(T) if consecutive else drawn


def fitted(recorded_TK: np.ndarray, native: Routing, n_experts: int, seed: int, fit: str) -> Routing:
    """`native` with ids of the load that is fitted to recorded ids [T', K]: `power_law` or `dirichlet`.

    Raises:
        ValueError: as `replayed`; or the recording has fewer than two steps of T tokens to fit a distribution to.
    """
    (T, K), E = native.expert_ids_TK.shape, n_experts
    _require_fit(recorded_TK, native, n_experts)
    if fit == "power_law":
        ids_TK = _by_shares(fitted_shares(recorded_TK, n_experts), T, K, seed)
    else:
        counts_SE = step_counts(recorded_TK, E, T)
        counts_SE = counts_SE[counts_SE.sum(axis=1) > 0]
        if len(counts_SE) < 2:
            raise ValueError(
                f"workload.fit=dirichlet: the recording has {len(recorded_TK)} tokens, fewer than two steps of {T}; "
                "lower batch or seq_len, or use a longer trace."
            )
        (drawn_E,) = drawn_counts(counts_SE, T * K, 1, np.random.default_rng(seed))
        ids_TK = deal(apportion(drawn_E, T, K), np.arange(E), T, K)
    return Routing(torch.from_numpy(ids_TK).to(native.expert_ids_TK.device), native.weights_TK)


def fitted_shares(recorded_TK: np.ndarray, n_experts: int) -> np.ndarray:
    """Those of the power law that is fitted to recorded ids, largest first."""
    counts_E = np.bincount(recorded_TK[recorded_TK >= 0], minlength=n_experts)
    return zipf_shares(n_experts, zipf_exponent(counts_E))


def _require_fit(recorded_TK: np.ndarray, native: Routing, n_experts: int) -> None:
    (T, K), n_recorded = native.expert_ids_TK.shape, len(recorded_TK)
    if recorded_TK.shape[1] != K or (n_recorded and int(recorded_TK.max()) >= n_experts) or (T and not n_recorded):
        raise ValueError(
            f"workload.trace: the recording routes {n_recorded} tokens to {recorded_TK.shape[1]} of at least "
            f"{int(recorded_TK.max(initial=-1)) + 1} experts, but this layer uses {K} of {n_experts}; "
            "use a recording of the same model."
        )


def asked_shares(load: str, n_experts: int, top_k: int, **keys: float) -> np.ndarray | None:
    """The shares of the slots that were asked for, largest first; None where they are left to chance."""
    E = n_experts
    if load == "balanced":
        return np.full(E, 1 / E)
    if load == "zipf":
        return zipf_shares(E, keys["zipf_exponent"])
    if load in ("hot", "one_hot"):
        h, s = (keys["hot_experts"], keys["hot_share"]) if load == "hot" else (1, 1 / top_k)
        return np.sort(hot_shares(E, int(h), s))[::-1]
    return None


def difference(ids_TK: Tensor, asked_E: np.ndarray) -> float:
    """Half the sum of |realised - asked| shares, experts by falling load (total variation): 0 same, 1 quite other."""
    counts_E = torch.bincount(ids_TK[ids_TK >= 0].flatten().long().cpu(), minlength=len(asked_E)).numpy()
    realised_E = np.sort(counts_E)[::-1] / max(int(counts_E.sum()), 1)
    return float(np.abs(realised_E - np.sort(asked_E)[::-1]).sum() / 2)
