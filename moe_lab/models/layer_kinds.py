"""Which kind of MoE layer a router asks for."""

from __future__ import annotations

from moe_lab.experts.base import Experts
from moe_lab.experts.weights import ExpertWeights
from moe_lab.models.moe_layer import MoELayer, OwnNorms, SharedExpert
from moe_lab.models.soft_moe import SoftMoELayer
from moe_lab.routers.base import Router
from moe_lab.routers.soft import SoftMoE


def make_moe_layer(
    weights: ExpertWeights,
    router: Router,
    experts: Experts,
    shared: SharedExpert | None = None,
    norms: OwnNorms | None = None,
) -> MoELayer:
    """The MoE layer that `router` asks for."""
    kind = SoftMoELayer if isinstance(router, SoftMoE) else MoELayer
    return kind(weights, router, experts, shared, norms)
