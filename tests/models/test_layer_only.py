"""models/layer_only.py: model=moe_layer is its layer and nothing else."""

from __future__ import annotations

import pytest
import torch

from moe_lab.errors import UnavailableError
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


@pytest.mark.parametrize("experts", [pytest.param(name, id=name) for name in ("grouped", "loop", "transformers")])
def test_the_experts_alone_compute_what_the_layer_does(experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the routing of a pass before, of which the slots are not sorted; no router runs in a step."""
    if experts == "transformers":
        pytest.importorskip("transformers")
    layer = tiny.built(tiny.moe_layer("router=sinkhorn", f"experts={experts}"))
    alone = tiny.built(tiny.moe_layer("router=sinkhorn", f"experts={experts}", "model.timed=experts"))
    expected = layer.made().ready_step()()
    assert alone.made().forced is not None and alone.made().forced[0].dispatch is None
    monkeypatch.setattr(alone.made().model.moe.router, "forward", lambda *arguments: pytest.fail("a router ran"))
    output = alone.made().ready_step()()
    assert torch.equal(output.y, expected.y)
    assert torch.equal(output.routings[0].expert_ids_TK, expected.routings[0].expert_ids_TK)
    assert alone.made().implementation()["router"] == "forced: native"


def test_what_is_timed_is_one_of_two() -> None:
    """The message names both."""
    with pytest.raises(ValueError, match=r"^model\.timed=expert: must be one of layer, experts\.$"):
        tiny.built(tiny.moe_layer("model.timed=expert"))


def test_experts_alone_cannot_be_had_of_a_layer_without_a_routing() -> None:
    """Soft MoE mixes."""
    with pytest.raises(UnavailableError, match=r"^model\.timed=experts cannot be used with router=soft.*timed=layer"):
        tiny.built(tiny.moe_layer("model.timed=experts", "router=soft"))
