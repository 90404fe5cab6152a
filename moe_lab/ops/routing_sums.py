"""What the metrics of a routing need to know of its tokens, summed on the device in one pass.

Everything is a sum over tokens (or pairs of neighbours), so that layers, batches and devices can be added up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab.ops.by_expert import by_expert
from moe_lab.ops.library import resolve_implementation

NAMES = (
    "z_loss",
    "token_entropy",
    "top1_prob",
    "top1_margin",
    "boundary_margin",
    "topk_mass",
    "unrouted",
    "followers",
    "followed_slots",
    "shared_slots",
    "repeats",
)
"""The sums over tokens t, with p the softmax of the logits, sorted, and S the experts used (K: slots of a row):

z_loss: logsumexp(l)^2; token_entropy: H(p); top1_prob: p_(1); top1_margin: p_(1) - p_(2) (0 if E = 1);
boundary_margin: p_(K) - p_(K+1) (0 if K >= E); topk_mass: p over S; unrouted: 1 where S is empty;
and over the tokens that follow another of their sequence: followers: 1; followed_slots: |S_t|;
shared_slots: |S_t and S_(t-1)|; repeats: 1 where the experts of largest weight are the same.
"""


class RoutingSums(NamedTuple):
    """On the device of the logits; nothing was read on the host."""

    pairs_EE: Tensor
    """float32: tokens that use both experts; on the diagonal those that use the one. Whole numbers, exact to 2^24."""
    prob_E: Tensor
    """float64: p summed over the tokens."""
    sums: Tensor
    """float64, as `NAMES`."""


def first_tokens(n_tokens: int, seq_start_B1: Tensor | None, device: torch.device) -> Tensor:
    """[T] bool: which tokens begin a sequence; the first alone where `seq_start_B1` (int [B + 1]) is not known."""
    first_T1 = torch.zeros(n_tokens + 1, dtype=torch.bool, device=device)  # one more, where empty sequences may start
    first_T1[:1] = True
    if seq_start_B1 is not None:
        first_T1.index_fill_(0, seq_start_B1.long(), True)
    return first_T1[:n_tokens]


def routing_sums(
    logits_TE: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, first_T: Tensor, implementation: str = "auto"
) -> RoutingSums:
    """The sums of one layer.

    Args:
        logits_TE: any floating dtype; each row has a softmax.
        expert_ids_TK: int32, no expert twice in a row, -1 = unused.
        weights_TK: float32.
        first_T: bool, True where no token stands before in the same sequence (`first_tokens`); so of token 0.
        implementation: auto, torch or triton.
    """
    if resolve_implementation(implementation, logits_TE.device, op="routing_sums") == "triton" and len(logits_TE):
        from moe_lab.ops.routing_sums_triton import launch

        members_TE, prob_E, sums = launch(logits_TE, expert_ids_TK, weights_TK, first_T, len(NAMES))
    else:
        members_TE, prob_E, sums = reference(logits_TE, expert_ids_TK, weights_TK, first_T)
    return RoutingSums(members_TE.T @ members_TE, prob_E, sums)  # 0 and 1 are exact in TF32 too


def reference(
    logits_TE: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, first_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch: (members_TE float32, 1 where the token uses the expert; prob_E; sums)."""
    E, K = logits_TE.shape[1], expert_ids_TK.shape[1]
    ids_TK, used_TK = expert_ids_TK.long(), expert_ids_TK >= 0
    members_TE = by_expert(torch.ones_like(expert_ids_TK, dtype=torch.float32), expert_ids_TK, E)
    wide_TE = logits_TE.float()
    lse_T = wide_TE.logsumexp(-1)
    log_p_TE = wide_TE - lse_T[:, None]
    p_TE = log_p_TE.exp()
    top_TK = p_TE.topk(min(max(K + 1, 2), E), dim=-1).values
    nothing_T = torch.zeros_like(lse_T)
    best_T1 = weights_TK.masked_fill(~used_TK, -torch.inf).argmax(-1, keepdim=True) if K else ids_TK
    choice_T = ids_TK.gather(1, best_T1).squeeze(1) if K else nothing_T - 1
    follows_T, used_T = ~first_T, members_TE.sum(-1)
    shared_T, repeats_T = nothing_T.clone(), nothing_T.clone()
    shared_T[1:] = (members_TE[1:] * members_TE[:-1]).sum(-1)
    repeats_T[1:] = ((choice_T[1:] == choice_T[:-1]) & (choice_T[1:] >= 0)).float()
    per_token = (
        lse_T.square(),
        -(p_TE * log_p_TE.where(p_TE > 0, 0.0)).sum(-1),
        top_TK[:, 0],
        top_TK[:, 0] - top_TK[:, 1] if E > 1 else nothing_T,
        top_TK[:, K - 1] - top_TK[:, K] if 0 < K < E else nothing_T,
        (p_TE * members_TE).sum(-1),
        (used_T == 0).float(),
        follows_T.float(),
        used_T * follows_T,
        shared_T * follows_T,
        repeats_T * follows_T,
    )
    return members_TE, p_TE.sum(0, dtype=torch.float64), torch.stack(per_token).sum(1, dtype=torch.float64)
