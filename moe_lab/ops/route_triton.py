"""The Triton kernel of `route`: one program per token, its logits held in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_lab.ops.selection import Selection


@triton.jit
def _score(x, highest, total, SCORE: tl.constexpr):
    if SCORE == "softmax":
        score = tl.exp(x - highest) / total
    elif SCORE == "sigmoid":
        score = 1 / (1 + tl.exp(-x))
    else:
        # log1p(e) as log(u) e / (u - 1), u = 1 + e: exact where u rounds (Kahan; Goldberg 1991, theorem 4).
        e = tl.exp(-tl.abs(x))
        u = 1 + e
        log1p = tl.where(u == 1, e, tl.log(u) * e / tl.where(u == 1, 1.0, u - 1))
        score = tl.sqrt(tl.maximum(x, 0.0) + log1p)
    return score


@triton.jit
def _kernel(
    logits_ptr, gate_bias_ptr, bias_ptr, ids_ptr, weights_ptr, row, E, K, scale, group_size,
    SCORE: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, N_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    is_left = e < E
    x = tl.load(logits_ptr + t * row + e, mask=is_left, other=float("-inf")).to(tl.float32)
    if HAS_GATE_BIAS:
        x += tl.load(gate_bias_ptr + e, mask=is_left, other=0.0)
    highest = tl.max(tl.where(x != x, float("inf"), x), axis=0)
    total = tl.sum(tl.where(is_left, tl.exp(x - highest), 0.0), axis=0)
    highest = tl.where(total != total, total, highest)  # a row without a softmax has weights of NaN
    ranked = x
    if HAS_BIAS or (TOP_GROUPS < N_GROUPS and TOP2):
        ranked = _score(x, highest, total, SCORE)
        if HAS_BIAS:
            ranked += tl.load(bias_ptr + e, mask=is_left, other=0.0)
    ranked = tl.where(ranked != ranked, float("inf"), ranked)  # NaN ranks first, as in a sort
    if TOP_GROUPS < N_GROUPS:
        group = e // group_size
        g = tl.arange(0, BLOCK_G)
        scores = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        for group_index in range(N_GROUPS):
            inside = is_left & (group == group_index)
            score = tl.max(tl.where(inside, ranked, float("-inf")), axis=0)
            if TOP2:
                first = tl.min(tl.where(inside & (ranked == score), e, BLOCK_E), axis=0)
                second = tl.max(tl.where(inside & (e != first), ranked, float("-inf")), axis=0)
                score = tl.where(score == float("inf"), score, score + tl.where(group_size > 1, second, 0.0))
            scores = tl.where(g == group_index, score, scores)
        is_open = g < N_GROUPS
        kept = e < 0
        for _ in range(TOP_GROUPS):
            best = tl.max(tl.where(is_open, scores, float("-inf")), axis=0)
            chosen_group = tl.min(tl.where(is_open & (scores == best), g, BLOCK_G), axis=0)
            is_open = is_open & (g != chosen_group)
            kept = kept | (group == chosen_group)
        is_left = is_left & kept
    ids = tl.zeros((BLOCK_K,), tl.int32)
    weights = tl.zeros((BLOCK_K,), tl.float32)
    for place in range(K):
        best = tl.max(tl.where(is_left, ranked, float("-inf")), axis=0)
        first = tl.min(tl.where(is_left & (ranked == best), e, BLOCK_E), axis=0)  # of equal ones the lowest id
        is_left = is_left & (e != first)
        logit = tl.sum(tl.where(e == first, x, 0.0), axis=0)
        ids = tl.where(k == place, first, ids)
        weights = tl.where(k == place, _score(logit, highest, 1.0, SCORE), weights)
    if RENORMALIZE:
        chosen = tl.sum(weights, axis=0)
        weights = weights / tl.where(chosen < 1e-20, 1e-20, chosen)
    elif SCORE == "softmax":
        weights = weights / total
    tl.store(ids_ptr + t * K + k, ids, mask=k < K)
    tl.store(weights_ptr + t * K + k, scale * weights, mask=k < K)


def launch(
    logits_TE: Tensor, how: Selection, gate_bias_E: Tensor | None, bias_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments and results as `route`."""
    T, E = logits_TE.shape
    ids_TK = torch.empty(T, how.k, dtype=torch.int32, device=logits_TE.device)
    weights_TK = torch.empty(T, how.k, dtype=torch.float32, device=logits_TE.device)
    if T:
        logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
        _kernel[(T,)](
            logits_TE, gate_bias_E, bias_E, ids_TK, weights_TK,
            logits_TE.stride(0), E, how.k, float(how.scale), E // how.n_groups,
            SCORE=how.score, HAS_GATE_BIAS=gate_bias_E is not None, HAS_BIAS=bias_E is not None,
            N_GROUPS=how.n_groups, TOP_GROUPS=how.top_groups, TOP2=how.group_score == "top2",
            RENORMALIZE=how.renormalize, BLOCK_E=triton.next_power_of_2(E), BLOCK_K=triton.next_power_of_2(how.k),
            BLOCK_G=triton.next_power_of_2(how.n_groups), num_warps=1 if E <= 128 else 4,
        )  # fmt: skip
    return ids_TK, weights_TK
