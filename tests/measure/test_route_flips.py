"""measure/route_flips.py: shares by hand, and of two layers whose gates are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from moe_lab.measure.route_flips import MARGINS, boundary_margin, compare_routes, flips
from moe_lab.models.moe_layer import moe_layers
from moe_lab.routers.base import Routing
from moe_lab.runs import build
from tests import tiny

CPU = torch.device("cpu")


def routing(*sets: tuple[int, ...]) -> Routing:
    ids = torch.tensor(sets, dtype=torch.int32)
    return Routing(ids, (ids >= 0).float())


def test_flips_by_hand() -> None:
    """Order does not matter, an unused slot does; layer 0 has one flip of three, layer 1 two."""
    before = [routing((0, 1), (2, 3), (0, -1)), routing((0, 1), (1, 2), (2, 3))]
    after = [routing((1, 0), (2, 0), (0, -1)), routing((0, 1), (1, -1), (3, 0))]
    margins = [torch.tensor([0.5, 0.0005, 0.02]), torch.tensor([0.1, 0.02, math.nan])]
    found = flips(before, after, margins, 4)
    assert found["flips"] == 0.5
    assert found["by_layer"] == pytest.approx([1 / 3, 2 / 3])
    assert list(found["by_margin"].values()) == [1.0, None, 0.5, 0.0]
    assert list(found["sets"].values()) == [1, 0, 2, 2]  # 0.1 is in the last class, NaN in none
    assert found["by_margin"].keys() == found["sets"].keys() == MARGINS.keys()


def test_margin_by_hand() -> None:
    """Probabilities 1/2, 1/3, 1/6; with k = E there is no next expert."""
    logits = torch.tensor([[3.0, 1.0, 2.0]]).log()
    assert boundary_margin(logits, 1).item() == pytest.approx(1 / 6)
    assert boundary_margin(logits, 2).item() == pytest.approx(1 / 6)
    assert boundary_margin(logits, 3).isnan().all()


def models() -> tuple[nn.Module, nn.Module, Tensor]:
    cfg = tiny.decoder_moe("batch=3", "seq_len=11")
    model, before = build.build_model(cfg, CPU), build.build_model(cfg, CPU)
    return model, before, build.build_input(cfg, model, CPU)


def test_equal_models_have_no_flips() -> None:
    model, before, x = models()
    found = compare_routes(model, before, x)
    assert found["route_flips"] == found["gate_flips"] == 0
    assert sum(found["route_sets"].values()) == sum(found["gate_sets"].values()) == 2 * 33


def test_another_gate_in_the_first_layer_flips_the_second_by_its_inputs_alone() -> None:
    """Its gate is the same, so on the same hidden states nothing flips there; each on its own, much does."""
    model, before, x = models()
    first = moe_layers(model)[0].weights.gate_ED
    first.copy_(first.roll(1, 0))
    found = compare_routes(model, before, x)
    assert found["gate_by_layer"][0] == found["route_by_layer"][0] > 0.5
    assert found["gate_by_layer"][1] == 0
    assert found["route_by_layer"][1] > 0


def test_other_experts_flip_routes_but_no_gate() -> None:
    """What quantised experts do to the routes behind them."""
    model, before, x = models()
    for layer in moe_layers(model):
        layer.weights.w_down_EDF.mul_(1.5)
    found = compare_routes(model, before, x)
    assert found["gate_flips"] == 0
    assert found["route_by_layer"][0] == 0 and found["route_by_layer"][1] > 0
