"""model=moe_layer: one MoE layer alone, for work on routers and expert kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moe_lab.config.schemas import TIMED
from moe_lab.experts.base import Experts
from moe_lab.experts.weights import ExpertWeights
from moe_lab.models import ForcedRouting, MakeRouter, Output
from moe_lab.models.layer_kinds import make_moe_layer
from moe_lab.routers.base import RouteContext


class MoELayerModel(nn.Module):
    """The keys are those of conf/model/moe_layer.yaml; input: T = batch * seq_len hidden states [T, D].

    `timed` is read where a routing is forced (workloads/forced.py): with `experts` no router runs in a timed pass.
    """

    vocab_size: int | None = None

    def __init__(self, *, make_router: MakeRouter, experts: Experts, shape: dict[str, Any], timed: str):
        super().__init__()
        if timed not in TIMED:
            raise ValueError(f"model.timed={timed}: must be one of {', '.join(TIMED)}.")
        self.d_model = int(shape["d_model"])
        weights = ExpertWeights(shape["n_experts"], self.d_model, shape["mlp_hidden_dim"])
        self.moe = make_moe_layer(weights, make_router(shape["n_experts"], shape["top_k"]), experts)

    def input_shape(self, batch: int, seq_len: int) -> tuple[int, ...]:
        """[T, D] hidden states."""
        return batch * seq_len, self.d_model

    def forward(self, x_TD: Tensor, forced_routing: ForcedRouting = None) -> Output:
        """x [T, D] -> y of the same shape."""
        forced = forced_routing[0] if forced_routing is not None else None
        y_TD, routing = self.moe(x_TD, RouteContext(), forced)
        return Output(y_TD, (routing,))
