"""The k largest experts of each token and their softmax weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.library import is_exporting


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Ids [T, K] (int32) of the k largest scores of each row, largest first; ties go to the lowest id.

    torch.topk leaves the order of ties open, a stable sort does not but orders all E. So where the host may look at
    the values (an eager CPU run), rows are taken from topk and only those with a tie among their k + 1 largest are
    sorted; elsewhere, and where there is little to sort, all rows are.
    """
    if is_exporting():  # ONNX's TopK gives ties to the lowest index (its specification)
        return scores_TE.float().topk(k, dim=-1).indices.to(torch.int32)
    host_may_look = scores_TE.device.type == "cpu" and not torch.compiler.is_compiling()
    if not host_may_look or scores_TE.numel() < 4096:
        return _sorted_ids(scores_TE, k)
    top_values, top_ids = scores_TE.topk(min(k + 1, scores_TE.shape[-1]), dim=-1)
    ids_TK = top_ids[:, :k].to(torch.int32)
    tied_T = (top_values[:, 1:] == top_values[:, :-1]).any(-1)
    if tied_T.any():
        ids_TK[tied_T] = _sorted_ids(scores_TE[tied_T], k)
    return ids_TK


def _sorted_ids(scores_TE: Tensor, k: int) -> Tensor:
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices.narrow(-1, 0, k).to(torch.int32)


def weights_of(logits_TE: Tensor, expert_ids_TK: Tensor, renormalize: bool, *, all_used: bool = False) -> Tensor:
    """Softmax weights [T, K] (float32) of the chosen experts, 0 where the id is -1; `renormalize`: rows sum to 1.

    `all_used` says that no id is -1.

    Renormalised, softmax over all experts and division by the chosen share is the softmax over the chosen logits,
    which cannot underflow.
    """
    if all_used:
        wide_TE, ids_TK = logits_TE.float(), expert_ids_TK.long()
        return wide_TE.gather(-1, ids_TK).softmax(-1) if renormalize else wide_TE.softmax(-1).gather(-1, ids_TK)
    wide_TE, ids_TK, unused_TK = logits_TE.float(), expert_ids_TK.clamp(min=0).long(), expert_ids_TK < 0
    if renormalize:
        # A row without any expert has no softmax; it weighs nothing.
        chosen_TK = wide_TE.gather(-1, ids_TK).masked_fill(unused_TK, -torch.inf)
        return chosen_TK.softmax(-1).masked_fill(unused_TK, 0)
    return chosen(wide_TE.softmax(-1), expert_ids_TK)


def chosen(values_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """The values [T, K] of the chosen experts, 0 where the id is -1."""
    return values_TE.gather(-1, expert_ids_TK.clamp(min=0).long()).masked_fill(expert_ids_TK < 0, 0)
