"""model=router: a router alone, fed T = batch * seq_len rows of logits: for work on its kernels.

What runs and is timed is `select`; with `sort` also the sorting of the slots for a grouped product, by the router's own
kernel where it does both; with `gate` it is fed hidden states, and `route` multiplies them by the gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.experts.base import Experts
from moe_lab.experts.weights import ExpertWeights, Scale
from moe_lab.marks import phase
from moe_lab.models import ForcedRouting, MakeRouter, Output
from moe_lab.models.moe_layer import MoELayer
from moe_lab.ops import extension
from moe_lab.ops.by_expert import by_expert
from moe_lab.ops.dispatch import dispatch
from moe_lab.routers.base import RouteContext, Router, Routing


class _NoWeights(ExpertWeights):
    """Experts without matrices; a gate [E, D] where a width is given."""

    gate_bias_E = None
    scale_E = None

    def __init__(self, n_experts: int, d_model: int | None):
        nn.Module.__init__(self)
        self._n_experts = n_experts
        if d_model is not None:
            self.gate_ED = nn.Parameter(torch.empty(n_experts, d_model), requires_grad=False)

    @property
    def n_experts(self) -> int:
        return self._n_experts

    @property
    def bytes_per_expert(self) -> int:
        return 0


class _NoExperts(Experts):
    """The output is the routing weights [T, E]: a router computes nothing else."""

    graph_safe = True
    only_plain = False  # it reads no matrices at all

    def __init__(self, sort: bool):
        self.sort = sort

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale = "output") -> Tensor:
        """[T, E] in float32, 0 where an expert is not chosen."""
        return by_expert(routing.weights_TK, routing.expert_ids_TK, weights.n_experts)

    def implementation(self, x_TD: Tensor, weights: ExpertWeights) -> dict[str, str]:
        """See `Experts`; `dispatch` too where the extension sorts the slots."""
        sorts = self.sort and extension.sorts(x_TD.device, weights.n_experts)
        return {"experts": "none"} | ({"dispatch": extension.label(x_TD.device)} if sorts else {})


class RouterLayer(MoELayer):
    """An MoE layer that stops at the routing, and is fed logits [T, E] unless it has a width."""

    def __init__(self, n_experts: int, d_model: int | None, router: Router, sort: bool):
        super().__init__(_NoWeights(n_experts, d_model), router, _NoExperts(sort))
        self.sort, self.has_gate = sort, d_model is not None

    def forward(self, x_TD: Tensor, ctx: RouteContext, forced: Routing | None = None) -> tuple[Tensor, Routing]:
        """(weights [T, K], Routing)."""
        routing = forced
        if routing is None:
            with phase("router"):
                ctx = ctx._replace(want_dispatch=self.sort)
                routing = (
                    self.router(x_TD, self.weights.gate_ED, ctx) if self.has_gate else self.router.select(x_TD, ctx)
                )
        if self.sort and routing.dispatch is None:
            with phase("dispatch"):
                routing = routing._replace(dispatch=dispatch(routing.expert_ids_TK, self.weights.n_experts))
        return routing.weights_TK, routing

    def multiplies_gate(self, x_TD: Tensor) -> bool:
        """See `MoELayer.multiplies_gate`."""
        return self.has_gate and not self.sort and super().multiplies_gate(x_TD)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Of the gate, or the input."""
        return super().logits(x_TD) if self.has_gate else x_TD

    def use_reference(self) -> None:
        """There are no experts to replace."""


class RouterModel(nn.Module):
    """The keys are those of conf/model/router.yaml; input: logits [T, E] or [T, D], the output the weights [T, K]."""

    vocab_size: int | None = None
    gives_routing = True
    """Ids and sorted slots are part of what it writes."""

    def __init__(self, *, make_router: MakeRouter, shape: dict[str, Any], gate: bool, sort: bool):
        super().__init__()
        n_experts, d_model = shape["n_experts"], shape["d_model"] if gate else None
        self.width = d_model or n_experts
        self.moe = RouterLayer(n_experts, d_model, make_router(n_experts, shape["top_k"]), sort)

    def input_shape(self, batch: int, seq_len: int) -> tuple[int, ...]:
        """[T, E] logits, or [T, D] hidden states."""
        return batch * seq_len, self.width

    def forward(self, x_TD: Tensor, forced_routing: ForcedRouting = None) -> Output:
        """Logits [T, E] or hidden states [T, D] -> weights [T, K]."""
        weights_TK, routing = self.moe(x_TD, RouteContext(), forced_routing[0] if forced_routing is not None else None)
        return Output(weights_TK, (routing,))
