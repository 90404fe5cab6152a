"""Router modules of transformers, fed logits: their gate is the identity, as wide as there are experts."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def peer_router(kind: str, name: str, E: int, K: int, **settings: Any) -> nn.Module:
    """`transformers.models.<kind>`'s router `name`; skips the test where transformers is not installed."""
    pytest.importorskip("transformers")
    modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    sizes = {"num_experts_per_tok": K, "num_local_experts": E, "num_experts": E, "hidden_size": E}
    config = SimpleNamespace(**sizes, **{"norm_topk_prob": True, **settings})
    router: nn.Module = getattr(modeling, name)(config)
    router.requires_grad_(False)
    for parameter in router.parameters():
        if parameter.shape == (E, E):
            parameter.copy_(torch.eye(E))
    return router


def dense(ids_TK: Tensor, weights_TK: Tensor, E: int) -> Tensor:
    """[T, E] float64 weights, 0 where an expert is not used, whatever the order of the slots."""
    spread_TE = torch.zeros(len(ids_TK), E + 1, dtype=torch.float64)
    ids_TK = torch.where(ids_TK < 0, E, ids_TK).long()
    return spread_TE.scatter_(1, ids_TK, weights_TK.double())[:, :E]
