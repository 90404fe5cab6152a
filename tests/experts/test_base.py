"""experts/base.py: the defaults of `Experts`, and a plain function behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.experts.base import Experts, FunctionExperts, require_plain
from moe_lab.experts.grouped import Grouped
from moe_lab.experts.loop import Loop
from moe_lab.experts.weights import Clamped, ExpertWeights, Scale
from moe_lab.ops import extension
from moe_lab.ops.library import asked_of
from moe_lab.routers.base import Routing
from tests.experts.cases import make_routing, make_weights, make_x


class Halved(Experts):
    """Declares nothing."""

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale = "output") -> Tensor:
        return x_TD / 2


def test_a_class_that_declares_nothing_is_not_taken_for_safe() -> None:
    """No graph, no sorted slots, the class's name in the record."""
    experts, x_TD, weights = Halved(), make_x(37, 9), make_weights(5, 9, 7)
    assert not experts.graph_safe and not experts.reads_dispatch(x_TD)
    assert experts.implementation(x_TD, weights) == {"experts": "halved"}
    assert experts.for_layer(weights, 2) is experts.chosen(x_TD) is experts
    with pytest.raises(NotImplementedError, match="Experts must define __call__"):
        Experts()(x_TD, make_routing(37, 5, 2), weights)


@pytest.mark.parametrize("tokens", [pytest.param(T, id=f"T={T}") for T in (0, 1, 2, 16, 17)])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")])
def test_the_packages_own_say_what_runs_on_a_cpu(tokens: int, dtype: torch.dtype) -> None:
    """Only the number of tokens, the device and the dtype matter: the input may have no columns."""
    weights, x_T0 = make_weights(5, 9, 7, dtype), torch.empty(tokens, 0, dtype=dtype)
    assert Loop().implementation(x_T0, weights) == {"experts": "loop"}
    alone = {"experts": "grouped:one_token"} if tokens == 1 and dtype == torch.float32 else None
    assert Grouped().implementation(x_T0, weights) == (alone or {"experts": "grouped", "segment_mm": "loop"})
    assert not Loop().reads_dispatch(x_T0)
    assert Grouped().reads_dispatch(x_T0) == (not 1 <= tokens <= 16 or dtype != torch.float32)


@pytest.mark.parametrize("tokens", [pytest.param(T, id=f"T={T}") for T in (1, 16)])
def test_a_compiled_pass_sorts_few_tokens_as_many(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the products of sorted slots in its graph, and says so when it is asked about beforehand."""
    monkeypatch.setattr(extension, "sorts", lambda device, n: True)
    monkeypatch.setattr(extension, "computes", lambda device: True)
    weights, x_TD, nodes = make_weights(5, 9, 7), make_x(tokens, 9), []
    with asked_of("compile"):
        assert Grouped().reads_dispatch(x_TD)
        found = Grouped().implementation(x_TD, weights)
    with asked_of("eager"):
        assert not Grouped().reads_dispatch(x_TD) and "dispatch" not in Grouped().implementation(x_TD, weights)
    monkeypatch.undo()

    def noted(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(lambda *args: Grouped()(*args), fullgraph=True, backend=noted)(
        x_TD, make_routing(tokens, 5, 2), weights
    )
    assert found == {"experts": "grouped", "segment_mm": "loop", "dispatch": "cuda_ext:cpp", "combine": "cuda_ext:cpp"}
    assert sum("segment_mm" in node for node in nodes) == 2


@pytest.mark.parametrize("n_experts", [pytest.param(5, id="sorts"), pytest.param(7, id="sums only")])
def test_grouped_names_the_extension_where_it_sorts_and_sums(n_experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may sum the slots of more experts than it sorts."""
    monkeypatch.setattr(extension, "sorts", lambda device, n: n <= 5)
    monkeypatch.setattr(extension, "computes", lambda device: True)
    found = Grouped().implementation(torch.empty(37, 0), make_weights(n_experts, 9, 7))
    sorts = {"dispatch": "cuda_ext:cpp"} if n_experts == 5 else {}
    assert found == {"experts": "grouped", "segment_mm": "loop", "combine": "cuda_ext:cpp"} | sorts


EXTENSION = dict.fromkeys(("dispatch", "combine"), "extension")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "dtype", "expected"),
    [
        pytest.param(64, torch.bfloat16, {"experts": "grouped:few_tokens"}, id="few"),
        pytest.param(65, torch.bfloat16, {"experts": "grouped", "segment_mm": "grouped_mm", **EXTENSION}, id="bf16"),
        pytest.param(65, torch.float16, {"experts": "grouped", "segment_mm": "triton", **EXTENSION}, id="fp16"),
    ],
)
def test_grouped_says_what_runs_on_cuda(
    tokens: int, dtype: torch.dtype, expected: dict[str, str], device: torch.device
) -> None:
    """Few tokens are not sorted; more are sorted and summed by the extension, where it is loaded."""
    extension.load()
    expected = {op: extension.label(device) if name == "extension" else name for op, name in expected.items()}
    weights, x_T0 = make_weights(5, 16, 8, dtype, device), torch.empty(tokens, 0, dtype=dtype, device=device)
    assert Grouped().implementation(x_T0, weights) == expected
    assert Grouped().reads_dispatch(x_T0) == (tokens > 64)


def scaled(x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale, by: float, plus: int = 0) -> Tensor:
    return x_TD * by + plus + (100 if scale == "input" else 0)


def test_a_function_gets_its_keys_and_declares_nothing() -> None:
    """Keys that are given, the function's own defaults for the rest, and `scale` at each call."""
    x_TD, routing, weights = make_x(3, 4), make_routing(3, 5, 2), make_weights(5, 4, 7)
    experts = FunctionExperts(scaled, by=2.0)
    assert torch.equal(experts(x_TD, routing, weights), x_TD * 2)
    assert torch.equal(experts(x_TD, routing, weights, scale="input"), x_TD * 2 + 100)
    assert torch.equal(FunctionExperts(scaled, by=2.0, plus=3)(x_TD, routing, weights), x_TD * 2 + 3)
    assert not experts.graph_safe and not experts.reads_dispatch(x_TD)
    assert experts.implementation(x_TD, weights) == {"experts": "scaled"}


def no_keys(x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, scale: Scale) -> Tensor:
    return x_TD


def takes_all(*arguments: Any, **options: Any) -> Tensor:
    return arguments[0] * options["by"]


def test_a_function_may_take_whatever_it_is_given() -> None:
    """By place and by name."""
    x_TD, routing, weights = make_x(3, 4), make_routing(3, 5, 2), make_weights(5, 4, 7)
    assert torch.equal(FunctionExperts(takes_all, by=3.0)(x_TD, routing, weights), x_TD * 3)


def no_scale(x_TD: Tensor, routing: Routing, weights: ExpertWeights, block: int = 1) -> Tensor:
    return x_TD


@pytest.mark.parametrize(
    ("function", "keys", "message"),
    [
        pytest.param(scaled, {"by": 1, "puls": 2}, r"^experts\.puls: .*scaled takes by, plus\. .*plus\?$", id="typo"),
        pytest.param(scaled, {"by": 1, "scale": "input"}, r"^experts\.scale: unknown key; .*scaled takes", id="scale"),
        pytest.param(scaled, {"by": 1, "weights": 1}, r"^experts\.weights: unknown key; .*scaled", id="positional"),
        pytest.param(no_keys, {"block": 1}, r"^experts\.block: .*no_keys takes no keys", id="takes-none"),
        pytest.param(no_scale, {}, r"^experts\.scale: .*no_scale must take scale by name", id="no-scale"),
        pytest.param(scaled, {"plus": 1}, r"^experts\.by: missing; .*scaled requires it", id="missing"),
    ],
)  # fmt: skip
def test_a_key_that_a_function_does_not_take_is_a_mistake(
    function: Callable[..., Tensor], keys: dict[str, Any], message: str
) -> None:
    """One line that names the key and the function."""
    with pytest.raises(ValueError, match=message):
        FunctionExperts(function, **keys)


@pytest.mark.parametrize(
    ("kind", "has"),
    [
        pytest.param({"bias": True}, "biases", id="biases"),
        pytest.param({"activation": Clamped()}, "a clamped activation", id="clamped"),
        pytest.param({"bias": True, "activation": Clamped()}, "biases and a clamped activation", id="both"),
        pytest.param({"activation": "gelu_tanh"}, "gelu_tanh", id="gelu"),
    ],
)
def test_who_reads_matrices_only_is_given_no_other_experts(kind: dict[str, Any], has: str) -> None:
    """Nothing is computed without them in silence; plain experts pass."""
    require_plain(ExpertWeights(2, 3, 4))
    with pytest.raises(UnavailableError, match=f"SwiGLU experts only, and these have {has}; use experts=auto"):
        require_plain(ExpertWeights(2, 3, 4, **kind))
    function = FunctionExperts(no_keys)
    assert function.only_plain
    with pytest.raises(UnavailableError, match="SwiGLU experts only"):
        function(torch.zeros(1, 3), Routing(torch.zeros(1, 1).int(), torch.ones(1, 1)), ExpertWeights(2, 3, 4, **kind))
