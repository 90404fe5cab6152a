"""From slots to experts: what stands at each token's k slots, as a row of all experts."""

from __future__ import annotations

import torch
from torch import Tensor


def by_expert(values_TK: Tensor, expert_ids_TK: Tensor, n_experts: int, *, fill: float = 0) -> Tensor:
    """[T, E] in the dtype of the values: a slot's value at its expert, `fill` at experts that are not used.

    Args:
        values_TK: any dtype.
        expert_ids_TK: integers, no expert twice in a row; the value beside an id of -1 is dropped.
        n_experts: E.
        fill: a value of that dtype.
    """
    spread_TE = values_TK.new_full((expert_ids_TK.shape[0], n_experts + 1), fill)  # unused slots beside the experts
    ids_TK = torch.where(expert_ids_TK < 0, n_experts, expert_ids_TK).long()
    return spread_TE.scatter_(1, ids_TK, values_TK)[:, :n_experts]
