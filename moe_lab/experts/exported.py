"""The expert MLPs as one node of an exported graph; computed as experts=loop does."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lab.experts.base import Experts
from moe_lab.experts.loop import Loop
from moe_lab.experts.weights import Activation, Clamped, ExpertWeights, Scale, activated, check_scale
from moe_lab.ops.library import register
from moe_lab.routers.base import Routing


class Exported(Experts):
    """The op `experts_mlp`, or for experts that are not plain `experts_mlp_biased`; the bodies in ONNX lie beside."""

    graph_safe = True
    only_plain = False

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale = "output") -> Tensor:
        """See `Experts`."""
        check_scale(scale)
        up_E2FD, down_EDF = weights.w_gate_up_E2FD, weights.w_down_EDF
        operands = (x_TD, routing.expert_ids_TK, routing.weights_TK, up_E2FD, down_EDF)
        if weights.is_plain:
            result: Tensor = torch.ops.moe_lab.experts_mlp(*operands, scale == "input")
            return result
        biases: list[Tensor] = [
            matrix.new_zeros(matrix.shape[:2]) if bias is None else bias
            for matrix, bias in ((up_E2FD, weights.up_bias_E2F), (down_EDF, weights.down_bias_ED))
        ]
        alpha, limit = weights.activation if isinstance(weights.activation, Clamped) else (0.0, 0.0)
        settings = (scale == "input", alpha, limit, weights.activation == "gelu_tanh")
        biased: Tensor = torch.ops.moe_lab.experts_mlp_biased(*operands, *biases, *settings)
        return biased


class _Experts(NamedTuple):
    """What `Loop` reads of `ExpertWeights`."""

    w_gate_up_E2FD: Tensor
    w_down_EDF: Tensor
    up_bias_E2F: Tensor | None = None
    down_bias_ED: Tensor | None = None
    activation: Activation = None

    def activate(self, gate_up: Tensor) -> Tensor:
        """As `ExpertWeights.activate`."""
        return activated(gate_up, self.activation)


def _compute(x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, scales_input: bool) -> Tensor:
    experts: Any = _Experts(w_gate_up, w_down)
    return Loop()(x, Routing(ids, weights), experts, scale="input" if scales_input else "output")


def _fake(x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, scales_input: bool) -> Tensor:
    return torch.empty_like(x)


def _compute_biased(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, up_bias: Tensor, down_bias: Tensor,
    scales_input: bool, alpha: float, limit: float, gelu: bool,
) -> Tensor:  # fmt: skip
    activation: Activation = Clamped(alpha, limit) if limit else "gelu_tanh" if gelu else None
    experts: Any = _Experts(w_gate_up, w_down, up_bias, down_bias, activation)
    return Loop()(x, Routing(ids, weights), experts, scale="input" if scales_input else "output")


def _fake_biased(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, up_bias: Tensor, down_bias: Tensor,
    scales_input: bool, alpha: float, limit: float, gelu: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)


register(
    "experts_mlp(Tensor x, Tensor ids, Tensor weights, Tensor w_gate_up, Tensor w_down, bool scales_input) -> Tensor",
    _compute,
    _fake,
    onnx="moe_lab.experts.exported_onnx",
)
register(
    "experts_mlp_biased(Tensor x, Tensor ids, Tensor weights, Tensor w_gate_up, Tensor w_down, Tensor up_bias, "
    "Tensor down_bias, bool scales_input, float alpha, float limit, bool gelu) -> Tensor",
    _compute_biased,
    _fake_biased,
    onnx="moe_lab.experts.exported_biased_onnx",
)
