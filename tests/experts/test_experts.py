"""What every implementation of the experts keeps of the signature in `moe_lab.experts`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moe_lab import marks as phases
from moe_lab.experts.auto import Auto
from moe_lab.experts.base import Experts
from moe_lab.experts.exported import Exported
from moe_lab.experts.grouped import Grouped
from moe_lab.experts.loop import Loop
from moe_lab.experts.weights import Clamped, ExpertWeights, Scale
from moe_lab.ops.dispatch import dispatch
from moe_lab.routers.base import Routing
from tests.experts.cases import (
    EMPTY,
    KINDS,
    SCALES,
    SIZES,
    UNUSED,
    assert_near,
    formula,
    make_routing,
    make_weights,
    make_x,
)

IMPLEMENTATIONS = pytest.mark.parametrize(
    "experts",
    [pytest.param(Loop(), id="loop"), pytest.param(Grouped(), id="grouped"), pytest.param(Auto(), id="auto")],
)


@pytest.mark.thinned(2, empty=EMPTY)
@IMPLEMENTATIONS
@SIZES
@UNUSED
@SCALES
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16", marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
    ],
)
def test_the_output_is_the_weighted_sum_of_the_chosen_experts(
    experts: Experts, T: int, E: int, K: int, D: int, F: int, unused: float, scale: Scale, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    """Equal to the formula in float64, for any sizes, unused slots and scale; x keeps its values."""
    weights, routing = make_weights(E, D, F, dtype, device), make_routing(T, E, K, unused, device)
    x_TD = make_x(T, D, dtype, device)
    before_TD = x_TD.clone()
    y_TD = experts(x_TD, routing, weights, scale=scale)
    assert y_TD.dtype == dtype
    assert_near(y_TD, formula(x_TD, routing, weights, scale))
    assert torch.equal(x_TD, before_TD)


@pytest.mark.thinned(2, empty=EMPTY)
@pytest.mark.parametrize(
    "experts",
    [
        pytest.param(Loop(), id="loop"),
        pytest.param(Grouped(), id="grouped"),
        pytest.param(Auto(), id="auto"),
        pytest.param(Exported(), id="exported"),
    ],
)
@KINDS
@UNUSED
@SCALES
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (0, 1, 37)])
def test_biases_and_activations_are_computed(
    experts: Experts, kind: dict[str, Any], unused: float, scale: Scale, T: int, device: torch.device
) -> None:
    """Equal to the formula in float64; the routing weight scales the output with its bias, or the input alone."""
    weights, routing = make_weights(5, 9, 7, device=device, **kind), make_routing(T, 5, 3, unused, device)
    x_TD = make_x(T, 9, device=device)
    assert_near(experts(x_TD, routing, weights, scale=scale), formula(x_TD, routing, weights, scale))


@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in ("up_bias_E2F", "down_bias_ED")])
def test_each_bias_and_each_setting_of_the_activation_changes_the_output(name: str) -> None:
    """So that an implementation which dropped one is found out above."""
    weights = make_weights(5, 9, 7, bias=True, activation=Clamped(2.5, 0.5))
    routing, x_TD = make_routing(37, 5, 3), make_x(37, 9)
    whole_TD = formula(x_TD, routing, weights)
    for activation in (None, Clamped(1.0, 0.5), Clamped(2.5, 5.0), "gelu_tanh"):
        other = make_weights(5, 9, 7, bias=True, activation=activation)
        assert float((formula(x_TD, routing, other) - whole_TD).abs().max()) > 0.05
    weights.get_parameter(name).zero_()
    assert float((formula(x_TD, routing, weights) - whole_TD).abs().max()) > 0.05


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")])
def test_narrow_dtypes_work_on_a_cpu_too(experts: Experts, dtype: torch.dtype) -> None:
    """fp16 and bf16 on a CPU differ from float64 by their rounding."""
    weights, routing, x_TD = make_weights(5, 9, 7, dtype), make_routing(37, 5, 2, 0.2), make_x(37, 9, dtype)
    assert_near(experts(x_TD, routing, weights), formula(x_TD, routing, weights))


@IMPLEMENTATIONS
def test_the_weight_multiplies_the_output_unless_asked_otherwise(experts: Experts) -> None:
    """scale defaults to output, which differs from input because the experts are not linear."""
    weights, routing, x_TD = make_weights(5, 9, 7), make_routing(37, 5, 2), make_x(37, 9)
    by_default_TD = experts(x_TD, routing, weights)
    assert torch.equal(by_default_TD, experts(x_TD, routing, weights, scale="output"))
    assert not torch.allclose(by_default_TD, experts(x_TD, routing, weights, scale="input"), rtol=1e-2)


@IMPLEMENTATIONS
@pytest.mark.parametrize("scale", [pytest.param("both", id="both"), pytest.param("", id="empty")])
def test_a_wrong_scale_is_a_value_error(experts: Experts, scale: str) -> None:
    """The message names the value and what is allowed."""
    with pytest.raises(ValueError, match=f"scale={scale}.*output or input"):
        experts(make_x(2, 9), make_routing(2, 5, 2), make_weights(5, 9, 7), scale=scale)


@IMPLEMENTATIONS
@SCALES
def test_a_token_without_experts_gives_zero(experts: Experts, scale: Scale, device: torch.device) -> None:
    """All slots unused: the output is exactly 0, even where the token's hidden state is NaN."""
    routing = make_routing(37, 5, 2, device=device)
    routing.expert_ids_TK[[0, 17, 36]] = -1
    routing.weights_TK[[0, 17, 36]] = 0
    x_TD = make_x(37, 9, device=device)
    x_TD[17] = math.nan
    y_TD = experts(x_TD, routing, make_weights(5, 9, 7, device=device), scale=scale)
    assert not y_TD[[0, 17, 36]].any()
    assert y_TD.isfinite().all()


@IMPLEMENTATIONS
@SCALES
@pytest.mark.parametrize("weight", [pytest.param(3.0, id="3"), pytest.param(math.nan, id="NaN")])
def test_the_weight_of_an_unused_slot_is_not_read(
    experts: Experts, scale: Scale, weight: float, device: torch.device
) -> None:
    """Whatever stands beside an id of -1 leaves the output as it is."""
    weights, routing = make_weights(5, 9, 7, device=device), make_routing(37, 5, 3, 0.4, device)
    x_TD = make_x(37, 9, device=device)
    odd_TK = routing.weights_TK.masked_fill(routing.expert_ids_TK < 0, weight)
    expected_TD = experts(x_TD, routing, weights, scale=scale)
    assert torch.equal(experts(x_TD, routing._replace(weights_TK=odd_TK), weights, scale=scale), expected_TD)


@IMPLEMENTATIONS
@SCALES
@pytest.mark.parametrize("T", [pytest.param(1, id="T=1"), pytest.param(199, id="T=199")])
def test_one_expert_may_take_everything(experts: Experts, scale: Scale, T: int, device: torch.device) -> None:
    """All tokens on the last expert: the loop's and the kernel's longest segment."""
    ids_TK = torch.full((T, 1), 6, dtype=torch.int32, device=device)
    routing = Routing(ids_TK, torch.full((T, 1), 0.75, device=device))
    weights, x_TD = make_weights(7, 16, 11, device=device), make_x(T, 16, device=device)
    assert_near(experts(x_TD, routing, weights, scale=scale), formula(x_TD, routing, weights, scale))


@IMPLEMENTATIONS
@SCALES
def test_an_expert_may_stand_twice_in_a_row(experts: Experts, scale: Scale) -> None:
    """Two slots of a token on one expert both count."""
    weights, x_TD = make_weights(5, 9, 7), make_x(37, 9)
    ids_TK = torch.full((37, 2), 3, dtype=torch.int32)
    once, twice = Routing(ids_TK[:, :1], torch.full((37, 1), 0.5)), Routing(ids_TK, torch.full((37, 2), 0.5))
    expected_TD = 2 * experts(x_TD, once, weights, scale=scale)
    assert_near(experts(x_TD, twice, weights, scale=scale), expected_TD)


@IMPLEMENTATIONS
def test_experts_that_are_not_in_use_are_not_touched(experts: Experts, device: torch.device) -> None:
    """NaN in the weights of every expert without a slot reaches no output."""
    weights, routing, x_TD = make_weights(12, 9, 7, device=device), make_routing(1, 12, 3, device=device), make_x(1, 9)
    x_TD = x_TD.to(device)
    expected_TD = experts(x_TD, routing, weights)
    idle = [expert for expert in range(12) if expert not in routing.expert_ids_TK[0].tolist()]
    weights.w_gate_up_E2FD[idle] = math.nan
    weights.w_down_EDF[idle] = math.nan
    assert torch.equal(experts(x_TD, routing, weights), expected_TD)


@IMPLEMENTATIONS
def test_a_token_does_not_see_the_others(experts: Experts, device: torch.device) -> None:
    """A NaN token makes its own output NaN and no other."""
    weights, routing = make_weights(5, 9, 7, device=device), make_routing(37, 5, 2, device=device)
    x_TD = make_x(37, 9, device=device)
    expected_TD = experts(x_TD, routing, weights)
    x_TD[5] = math.nan
    y_TD = experts(x_TD, routing, weights)
    rest = [token for token in range(37) if token != 5]
    assert y_TD[5].isnan().all()
    assert_near(y_TD[rest], expected_TD[rest])


@IMPLEMENTATIONS
def test_the_output_is_linear_in_the_weights(experts: Experts) -> None:
    """With scale=output, weights a*v + b*w give a*y(v) + b*y(w)."""
    weights, first, x_TD = make_weights(7, 9, 11), make_routing(37, 7, 3, 0.2), make_x(37, 9)
    second_TK = first.weights_TK.flip(0).masked_fill(first.expert_ids_TK < 0, 0)
    mixed_TK = 2.5 * first.weights_TK - 0.75 * second_TK
    y_TD, y_second_TD, y_mixed_TD = (
        experts(x_TD, first._replace(weights_TK=weights_TK), weights)
        for weights_TK in (first.weights_TK, second_TK, mixed_TK)
    )
    assert_near(y_mixed_TD, 2.5 * y_TD - 0.75 * y_second_TD)


@IMPLEMENTATIONS
@SCALES
def test_experts_have_no_order(experts: Experts, scale: Scale) -> None:
    """Permuting the experts together with the ids changes nothing."""
    weights, routing, x_TD = make_weights(7, 9, 11), make_routing(37, 7, 3, 0.2), make_x(37, 9)
    perm_E = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    permuted = ExpertWeights(7, 9, 11)
    for name, parameter in weights.named_parameters():
        permuted.get_parameter(name).copy_(parameter[perm_E])
    new_id_E = perm_E.argsort().to(torch.int32)
    ids_TK = torch.where(routing.expert_ids_TK < 0, -1, new_id_E[routing.expert_ids_TK.long().clamp(min=0)])
    y_TD = experts(x_TD, routing._replace(expert_ids_TK=ids_TK), permuted, scale=scale)
    assert_near(y_TD, experts(x_TD, routing, weights, scale=scale))


@IMPLEMENTATIONS
def test_slots_have_no_order(experts: Experts) -> None:
    """Reversing the slots of every token changes nothing."""
    weights, routing, x_TD = make_weights(7, 9, 11), make_routing(37, 7, 3, 0.2), make_x(37, 9)
    reversed_slots = Routing(routing.expert_ids_TK.flip(1), routing.weights_TK.flip(1))
    assert_near(experts(x_TD, reversed_slots, weights), experts(x_TD, routing, weights))


@IMPLEMENTATIONS
@SCALES
def test_strides_change_nothing(experts: Experts, scale: Scale, device: torch.device) -> None:
    """Hidden states, ids and weights may be views."""
    weights, wide = make_weights(7, 9, 11, device=device), make_routing(37, 7, 6, 0.2, device)
    x_TD = make_x(9, 37, device=device).t()
    views = Routing(wide.expert_ids_TK[:, ::2], wide.weights_TK[:, ::2])
    copies = Routing(views.expert_ids_TK.contiguous(), views.weights_TK.contiguous())
    y_TD = experts(x_TD, views, weights, scale=scale)
    assert_near(y_TD, experts(x_TD.contiguous(), copies, weights, scale=scale))


@IMPLEMENTATIONS
def test_a_dispatch_that_comes_along_changes_nothing(experts: Experts) -> None:
    """A routing that carries its own dispatch gives what it gives without."""
    weights, routing, x_TD = make_weights(7, 9, 11), make_routing(37, 7, 3, 0.2), make_x(37, 9)
    carried = routing._replace(dispatch=dispatch(routing.expert_ids_TK, 7))
    assert torch.equal(experts(x_TD, carried, weights), experts(x_TD, routing, weights))


@IMPLEMENTATIONS
@SCALES
def test_the_parameters_are_neither_changed_nor_moved(experts: Experts, scale: Scale, device: torch.device) -> None:
    """Every implementation reads the very tensors: same memory and same values afterwards, no buffers added."""
    weights, routing = make_weights(7, 9, 11, device=device), make_routing(37, 7, 3, 0.2, device)
    before = {name: (value.data_ptr(), value.clone()) for name, value in weights.state_dict().items()}
    experts(make_x(37, 9, device=device), routing, weights, scale=scale)
    after = weights.state_dict()
    assert after.keys() == before.keys()
    for name, (pointer, value) in before.items():
        assert after[name].data_ptr() == pointer
        assert torch.equal(after[name], value)


class Marks:
    """A listener that notes what it is told."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def start(self, name: str) -> None:
        self.seen.append(f"start {name}")

    def stop(self, name: str) -> None:
        self.seen.append(f"stop {name}")


@pytest.fixture
def marks() -> Iterator[Marks]:
    """Listens for the length of a test."""
    listener = Marks()
    phases.listen(listener)
    yield listener
    phases.listen(None)


@pytest.mark.parametrize(
    ("experts", "names"),
    [
        pytest.param(Loop(), ["dispatch+experts+combine"], id="loop"),
        pytest.param(Grouped(), ["dispatch", "experts", "combine"], id="grouped"),
    ],
)
def test_the_phases_are_marked_in_order(experts: Experts, names: list[str], marks: Marks) -> None:
    """Phases follow each other without nesting, under names that the record knows."""
    experts(make_x(3, 9), make_routing(3, 5, 2), make_weights(5, 9, 7))
    assert marks.seen == [f"{edge} {name}" for name in names for edge in ("start", "stop")]
    assert {part for name in names for part in name.split("+")} <= set(phases.NAMES)
