"""Room for so many tokens at each expert: who finds some, and where those go who do not."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.ops.by_expert import by_expert
from moe_lab.ops.dispatch import dispatch
from moe_lab.ops.library import is_exporting, register
from moe_lab.ops.softmax_topk import top_k


def within_capacity(ids_TK: Tensor, order_N: Tensor, room_E: Tensor) -> Tensor:
    """bool [T, K]: which slots are among the first `room_E` of their expert, in the given order of all slots."""
    ordered_N = ids_TK.flatten()[order_N]
    by_expert = dispatch(ordered_N.unsqueeze(1), len(room_E))
    experts_N = ordered_N.clamp(min=0).long()
    kept_N = by_expert.inverse_N - by_expert.offsets_E1[experts_N] < room_E[experts_N]
    return torch.zeros_like(kept_N).scatter_(0, order_N, kept_N).view_as(ids_TK) & (ids_TK >= 0)


def fill_up(ids_TK: Tensor, scores_TE: Tensor, room_E: Tensor) -> Tensor:
    """Give every unused slot to the best expert that has room and that the token has not yet, in the tokens' order.

    In each round every token with an unused slot asks for one expert; whom an expert refuses asks another one, for it
    is full then. So `K + E` rounds are enough.
    """
    if is_exporting():  # one node of the graph
        return torch.ops.moe_lab.fill_up(ids_TK, scores_TE, room_E)  # type: ignore[no-any-return]
    return _compute(ids_TK, scores_TE, room_E)


def _compute(ids_TK: Tensor, scores_TE: Tensor, room_E: Tensor) -> Tensor:
    (T, K), E = ids_TK.shape, scores_TE.shape[1]
    for _ in range(K + E):
        has_TE = by_expert(torch.ones_like(ids_TK, dtype=torch.bool), ids_TK, E)
        left_E = room_E - has_TE.sum(0)
        wanted_TE = scores_TE.masked_fill(has_TE | (left_E <= 0), -torch.inf)
        best_T1 = top_k(wanted_TE, 1)
        free_TK = ids_TK < 0
        asks_T1 = free_TK.any(-1, keepdim=True) & wanted_TE.gather(1, best_T1.long()).isfinite()
        asked_T1 = torch.where(asks_T1, best_T1, -1)
        served_T1 = within_capacity(asked_T1, torch.arange(T, device=ids_TK.device), left_E)
        first_free_TK = free_TK & (free_TK.cumsum(-1) == 1)
        ids_TK = torch.where(first_free_TK & served_T1, asked_T1, ids_TK)
    return ids_TK


def _fake(ids: Tensor, scores: Tensor, room: Tensor) -> Tensor:
    return torch.empty_like(ids)


register("fill_up(Tensor ids, Tensor scores, Tensor room) -> Tensor", _compute, _fake, onnx="moe_lab.ops.capacity_onnx")
