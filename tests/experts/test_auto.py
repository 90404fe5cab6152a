"""experts/auto.py: who computes the experts where nobody was named."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moe_lab
from moe_lab.errors import UnavailableError
from moe_lab.experts import auto, table
from moe_lab.experts.auto import Auto, preferred
from moe_lab.experts.base import Experts
from moe_lab.experts.grouped import Grouped
from moe_lab.experts.table import Choice, Shape
from moe_lab.experts.weights import ExpertWeights, Scale
from moe_lab.models.moe_layer import moe_layers
from moe_lab.ops.extension import BuildError
from moe_lab.routers.base import Routing
from moe_lab.runs import build
from moe_lab.runs.describe import describe
from tests import tiny
from tests.experts.cases import assert_near, formula, make_routing, make_weights, make_x

CPU = torch.device("cpu")


class Planted(Grouped):
    """In the place of fused: it can run anywhere, reads no sorted slots, and its output is another."""

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale = "output") -> Tensor:
        return super().__call__(x_TD, routing, weights, scale=scale) + 100

    def reads_dispatch(self, x_TD: Tensor) -> bool:
        return False

    def implementation(self, x_TD: Tensor, weights: ExpertWeights) -> dict[str, str]:
        return {"experts": "fused"}


class Unavailable(Planted):
    def compute_on(self, device: torch.device, *, load: bool = True) -> None:
        raise UnavailableError("needs sm_90")


class Unbuildable(Planted):
    def compute_on(self, device: torch.device, *, load: bool = True) -> None:
        raise BuildError("the extension does not compile: sorrow")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Grouped]], None]:
    """Puts a class in the place of fused."""

    def put(made: type[Grouped]) -> None:
        monkeypatch.setattr(auto, "FASTEST_FIRST", {"fused": made, "grouped": Grouped})

    return put


def decided(E: int = 5, K: int = 2, D: int = 32, F: int = 16) -> Auto:
    """Of a layer of this shape, on a CPU."""
    experts = Auto().for_layer(make_weights(E, D, F), K)
    experts.compute_on(CPU)
    return experts


def ran(experts: Experts, T: int, dtype: torch.dtype = torch.bfloat16) -> str:
    x_T0 = torch.empty(T, 0, dtype=dtype)
    return experts.implementation(x_T0, make_weights(5, 32, 16))["experts"]


def test_on_a_cpu_it_is_grouped() -> None:
    """In every dtype, for any number of tokens, of a layer or not; it declares and names what grouped does."""
    for experts in (Auto(), decided()):
        for T, dtype in itertools.product((0, 1, 16, 17), (torch.float32, torch.bfloat16)):
            x_T0 = torch.empty(T, 0, dtype=dtype)
            assert ran(experts, T, dtype) == ran(Grouped(), T, dtype)
            assert experts.reads_dispatch(x_T0) == Grouped().reads_dispatch(x_T0)
    assert Auto.graph_safe is Grouped.graph_safe is True
    assert preferred(CPU) == "grouped"


def test_only_the_packages_own_may_be_chosen() -> None:
    """And every one can be captured, as `Auto` declares."""
    assert set(auto.FASTEST_FIRST) <= {"fused", "grouped"} and list(auto.FASTEST_FIRST)[-1] == "grouped"
    made = [make() for make in auto.FASTEST_FIRST.values()]
    assert all(experts.graph_safe and type(experts).__module__.startswith("moe_lab.experts.") for experts in made)


def test_what_is_chosen_computes_and_speaks_for_itself(fused: Callable[[type[Grouped]], None]) -> None:
    """The output, the sorted slots and the name are those of fused where it can run, else those of grouped."""
    fused(Planted)
    weights, routing, x_TD = make_weights(5, 32, 16, torch.bfloat16), make_routing(37, 5, 2), make_x(37, 32)
    x_TD = x_TD.bfloat16()
    experts = decided()
    assert ran(experts, 37) == "fused" and not experts.reads_dispatch(x_TD)
    assert torch.equal(experts(x_TD, routing, weights), Planted()(x_TD, routing, weights))
    assert ran(experts, 37, torch.float32) == "grouped" and experts.reads_dispatch(x_TD.float())
    wide = weights.to(torch.float32)
    assert torch.equal(experts(x_TD.float(), routing, wide), Grouped()(x_TD.float(), routing, wide))
    assert ran(decided(D=40), 37) == ran(decided(F=24), 37) == "grouped"


def test_without_a_layer_the_shape_is_that_of_the_call(fused: Callable[[type[Grouped]], None]) -> None:
    """As a test or a notebook calls it."""
    fused(Planted)
    weights, routing, x_TD = make_weights(5, 32, 16, torch.bfloat16), make_routing(7, 5, 2), make_x(7, 32).bfloat16()
    experts = Auto()
    experts.compute_on(CPU)
    assert torch.equal(experts(x_TD, routing, weights), Planted()(x_TD, routing, weights))
    assert experts.shape is None


@pytest.mark.parametrize("made", [pytest.param(Unavailable, id="needs-a-gpu"), pytest.param(Unbuildable, id="build")])
def test_the_next_one_is_taken_where_fused_cannot_run(
    made: type[Grouped], fused: Callable[[type[Grouped]], None]
) -> None:
    """A build that failed is told where the kernels would have run; a GPU that is missing is not."""
    fused(made)
    experts = decided()
    assert ran(experts, 37) == preferred(CPU) == "grouped"
    expected = "experts=auto uses grouped: the extension does not compile: sorrow." if made is Unbuildable else None
    assert experts.warning(torch.empty(37, 0, dtype=torch.bfloat16)) == expected
    assert experts.warning(torch.empty(37, 0)) is None


def test_the_choice_follows_the_number_of_tokens_of_each_call(
    fused: Callable[[type[Grouped]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a table: a prefill and a decode step of one run may be computed by two."""
    fused(Planted)
    choices = {("bf16", Shape(5, 2, 32, 16)): [Choice(1, "fused", None), Choice(64, "grouped", None)]}
    monkeypatch.setattr(table, "_choices", lambda name: choices)
    table.fastest.cache_clear()
    try:
        experts = decided()
        assert [ran(experts, T) for T in (1, 7, 9, 64)] == ["fused", "fused", "grouped", "grouped"]
        assert [ran(decided(K=1), T) for T in (1, 64)] == ["fused", "fused"]
    finally:
        table.fastest.cache_clear()


class Right(Planted):
    """Computes what it should."""

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale = "output") -> Tensor:
        return Grouped()(x_TD, routing, weights, scale=scale)


class Untouchable(Grouped):
    def __call__(self, *arguments: object, **keys: object) -> Tensor:
        raise AssertionError("this one was not chosen")


def test_single_slots_are_checked_by_what_computes_the_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The layer probe gives the experts twice as many rows as there are tokens, for which another would be chosen."""
    monkeypatch.setattr(auto, "FASTEST_FIRST", {"fused": Right, "grouped": Untouchable})
    choices = {("bf16", Shape(5, 2, 32, 16)): [Choice(14, "fused", None), Choice(28, "grouped", None)]}
    monkeypatch.setattr(table, "_choices", lambda name: choices)
    table.fastest.cache_clear()
    try:
        record = moe_lab.run(tiny.moe_layer("dtype=bf16", d_model=32, hidden=16, tokens=14), tmp_path)
    finally:
        table.fastest.cache_clear()
    assert (record.status, record.reason, record.implementation["experts"]) == ("ok", None, "fused")


def test_layers_of_two_shapes_choose_apart() -> None:
    """They do not share what they know of their shape; the option's own object knows none."""
    option = Auto()
    small, large = (option.for_layer(make_weights(5, width, 16), 2) for width in (32, 40))
    assert (small.shape, large.shape, option.shape) == (Shape(5, 2, 32, 16), Shape(5, 2, 40, 16), None)


@pytest.mark.usefixtures("no_compiler")
def test_the_record_says_which_one_ran(fused: Callable[[type[Grouped]], None], tmp_path: Path) -> None:
    """And a plan before it; the name in the configuration stays auto. A wrong one is found out."""
    cfg = tiny.moe_layer("dtype=bf16", "experts=auto", d_model=32, hidden=16)
    record = moe_lab.run(cfg, tmp_path / "grouped")
    assert record.status == "ok" and record.config["experts"]["name"] == "auto"
    assert record.implementation["experts"] == build.check_available(cfg)[1]["experts"] == "grouped"
    fused(Planted)
    assert build.check_available(cfg)[1]["experts"] == "fused"
    assert describe("experts", cfg).implementations == ["fused"]
    record = moe_lab.run(cfg, tmp_path / "planted")
    assert record.implementation["experts"] == "fused" and (record.status, record.reason) != ("ok", None)


def test_a_run_whose_kernels_do_not_compile_says_so(fused: Callable[[type[Grouped]], None], tmp_path: Path) -> None:
    """In its row, once for all layers."""
    fused(Unbuildable)
    record = moe_lab.run(tiny.decoder_moe("dtype=bf16", "model.mlp_hidden_dim=16"), tmp_path)
    assert record.status == "ok" and record.implementation["experts"] == "grouped"
    assert [text for text in record.warnings if "experts=auto" in text] == [
        "experts=auto uses grouped: the extension does not compile: sorrow."
    ]


def test_every_layer_of_a_model_knows_its_shape() -> None:
    """Whoever makes it."""
    for cfg in (tiny.decoder_moe(), tiny.moe_layer(d_model=32, hidden=24)):
        layers = moe_layers(build.build_model(cfg))
        assert layers and all(layer.experts.shape == Shape(5, 2, 32, 24) for layer in layers)  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (1, 37, 300)])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")])
def test_on_a_gpu_nothing_is_read_on_the_host(T: int, dtype: torch.dtype, device: torch.device) -> None:
    """Neither for the choice nor by what is chosen: the first of those that can run, where there is no table."""
    weights, routing = make_weights(12, 32, 16, dtype, device), make_routing(T, 12, 3, 0.3, device)
    x_TD = make_x(T, 32, dtype, device)
    experts = Auto().for_layer(weights, 3)
    experts.compute_on(device)
    assert experts.chosen(x_TD) is experts.usable[preferred(device)]
    expected_TD = formula(x_TD, routing, weights)
    experts(x_TD, routing, weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y_TD = experts(x_TD, routing, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_near(y_TD, expected_TD)


def test_torch_compile_takes_the_choice_for_a_constant(fused: Callable[[type[Grouped]], None]) -> None:
    """In one graph, although it is looked up in a table."""
    fused(Planted)
    experts, weights = decided(), make_weights(5, 32, 16, torch.bfloat16)
    routing, x_TD = make_routing(7, 5, 2), make_x(7, 32).bfloat16()
    compiled = torch.compile(
        lambda x_TD: experts(x_TD, routing, weights), fullgraph=True, dynamic=False, backend="eager"
    )
    with torch.inference_mode():
        assert torch.allclose(compiled(x_TD), Planted()(x_TD, routing, weights), rtol=0.02)
        assert float(compiled(x_TD).min()) > 50
