"""What the tests of the experts share: random weights and routings, and the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lab.experts.weights import Clamped, ExpertWeights
from moe_lab.routers.base import Routing

CPU = torch.device("cpu")

SIZES = pytest.mark.parametrize(
    ("T", "E", "K", "D", "F"),
    [
        pytest.param(0, 5, 2, 8, 12, id="T=0"),
        pytest.param(1, 7, 2, 16, 11, id="T=1"),
        pytest.param(37, 5, 5, 9, 7, id="k=E"),
        pytest.param(37, 1, 1, 8, 8, id="E=1"),
        pytest.param(37, 12, 3, 1, 1, id="D=F=1"),
        pytest.param(199, 12, 3, 37, 65, id="T=199, odd widths"),
        pytest.param(199, 7, 1, 32, 16, id="top 1"),
    ],
)

UNUSED = pytest.mark.parametrize(
    "unused",
    [pytest.param(0.0, id="all used"), pytest.param(0.4, id="some unused"), pytest.param(1.1, id="none used")],
)

EMPTY = ("T=0", "none used")
"""Values with which there is nothing to compute."""

KINDS = pytest.mark.parametrize(
    "kind",
    [
        pytest.param({"bias": True}, id="biases"),
        pytest.param({"activation": Clamped(1.702, 0.8)}, id="clamped"),
        pytest.param({"bias": True, "activation": Clamped(2.5, 0.5)}, id="biases, clamped"),
        pytest.param({"bias": True, "activation": Clamped()}, id="as gpt-oss"),
        pytest.param({"activation": "gelu_tanh"}, id="gelu"),
        pytest.param({"bias": True, "activation": "gelu_tanh"}, id="biases, gelu"),
    ],
)
"""Experts that are not plain; limits that are often reached."""

SCALES = pytest.mark.parametrize("scale", [pytest.param("output", id="output"), pytest.param("input", id="input")])


def make_weights(
    E: int, D: int, F: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU, **kind: Any
) -> ExpertWeights:
    """Seeded normal weights, scaled so that outputs are of order one; biases are too. `kind`: bias and activation."""
    generator = torch.Generator().manual_seed(E + D + F)
    weights = ExpertWeights(E, D, F, **kind)
    for name, parameter in weights.named_parameters():
        spread = 0.5 if "bias" in name else parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return weights.to(device, dtype)


def make_x(T: int, D: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
    """Seeded hidden states."""
    return torch.randn(T, D, generator=torch.Generator().manual_seed(T + D)).to(device, dtype)


def make_routing(T: int, E: int, K: int, unused: float = 0.0, device: torch.device = CPU) -> Routing:
    """K different experts per token with weights that sum to 1, then a share of the slots emptied."""
    generator = torch.Generator().manual_seed(T + 31 * E + K)
    ids_TK = torch.rand(T, E, generator=generator).argsort(-1)[:, :K].to(torch.int32)
    weights_TK = torch.randn(T, K, generator=generator).softmax(-1)
    empty_TK = torch.rand(T, K, generator=generator) < unused
    return Routing(ids_TK.masked_fill(empty_TK, -1).to(device), weights_TK.masked_fill(empty_TK, 0).to(device))


def formula(x_TD: Tensor, routing: Routing, weights: ExpertWeights, scale: str = "output") -> Tensor:
    """The documented sum over the used slots in float64, every slot with its own copy of the matrices."""
    ids_TK, used_TK = routing.expert_ids_TK.long().clamp(min=0), routing.expert_ids_TK >= 0
    weight_TK1 = routing.weights_TK.double().unsqueeze(-1)
    x_TKD = x_TD.double().unsqueeze(1) * (weight_TK1 if scale == "input" else torch.ones_like(weight_TK1))
    h_TKG = torch.einsum("tkd,tkgd->tkg", x_TKD, weights.w_gate_up_E2FD.double()[ids_TK])
    if weights.up_bias_E2F is not None:
        h_TKG = h_TKG + weights.up_bias_E2F.double()[ids_TK]
    gate_TKF, up_TKF = h_TKG.tensor_split(2, dim=-1)
    if weights.activation == "gelu_tanh":
        bent_TKF = 1 + ((2 / torch.pi) ** 0.5 * (gate_TKF + 0.044715 * gate_TKF**3)).tanh()
        h_TKF = gate_TKF / 2 * bent_TKF * up_TKF
    elif isinstance(weights.activation, Clamped):
        slope, limit = weights.activation
        gate_TKF, up_TKF = gate_TKF.clamp(max=limit), up_TKF.clamp(-limit, limit) + 1
        h_TKF = gate_TKF / (1 + (-slope * gate_TKF).exp()) * up_TKF
    else:
        h_TKF = gate_TKF / (1 + (-gate_TKF).exp()) * up_TKF
    o_TKD = torch.einsum("tkf,tkdf->tkd", h_TKF, weights.w_down_EDF.double()[ids_TK])
    if weights.down_bias_ED is not None:
        o_TKD = o_TKD + weights.down_bias_ED.double()[ids_TK]
    return torch.einsum("tkd,tk->td", o_TKD if scale == "input" else o_TKD * weight_TK1, used_TK.double())


def assert_near(y_TD: Tensor, expected_TD: Tensor) -> None:
    """Equal up to the rounding of y's dtype in each of the three products."""
    tolerance = 1e-5 if y_TD.dtype == torch.float32 else 4 * torch.finfo(y_TD.dtype).eps
    assert y_TD.shape == expected_TD.shape
    torch.testing.assert_close(y_TD.double(), expected_TD.double(), rtol=tolerance, atol=tolerance)
