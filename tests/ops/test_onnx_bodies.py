"""Every op that has a body in ONNX (ops/onnx_function.py) computes there what it computes in torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import onnx
import onnxruntime
import onnxscript
import pytest
import torch
from torch import Tensor

import moe_lab.experts.exported
import moe_lab.ops.add_rms_norm
import moe_lab.ops.capacity
import moe_lab.ops.delta_rule
import moe_lab.ops.rotate
import moe_lab.ops.sinkhorn  # noqa: F401
from moe_lab.ops.library import OPS

OPSETS = [pytest.param(18, id="opset 18"), pytest.param(23, id="opset 23")]
TYPES = {torch.float32: 1, torch.int32: 6, torch.int64: 7, torch.float16: 10}


@cache
def session(name: str, opset: int, types: tuple[torch.dtype, ...], attributes: tuple[tuple[str, Any], ...]) -> Any:
    """A graph of that one node, with its body."""
    module = OPS[name].onnx
    assert module is not None
    body = importlib.import_module(module).body(getattr(onnxscript, f"opset{opset}")).to_function_proto()
    assert (body.domain, body.name) == ("moe_lab", name)
    inputs = [
        onnx.helper.make_tensor_value_info(key, TYPES[dtype], None)
        for key, dtype in zip(body.input, types, strict=True)
    ]
    outputs = [onnx.ValueInfoProto(name=key) for key in body.output]
    node = onnx.helper.make_node(name, body.input, body.output, domain="moe_lab", **dict(attributes))
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("moe_lab", 1)]
    graph = onnx.helper.make_graph([node], "one", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=imports, functions=[body], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(name: str, opset: int, tensors: Sequence[Tensor], **attributes: Any) -> list[Tensor]:
    """What ONNX Runtime gives."""
    one = session(name, opset, tuple(tensor.dtype for tensor in tensors), tuple(attributes.items()))
    feeds = {key.name: tensor.numpy() for key, tensor in zip(one.get_inputs(), tensors, strict=True)}
    return [torch.from_numpy(array) for array in one.run(None, feeds)]


def reference(name: str, tensors: Sequence[Tensor], **attributes: Any) -> list[Tensor]:
    """What the op gives in torch."""
    extra = ["torch"] if "implementation" in {argument.name for argument in OPS[name].schema.arguments} else []
    found = getattr(torch.ops.moe_lab, name)(*tensors, *attributes.values(), *extra)
    return [found] if isinstance(found, Tensor) else list(found)


def compare(name: str, opset: int, tensors: Sequence[Tensor], **attributes: Any) -> None:
    """Integers are equal, numbers as near as another order of sums brings them; types and shapes are the same."""
    given = {key: int(value) if isinstance(value, bool) else value for key, value in attributes.items()}
    ran, expected = run(name, opset, tensors, **given), reference(name, tensors, **attributes)
    for one, other in zip(ran, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        exact = not one.is_floating_point()
        half = one.dtype == torch.float16
        rtol, atol = (0, 0) if exact else (2e-3, 2e-3) if half else (1e-5, 2e-6)
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_ids(T: int, E: int, K: int, unused: float = 0.3) -> Tensor:
    """[T, K] int32, no expert twice in a row, some slots unused."""
    ids_TK = randn(T, E).argsort(-1)[:, :K].to(torch.int32)
    return torch.where(torch.rand(T, K, generator=torch.Generator().manual_seed(1)) < unused, -1, ids_TK)


def test_every_body_is_tested_here() -> None:
    """An op that gets one must get a test."""
    assert {name for name, op in OPS.items() if op.onnx is not None} == {
        "add_rms_norm",
        "rotate",
        "sinkhorn_scores",
        "dispatch",
        "fill_up",
        "experts_mlp",
        "experts_mlp_biased",
        "gated_delta_rule",
    }


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (0, 1, 37, 199)])
def test_add_rms_norm(T: int, opset: int) -> None:
    """Sum and norm."""
    compare("add_rms_norm", opset, [randn(T, 33), randn(T, 33, seed=1), randn(33, seed=2)], eps=1e-5)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("T", [pytest.param(T, id=f"S={T}") for T in (0, 1, 37)])
def test_rotate(T: int, opset: int) -> None:
    """[B, H, S, d] with tables [S, d]; of half precision computed in fp32."""
    compare("rotate", opset, [randn(2, 3, T, 8), randn(T, 8, seed=1), randn(T, 8, seed=2)])
    compare("rotate", opset, [randn(2, 3, T, 8).half(), randn(T, 8, seed=1), randn(T, 8, seed=2)])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("iters", [pytest.param(0, id="no iteration"), pytest.param(7, id="7 iterations")])
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (1, 2, 37, 199)])
def test_sinkhorn_scores(T: int, iters: int, opset: int) -> None:
    """Of one token the logits; large logits do not overflow; a tolerance ends the iterations."""
    compare("sinkhorn_scores", opset, [randn(T, 5)], iters=iters, temperature=0.7, tolerance=0.0)
    compare("sinkhorn_scores", opset, [100 * randn(T, 5)], iters=iters, temperature=1.0, tolerance=0.0)
    compare("sinkhorn_scores", opset, [randn(T, 5)], iters=iters, temperature=1.0, tolerance=0.1)


@pytest.mark.thinned(2, empty=("T=0",))
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (0, 1, 37, 199)])
@pytest.mark.parametrize("K", [pytest.param(1, id="K=1"), pytest.param(3, id="K=3"), pytest.param(5, id="K=E")])
def test_dispatch(T: int, K: int, opset: int) -> None:
    """Slots in stable order, unused ones last, experts without a slot too."""
    compare("dispatch", opset, [some_ids(T, 5, K)], n_experts=5)
    compare("dispatch", opset, [some_ids(T, 5, K, unused=1.0)], n_experts=5)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("room", [pytest.param(n, id=f"room {n}") for n in (1, 8, 40)])
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (1, 37)])
def test_fill_up(T: int, room: int, opset: int) -> None:
    """Ties among scores, masked experts, more slots than room."""
    scores_TE = randn(T, 5).round()
    scores_TE[:, 2] = -torch.inf
    compare("fill_up", opset, [some_ids(T, 5, 3), scores_TE, torch.full((5,), room)])


@pytest.mark.thinned(2, empty=("T=0",))
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("scales_input", [pytest.param(False, id="output"), pytest.param(True, id="input")])
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (0, 1, 37, 199)])
def test_experts_mlp(T: int, scales_input: bool, opset: int) -> None:
    """Weights on the output or the input; slots that are unused, experts without a token."""
    E, K, D, F = 7, 3, 16, 12
    ids_TK = some_ids(T, E - 1, K)
    weights_TK = torch.rand(T, K, generator=torch.Generator().manual_seed(3)).masked_fill(ids_TK < 0, 0)
    matrices = [randn(E, 2 * F, D, seed=4) / 4, randn(E, D, F, seed=5) / 4]
    compare("experts_mlp", opset, [randn(T, D), ids_TK, weights_TK, *matrices], scales_input=scales_input)
    half = [matrix.half() for matrix in matrices]  # cast to the input's type
    compare("experts_mlp", opset, [randn(T, D), ids_TK, weights_TK, *half], scales_input=scales_input)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("scales_input", [pytest.param(False, id="output"), pytest.param(True, id="input")])
@pytest.mark.parametrize(
    ("alpha", "limit", "gelu"),
    [
        pytest.param(0, 0, False, id="swiglu"),
        pytest.param(1.7, 0.5, False, id="clamped"),
        pytest.param(0, 0, True, id="gelu"),
    ],
)
def test_experts_mlp_biased(alpha: float, limit: float, gelu: bool, scales_input: bool, opset: int) -> None:
    """As above, with biases of fp32."""
    T, E, K, D, F = 37, 7, 3, 16, 12
    ids_TK = some_ids(T, E - 1, K)
    weights_TK = torch.rand(T, K, generator=torch.Generator().manual_seed(3)).masked_fill(ids_TK < 0, 0)
    matrices = [randn(E, 2 * F, D, seed=4) / 4, randn(E, D, F, seed=5) / 4]
    biases = [randn(E, 2 * F, seed=6), randn(E, D, seed=7)]
    settings = {"scales_input": scales_input, "alpha": float(alpha), "limit": float(limit), "gelu": gelu}
    compare("experts_mlp_biased", opset, [randn(T, D), ids_TK, weights_TK, *matrices, *biases], **settings)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("S", [pytest.param(S, id=f"S={S}") for S in (0, 1, 37, 199)])
def test_gated_delta_rule(S: int, opset: int) -> None:
    """Token by token, of two sequences and three heads."""
    k = randn(2, 3, S, 5, seed=1)
    gates = [-randn(2, 3, S, seed=3).abs(), randn(2, 3, S, seed=4).sigmoid()]
    compare("gated_delta_rule", opset, [randn(2, 3, S, 5), k / k.norm(dim=3, keepdim=True), randn(2, 3, S, 7), *gates])


@pytest.mark.parametrize(
    ("name", "module"),
    [pytest.param(name, op.onnx, id=name) for name, op in sorted(OPS.items()) if op.onnx is not None],
)
def test_a_body_has_the_names_of_the_schema(name: str, module: str) -> None:
    """torch.onnx passes by place, a reader of the graph by name."""
    body: Callable[..., Any] = importlib.import_module(module).body
    proto = body(onnxscript.opset23).to_function_proto()
    kinds = {argument.name: argument.type.kind() for argument in OPS[name].schema.arguments}
    assert list(proto.input) == [key for key, kind in kinds.items() if kind == "TensorType"]
    assert list(proto.attribute) == [key for key, kind in kinds.items() if kind in ("IntType", "FloatType", "BoolType")]
    assert len(proto.output) == len(OPS[name].schema.returns)
