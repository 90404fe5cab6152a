"""The Triton kernel of `softmax_topk`: one program per token, its logits held in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(
    logits_ptr, ids_ptr, weights_ptr, row, E, K, RENORMALIZE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    left = tl.load(logits_ptr + t * row + e, mask=e < E, other=float("-inf")).to(tl.float32)
    left = tl.where(left != left, float("inf"), left)  # NaN ranks first, as in a sort; its weights are NaN then too
    highest = tl.max(left, axis=0)
    total = tl.sum(tl.exp(left - highest), axis=0)
    is_left = e < E
    ids = tl.zeros((BLOCK_K,), tl.int32)
    chosen = tl.zeros((BLOCK_K,), tl.float32)
    for place in range(K):
        best = tl.max(left, axis=0)
        first = tl.min(tl.where(is_left & (left == best), e, BLOCK_E), axis=0)  # of equal ones the lowest id
        ids = tl.where(k == place, first, ids)
        chosen = tl.where(k == place, tl.exp(best - highest), chosen)
        is_left = is_left & (e != first)
        left = tl.where(e == first, float("-inf"), left)
    if RENORMALIZE:
        total = tl.sum(chosen, axis=0)
    tl.store(ids_ptr + t * K + k, ids, mask=k < K)
    tl.store(weights_ptr + t * K + k, chosen / total, mask=k < K)


def launch(logits_TE: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Run the kernel; arguments and results as `softmax_topk`."""
    T, E = logits_TE.shape
    ids_TK = torch.empty(T, k, dtype=torch.int32, device=logits_TE.device)
    weights_TK = torch.empty(T, k, dtype=torch.float32, device=logits_TE.device)
    if T:
        logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
        _kernel[(T,)](
            logits_TE, ids_TK, weights_TK, logits_TE.stride(0), E, k, RENORMALIZE=renormalize,
            BLOCK_E=triton.next_power_of_2(E), BLOCK_K=triton.next_power_of_2(k), num_warps=1 if E <= 128 else 4,
        )  # fmt: skip
    return ids_TK, weights_TK
