"""The Triton kernel of `routing_sums`: each program takes some tokens, all experts, and leaves its partial sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 2048  # of a program's tile, tokens x experts


@triton.jit
def _choices(ids, weights, row, here, experts, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """The experts that each row uses [BLOCK_T, BLOCK_E], and the one of its largest weight (-1: none)."""
    members = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    choice = tl.zeros([BLOCK_T], tl.int32) - 1
    largest = tl.zeros([BLOCK_T], tl.float32) - float("inf")
    for k in range(K):
        expert = tl.load(ids + row * K + k, mask=here, other=-1)
        weight = tl.load(weights + row * K + k, mask=here, other=0.0)
        members += (expert[:, None] == experts[None, :]).to(tl.int32)
        better = (expert >= 0) & (weight > largest)
        choice = tl.where(better, expert, choice)
        largest = tl.where(better, weight, largest)
    return members, choice


@triton.jit
def _kernel(
    logits, ids, weights, first, members_out, partial, T, E,
    K: tl.constexpr, K_TOP: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    here, there = token < T, experts < E
    offset = token[:, None] * E + experts[None, :]
    both = here[:, None] & there[None, :]

    logit = tl.load(logits + offset, mask=both, other=-float("inf")).to(tl.float32)
    top = tl.where(here, tl.max(logit, 1), 0.0)
    lse = top + tl.log(tl.where(here, tl.sum(tl.exp(logit - top[:, None]), 1), 1.0))
    log_p = logit - lse[:, None]
    p = tl.exp(log_p)  # 0 beyond T and E
    entropy = -tl.sum(p * tl.where(p > 0, log_p, 0.0), 1)

    rest = tl.where(there[None, :], p, -1.0)  # the largest are taken out one by one
    first_prob, second_prob = tl.max(rest, 1), tl.zeros([BLOCK_T], tl.float32)
    last_prob = first_prob
    for k in range(K_TOP):
        last_prob = tl.max(rest, 1)
        rest = tl.where(experts[None, :] == tl.argmax(rest, 1)[:, None], -1.0, rest)
        if k == 0:
            second_prob = tl.max(rest, 1)
    next_prob = tl.max(rest, 1)

    follows = here & (tl.load(first + token, mask=here, other=1) == 0)
    mine, choice = _choices(ids, weights, token, here, experts, K, BLOCK_T, BLOCK_E)
    before, choice_before = _choices(ids, weights, token - 1, follows, experts, K, BLOCK_T, BLOCK_E)
    used = tl.sum(mine, 1)
    shared = tl.sum(mine * before, 1)
    repeats = follows & (choice >= 0) & (choice == choice_before)

    tl.store(members_out + offset, mine.to(tl.float32), mask=both)
    out = partial + tl.program_id(0) * (E + N)
    tl.store(out + experts, tl.sum(p, 0), mask=there)
    out += E
    tl.store(out + 0, tl.sum(tl.where(here, lse * lse, 0.0), 0))
    tl.store(out + 1, tl.sum(tl.where(here, entropy, 0.0), 0))
    tl.store(out + 2, tl.sum(tl.where(here, first_prob, 0.0), 0))
    tl.store(out + 3, tl.sum(tl.where(here & (E > 1), first_prob - second_prob, 0.0), 0))
    tl.store(out + 4, tl.sum(tl.where(here & (K > 0) & (K < E), last_prob - next_prob, 0.0), 0))
    tl.store(out + 5, tl.sum(tl.sum(p * mine.to(tl.float32), 1), 0))
    tl.store(out + 6, tl.sum((here & (used == 0)).to(tl.float32), 0))
    tl.store(out + 7, tl.sum(follows.to(tl.float32), 0))
    tl.store(out + 8, tl.sum(tl.where(follows, used, 0).to(tl.float32), 0))
    tl.store(out + 9, tl.sum(tl.where(follows, shared, 0).to(tl.float32), 0))
    tl.store(out + 10, tl.sum(repeats.to(tl.float32), 0))


def launch(
    logits_TE: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, first_T: Tensor, n_sums: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `routing_sums.reference`, for at least one token; `n_sums` is the number of its sums."""
    (T, E), K, N = logits_TE.shape, expert_ids_TK.shape[1], n_sums
    block_e = max(2, triton.next_power_of_2(E))
    block_t = max(1, _ELEMENTS // block_e)
    programs = triton.cdiv(T, block_t)
    members_TE = torch.empty(T, E, dtype=torch.float32, device=logits_TE.device)
    partial = torch.empty(programs, E + N, dtype=torch.float32, device=logits_TE.device)
    _kernel[(programs,)](
        logits_TE.contiguous(), expert_ids_TK.contiguous(), weights_TK.contiguous(), first_T.view(torch.uint8),
        members_TE, partial, T, E, K, max(K, 1) if K < E else 1, N, block_t, block_e,
    )  # fmt: skip
    total = partial.sum(0, dtype=torch.float64)
    return members_TE, total[:E], total[E:]
