"""The used slots of a routing, sorted by expert: what a grouped matrix product reads."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab.ops import extension
from moe_lab.ops.library import is_exporting, register


class Dispatch(NamedTuple):
    """All int32, on the routing's device, of fixed shape: unused slots (id -1) come last, after offsets_E1[-1]."""

    counts_E: Tensor
    """Slots of each expert."""
    offsets_E1: Tensor
    """[E + 1], first sorted position of each expert; the last entry is N, the number of used slots."""
    perm_N: Tensor
    """[T * K] flat slot (token * K + k) at each sorted position; stable, so tokens stay in order within an expert."""
    inverse_N: Tensor
    """[T * K] sorted position of each flat slot."""


def dispatch(expert_ids_TK: Tensor, n_experts: int) -> Dispatch:
    """Sort the slots of `expert_ids_TK` (int32, -1 = unused) by expert; of a GPU nothing is read on the host.

    On a GPU by the op `sort` of the extension where that is loaded (`extension.sorts`), with the same result.
    """
    if is_exporting():  # one node of the graph
        return Dispatch(*torch.ops.moe_lab.dispatch(expert_ids_TK, n_experts))
    if extension.sorts(expert_ids_TK.device, n_experts):
        return Dispatch(*torch.ops.moe_lab.sort(expert_ids_TK.int().contiguous(), n_experts))
    flat_N = expert_ids_TK.reshape(-1)
    if flat_N.device.type == "cpu" and len(flat_N) <= _FEW and not torch.compiler.is_compiling():
        return _few(flat_N.tolist(), n_experts)
    return dispatch_by_torch(expert_ids_TK, n_experts)


def dispatch_by_torch(expert_ids_TK: Tensor, n_experts: int) -> Dispatch:
    """The same by plain torch, about ten launches on a GPU."""
    flat_N = expert_ids_TK.reshape(-1)
    key_N = torch.where(flat_N < 0, n_experts, flat_N)  # unused slots last
    sorted_N, perm_N = key_N.sort(stable=True)
    # The first position of expert e is where e would be inserted; the entry for E counts the used slots.
    experts_E1 = torch.arange(n_experts + 1, device=flat_N.device, dtype=sorted_N.dtype)
    offsets_E1 = torch.searchsorted(sorted_N, experts_E1, out_int32=True)
    inverse_N = torch.empty_like(perm_N).scatter_(0, perm_N, torch.arange(perm_N.numel(), device=flat_N.device))
    return Dispatch(offsets_E1.diff(), offsets_E1, perm_N.to(torch.int32), inverse_N.to(torch.int32))


_FEW = 64  # slots, that Python sorts sooner than ten calls of torch do


def _few(ids: list[int], n_experts: int) -> Dispatch:
    perm = sorted(range(len(ids)), key=lambda slot: ids[slot] if ids[slot] >= 0 else n_experts)
    counts, inverse = [0] * n_experts, [0] * len(ids)
    for position, slot in enumerate(perm):
        inverse[slot] = position
        if ids[slot] >= 0:
            counts[ids[slot]] += 1
    offsets = [0, *accumulate(counts)]
    return Dispatch(*(torch.tensor(values, dtype=torch.int32) for values in (counts, offsets, perm, inverse)))


def _fake(ids: Tensor, n_experts: int) -> Dispatch:
    sizes = (n_experts, n_experts + 1, ids.numel(), ids.numel())
    return Dispatch(*(ids.new_empty(size, dtype=torch.int32) for size in sizes))


register(
    "dispatch(Tensor ids, int n_experts) -> (Tensor, Tensor, Tensor, Tensor)",
    dispatch_by_torch,
    _fake,
    onnx="moe_lab.ops.dispatch_onnx",
)
