"""The expert MLPs as one node of an exported graph; computed as experts=loop does."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lab.experts.base import Experts
from moe_lab.experts.loop import Loop
from moe_lab.experts.weights import ExpertWeights, Scale, check_scale
from moe_lab.ops.library import register
from moe_lab.routers.base import Routing


class Exported(Experts):
    """The op `experts_mlp`, whose body in ONNX is exported_onnx.py."""

    graph_safe = True

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale = "output") -> Tensor:
        """See `Experts`."""
        check_scale(scale)
        ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
        matrices = (weights.w_gate_up_E2FD, weights.w_down_EDF)
        result: Tensor = torch.ops.moe_lab.experts_mlp(x_TD, ids_TK, weights_TK, *matrices, scale == "input")
        return result


class _Matrices(NamedTuple):
    """What `Loop` reads of `ExpertWeights`."""

    w_gate_up_E2FD: Tensor
    w_down_EDF: Tensor


def _compute(x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, scales_input: bool) -> Tensor:
    matrices: Any = _Matrices(w_gate_up, w_down)
    return Loop()(x, Routing(ids, weights), matrices, scale="input" if scales_input else "output")


def _fake(x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, scales_input: bool) -> Tensor:
    return torch.empty_like(x)


register(
    "experts_mlp(Tensor x, Tensor ids, Tensor weights, Tensor w_gate_up, Tensor w_down, bool scales_input) -> Tensor",
    _compute,
    _fake,
    onnx="moe_lab.experts.exported_onnx",
)
