"""What a routing promises, and how two routings of the same tokens differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lab.errors import MismatchError
from moe_lab.ops.by_expert import by_expert
from moe_lab.ops.dispatch import dispatch_by_torch
from moe_lab.routers.base import PROPERTIES, Router, Routing


def check_declarations(router: Router) -> None:
    """Raise `ValueError` for a property that is neither true nor false, nor left open."""
    for name in PROPERTIES:
        value = getattr(router, name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"router: {type(router).__name__}.{name}={value!r}: must be True, False or None.")


def check_contract(routing: Routing, n_tokens: int, n_experts: int, layer: int) -> None:
    """Raise `MismatchError` naming the clause of the router's contract that `routing` breaks."""
    ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK

    def broken(clause: str) -> MismatchError:
        return MismatchError("route", f"layer {layer}: the router breaks its contract: {clause}", clause)

    if ids_TK.dim() != 2 or ids_TK.shape[0] != n_tokens or weights_TK.shape != ids_TK.shape:
        raise broken(f"ids {tuple(ids_TK.shape)} and weights {tuple(weights_TK.shape)} must both be [{n_tokens}, K]")
    if ids_TK.dtype != torch.int32 or weights_TK.dtype != torch.float32:
        raise broken(f"ids are {ids_TK.dtype} and weights are {weights_TK.dtype}, not int32 and float32")
    if bool(((ids_TK < -1) | (ids_TK >= n_experts)).any()):
        raise broken(f"an expert id is outside -1 .. {n_experts - 1}")
    ordered = ids_TK.sort(-1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise broken("a token uses the same expert twice")
    if not bool(weights_TK.isfinite().all()):
        raise broken("a weight is NaN or infinite")
    if bool((weights_TK[ids_TK < 0] != 0).any()):
        raise broken("an unused slot (id -1) has a weight")
    if routing.dispatch is not None:
        wanted = dispatch_by_torch(ids_TK, n_experts)  # whoever sorted them
        if not all(torch.equal(tensor, other) for tensor, other in zip(routing.dispatch, wanted, strict=True)):
            raise broken("the slots in dispatch are not sorted by expert")


def members(ids_TK: Tensor, n_experts: int) -> Tensor:
    """[T, E] bool: which experts each token uses."""
    return by_expert(torch.ones_like(ids_TK, dtype=torch.bool), ids_TK, n_experts)


def weights_by_expert(routing: Routing, n_experts: int) -> Tensor:
    """[T, E] float32, 0 for experts that are not used."""
    return by_expert(routing.weights_TK, routing.expert_ids_TK, n_experts)


def changed_sets(a: Sequence[Routing], b: Sequence[Routing], n_experts: Sequence[int]) -> int:
    """How many (layer, token) pairs use another set of experts in `a` than in `b`."""
    return sum(
        int((members(routing.expert_ids_TK, E) != members(other.expert_ids_TK, E)).any(-1).sum())
        for routing, other, E in zip(a, b, n_experts, strict=True)
    )
