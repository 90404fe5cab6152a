"""models/layer_only.py: model=moe_layer is its layer and nothing else."""

from __future__ import annotations

import torch

from moe_lab.models.layer_only import MoELayerModel
from moe_lab.routers.base import RouteContext, Routing
from tests import tiny


def model() -> MoELayerModel:
    layer_only = tiny.built(tiny.moe_layer()).built.model
    assert isinstance(layer_only, MoELayerModel)
    return layer_only


def test_it_computes_what_its_layer_computes() -> None:
    """One routing, that of the layer; the input is the hidden states of all tokens."""
    layer_only = model()
    x_TD = torch.randn(layer_only.input_shape(3, 5), generator=torch.Generator().manual_seed(0))
    assert x_TD.shape == (15, tiny.D)
    y_TD, routings, *_ = layer_only(x_TD)
    expected_TD, routing = layer_only.moe(x_TD, RouteContext())
    assert torch.equal(y_TD, expected_TD)
    assert len(routings) == 1 and torch.equal(routings[0].expert_ids_TK, routing.expert_ids_TK)


def test_a_forced_routing_is_used() -> None:
    """In place of the router's choice."""
    layer_only = model()
    x_TD = torch.randn(4, tiny.D, generator=torch.Generator().manual_seed(0))
    forced = Routing(torch.full((4, 1), 3, dtype=torch.int32), torch.ones(4, 1))
    y_TD, routings, *_ = layer_only(x_TD, (forced,))
    assert torch.equal(routings[0].expert_ids_TK, forced.expert_ids_TK)
    assert torch.equal(y_TD, layer_only.moe(x_TD, RouteContext(), forced)[0])
    assert not torch.equal(y_TD, layer_only(x_TD).y)
