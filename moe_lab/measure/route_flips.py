"""Which expert sets change with the weights, by how near the choice was.

    flips       share of (token, MoE layer) whose set of experts is another than that of the unchanged model
    the margin  p_(k) - p_(k+1) of the unchanged model's softmax, sorted: the k-th expert's lead over the next

Twice: each model on its own hidden states, so that a change adds up from layer to layer (`route_flips`); and both gates
on the hidden states of the run's model, so that nothing but the gate differs (`gate_flips`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.models import Output
from moe_lab.models.moe_layer import MoELayer, hooked, moe_layers
from moe_lab.ops.by_expert import by_expert
from moe_lab.routers.base import RouteContext, Routing, gate_logits

MARGINS = {"0 to 0.001": 0.001, "0.001 to 0.01": 0.01, "0.01 to 0.1": 0.1, "0.1 to 1": math.inf}
"""Classes of margins by their upper ends, which belong to the next."""


def boundary_margin(logits_TE: Tensor, top_k: int) -> Tensor:
    """p_(k) - p_(k+1) of the softmax, p sorted, [T] float32: how near the choice was; NaN where k = E."""
    p_TE = logits_TE.softmax(-1, dtype=torch.float32)
    if top_k >= p_TE.shape[1]:
        return torch.full_like(p_TE[:, 0], torch.nan)
    top = p_TE.topk(top_k + 1, dim=-1).values
    return top[:, -2] - top[:, -1]


def flips(
    before: Sequence[Routing], after: Sequence[Routing], margins: Sequence[Tensor], n_experts: int
) -> dict[str, Any]:
    """Of two routings of the same tokens, MoE layer by layer, and the margins [T] of the first.

    Returns:
        {flips: share of all sets, by_layer: of those of each layer, by_margin: of those of each class of `MARGINS`,
        None where there are none, sets: how many are in each}. Sets without a margin (k = E) are in no class.
    """
    pairs = zip(before, after, strict=True)
    flipped_LT = torch.stack([(_sets(a, n_experts) != _sets(b, n_experts)).any(-1) for a, b in pairs]).double()
    margin_LT = torch.stack(list(margins))
    low, inside = 0.0, {}
    for name, high in MARGINS.items():
        inside[name] = flipped_LT[(margin_LT >= low) & (margin_LT < high)]
        low = high
    return {
        "flips": float(flipped_LT.mean()),
        "by_layer": flipped_LT.mean(1).tolist(),
        "by_margin": {name: float(of.mean()) if len(of) else None for name, of in inside.items()},
        "sets": {name: len(of) for name, of in inside.items()},
    }


def _sets(routing: Routing, n_experts: int) -> Tensor:
    """[T, E] bool: who is in a token's set."""
    return by_expert(torch.ones_like(routing.weights_TK), routing.expert_ids_TK, n_experts) > 0


@torch.inference_mode()
def compare_routes(model: nn.Module, before: nn.Module, x: Tensor) -> dict[str, Any]:
    """What `flips` gives, as `route_KEY` and `gate_KEY`, of a model and of the same one with its former weights.

    Args:
        model, before: with as many experts, and routers of the same kind.
        x: the models' input.
    """
    layers, others = moe_layers(model), moe_layers(before)
    former = dict(zip(layers, others, strict=True))
    same: list[tuple[Routing, Routing, Tensor]] = []
    margins: list[Tensor] = []

    def look(layer: MoELayer, arguments: tuple[Tensor, RouteContext], _: Any) -> None:
        x_TD, ctx = arguments[0], arguments[1]
        weights = former[layer].weights
        logits_TE = gate_logits(layer.gate_input(x_TD), weights.gate_ED, weights.gate_bias_E)
        routings = layer.router.select(logits_TE, ctx), layer.router.select(layer.logits(x_TD), ctx)
        same.append((*routings, boundary_margin(logits_TE, layer.router.top_k)))

    def look_before(layer: MoELayer, arguments: tuple[Tensor, ...], _: Any) -> None:
        margins.append(boundary_margin(layer.logits(arguments[0]), layer.router.top_k))

    with hooked(layers, look):
        after: Output = model(x)
    with hooked(others, look_before):
        native: Output = before(x)
    E = layers[0].weights.n_experts
    old, new, gate_margins = zip(*same, strict=True)
    gates = flips(old, new, gate_margins, E)
    routes = flips(native.routings, after.routings, margins, E)
    return {f"{name}_{key}": value for name, of in (("route", routes), ("gate", gates)) for key, value in of.items()}
