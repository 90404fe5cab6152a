"""How far the routes and outputs of a run are from those of another router, `measure.reference_router`.

In each MoE layer, on the very input that the run gives it, with S_t the experts of token t, w their weights, y the
layer's output, and the same with an r for the reference:

    jaccard           mean_t |S_t and Sr_t| / |S_t or Sr_t|
    same_experts      share of the tokens with S_t = Sr_t
    same_first_choice share of the tokens whose expert of largest weight is the same
    combine_l1        mean_t sum_e |w_te - wr_te|: at most 2 where weights sum to 1
    rel_error         ||y - yr|| / ||yr||

Pooled over the layers' tokens, and of the worst layer; of equal weights the expert with the lowest id comes first.
`output_rel_error` is that of the whole model's output, each router following its own choices from layer to layer.

`floor` is the same between the reference router and itself with its logits computed in float64 by plain torch: what
rounding the logits alone changes. A difference as small as the floor says nothing about the router.

The layers are compared in an eager pass, by the run's own routes. An execution that fuses has other hidden states than
that pass, so there the routes are those that the run's router chooses in the pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.measure.distance import relative_error
from moe_lab.measure.routing_metrics import by_layer, worst_of
from moe_lab.models import Output
from moe_lab.models.moe_layer import MoELayer, hooked, indexed_moe_layers, moe_layers
from moe_lab.records import fields
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing, gate_logits
from moe_lab.routers.contract import members, weights_by_expert

WORSE = fields.worse(fields.DIFFERENCES)
"""For each measure, which of two layers is the worse."""

_ROWS_AT_ONCE = 4096  # of outputs in float64


@dataclass
class Difference:
    """Sums over the tokens of one layer: the first four measures, and both squares of the last."""

    tokens: int
    sums: Tensor

    @classmethod
    def of(cls, routing: Routing, other: Routing, y_TD: Tensor, other_y_TD: Tensor, n_experts: int) -> Difference:
        """Two routings of the same tokens and the outputs that they gave; the second is the reference."""
        mine_TE, theirs_TE = members(routing.expert_ids_TK, n_experts), members(other.expert_ids_TK, n_experts)
        both_T, either_T = (mine_TE & theirs_TE).sum(-1), (mine_TE | theirs_TE).sum(-1)
        weights_TE, other_weights_TE = weights_by_expert(routing, n_experts), weights_by_expert(other, n_experts)
        per_token = (
            torch.where(either_T > 0, both_T.double() / either_T, 1.0),  # neither uses any: the same
            both_T == either_T,
            _first_choice(weights_TE, mine_TE) == _first_choice(other_weights_TE, theirs_TE),
            (weights_TE - other_weights_TE).abs().sum(-1),
        )
        sums = torch.stack([values.double() for values in per_token]).sum(-1)
        off = size = torch.zeros((), dtype=torch.float64, device=y_TD.device)
        for mine_RD, theirs_RD in zip(y_TD.split(_ROWS_AT_ONCE), other_y_TD.split(_ROWS_AT_ONCE), strict=True):
            off = off + (mine_RD.double() - theirs_RD.double()).square().sum()
            size = size + theirs_RD.double().square().sum()
        return cls(len(y_TD), torch.cat([sums, torch.stack([off, size])]))

    def __add__(self, other: Difference) -> Difference:
        return Difference(self.tokens + other.tokens, self.sums + other.sums)

    def measures(self) -> dict[str, float | None]:
        """As in the head of this file; None without tokens."""
        if self.tokens == 0:
            return dict.fromkeys(WORSE)
        *means, off, size = self.sums.tolist()
        rel_error = math.sqrt(off / size) if size else (math.inf if off else 0.0)
        return dict(zip(WORSE, [*(total / self.tokens for total in means), rel_error], strict=True))


def _first_choice(weights_TE: Tensor, members_TE: Tensor) -> Tensor:
    """[T] the expert of largest weight, the lowest id of several; -1 for a token without any."""
    first_T = weights_TE.masked_fill(~members_TE, -torch.inf).argmax(-1)
    return first_T.masked_fill(~members_TE.any(-1), -1)


@contextmanager
def _in_float64(layers: Sequence[MoELayer]) -> Iterator[None]:
    """The layers' routers select from logits computed in float64."""

    def forward(
        router: Router,
        x_TD: Tensor,
        gate_ED: Tensor,
        ctx: RouteContext = NO_CONTEXT,
        gate_bias_E: Tensor | None = None,
    ) -> Routing:
        return router.select(gate_logits(x_TD.double(), gate_ED, gate_bias_E), ctx)

    routers = list({id(layer.router): layer.router for layer in layers}.values())
    try:
        for router in routers:
            router.forward = partial(forward, router)  # type: ignore[method-assign]
            router.norms_input = lambda *_: False  # type: ignore[method-assign]
        yield
    finally:
        for router in routers:
            del router.forward, router.norms_input


@torch.inference_mode()
def agreement(model: nn.Module, reference: nn.Module, x: Tensor, ran: Output, *, fuses: bool = False) -> dict[str, Any]:
    """The record's `agreement`, without the reference's name and the time.

    Args:
        model: the run's.
        reference: the same parameters with the other router.
        x: the model's input.
        ran: what the run's own execution made of it.
        fuses: whether that execution rounds otherwise than an eager one.
    """
    layers, references = indexed_moe_layers(model), moe_layers(reference)
    theirs: dict[int, MoELayer] = {id(layer): other for (_, layer), other in zip(layers, references, strict=True)}
    differences: list[Difference] = []
    floors: list[Difference] = []

    def look(layer: MoELayer, arguments: tuple[Any, ...], result: tuple[Tensor, Routing]) -> None:
        x_TD, ctx, E = arguments[0], arguments[1], layer.weights.n_experts
        other = theirs[id(layer)]
        y_TD, routing = other(x_TD, ctx)
        differences.append(Difference.of(result[1], routing, result[0], y_TD, E))
        with _in_float64([other]):
            exact_y_TD, exact = other(x_TD, ctx)
        floors.append(Difference.of(exact, routing, exact_y_TD, y_TD, E))

    with hooked((layer for _, layer in layers), look):
        model(x, forced_routing=None if fuses else ran.routings)
    y = reference(x).y
    with _in_float64(references):
        exact_y = reference(x).y
    ids = [index for index, _ in layers]
    return {
        "output_rel_error": relative_error(ran.y, y),
        **_summary(differences, ids),
        "floor": {"output_rel_error": relative_error(exact_y, y), **_summary(floors, ids)},
    }


def _summary(differences: Sequence[Difference], layer_ids: Sequence[int]) -> dict[str, Any]:
    """{pooled, worst, layers} of at least one layer."""
    differences = by_layer(differences, len(layer_ids))
    pooled = differences[0]
    for difference in differences[1:]:
        pooled = pooled + difference
    layers = [difference.measures() for difference in differences]
    return {
        "pooled": pooled.measures(),
        "worst": worst_of(layers, WORSE),
        "layers": [{"layer": index, **difference} for index, difference in zip(layer_ids, layers, strict=True)],
    }
