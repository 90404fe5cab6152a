"""models/layers.py: the small layers against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.models.layers import (
    Add,
    AddRMSNorm,
    Embedding,
    GatedMLP,
    Linear,
    RMSNorm,
    add_norm,
    place_together,
    project_together,
)
from moe_lab.models.parameters import initialize


def filled(module: nn.Module) -> nn.Module:
    initialize(module, seed=5)
    return module


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize(
    ("make", "x"),
    [
        pytest.param(lambda: Linear(6, 5), random(3, 6), id="linear"),
        pytest.param(lambda: RMSNorm(6, 1e-6), random(3, 6), id="rms_norm"),
        pytest.param(lambda: AddRMSNorm(6, 1e-6, "torch"), random(3, 6), id="add_rms_norm"),
        pytest.param(lambda: GatedMLP(6, 4), random(3, 6), id="swiglu"),
    ],
)
@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=str(dtype)) for dtype in (torch.float32, torch.bfloat16)])
def test_a_layer_computes_in_the_dtype_of_its_input(
    make: Callable[[], nn.Module], x: Tensor, dtype: torch.dtype
) -> None:
    """bf16 weights fed fp32 give fp32: the same modules are the fp32 reference of a bf16 run."""
    module = filled(make().bfloat16())
    y = module(x.to(dtype))
    assert (y[0] if isinstance(y, tuple) else y).dtype == dtype


def test_linear_is_x_times_w_transposed() -> None:
    """No bias."""
    linear, x = filled(Linear(7, 3)), random(2, 5, 7)
    torch.testing.assert_close(linear(x).double(), x.double() @ linear.weight.double().T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [pytest.param(False, id="plain"), pytest.param(True, id="biases")])
def test_layers_that_lie_together_are_one_product(bias: bool) -> None:
    """Each gives what it gives alone, as views of one tensor; apart they are products of their own."""
    layers, x = [Linear(7, n, bias=bias) for n in (6, 1, 3)], random(2, 5, 7)
    place_together(*layers)
    for seed, layer in enumerate(layers):
        initialize(layer, seed)
    together = project_together(x, *layers)
    assert len({y.untyped_storage().data_ptr() for y in together}) == 1
    for y, layer in zip(together, layers, strict=True):
        torch.testing.assert_close(y, layer(x), rtol=1e-6, atol=1e-6)
    layers[1].weight = nn.Parameter(layers[1].weight.clone(), requires_grad=False)
    apart = project_together(x, *layers)
    assert len({y.untyped_storage().data_ptr() for y in apart}) == 3
    for y, layer in zip(apart, layers, strict=True):
        assert torch.equal(y, layer(x))


def replace(layer: Linear) -> None:
    layer.weight = nn.Parameter(-layer.weight, requires_grad=False)


def move(layer: Linear) -> None:
    layer.bias.data = -layer.bias.data


def shorten(layer: Linear) -> None:
    for part in layer.parameters():
        part.data = part.data[:2]


@pytest.mark.parametrize("change", [pytest.param(f, id=f.__name__) for f in (replace, move, shorten)])
@pytest.mark.parametrize("index", [pytest.param(i, id=f"layer {i}") for i in range(3)])
def test_parameters_that_change_between_two_passes_are_seen(change: Callable[[Linear], None], index: int) -> None:
    """Also where a shorter one begins at the same address."""
    layers, x = [Linear(7, n, bias=True) for n in (6, 5, 3)], random(2, 7)
    place_together(*layers)
    for seed, layer in enumerate(layers):
        initialize(layer, seed)
    before = layers[index](x)
    project_together(x, *layers)
    change(layers[index])
    after = project_together(x, *layers)
    assert after[index].shape != before.shape or not torch.allclose(after[index], before)
    for y, layer in zip(after, layers, strict=True):
        torch.testing.assert_close(y, layer(x), rtol=1e-6, atol=1e-6)


def test_layers_in_another_order_are_not_taken_for_one_product() -> None:
    layers, x = [Linear(7, 3) for _ in range(3)], random(2, 7)
    place_together(*layers)
    for seed, layer in enumerate(layers):
        initialize(layer, seed)
    for y, layer in zip(project_together(x, *layers[::-1]), layers[::-1], strict=True):
        assert torch.equal(y, layer(x))


def test_embedding_gives_rows_and_in_the_reference_fp32_rows() -> None:
    """The reference starts in fp32, and every later layer follows its input."""
    embedding, ids = filled(Embedding(11, 4).bfloat16()), torch.tensor([[0, 10], [3, 3]])
    rows = embedding(ids)
    assert torch.equal(rows, embedding.weight[ids]) and rows.dtype == torch.bfloat16
    embedding.use_reference()
    assert torch.equal(embedding(ids), rows.float()) and embedding(ids).dtype == torch.float32


@pytest.mark.parametrize("eps", [pytest.param(1e-6, id="small_eps"), pytest.param(0.5, id="large_eps")])
@pytest.mark.parametrize("width", [pytest.param(width, id=f"d{width}") for width in (1, 33)])
def test_rms_norm_is_its_formula(width: int, eps: float) -> None:
    """eps stands under the root."""
    norm, x = filled(RMSNorm(width, eps)), random(4, width)
    torch.testing.assert_close(norm(x).double(), rms_norm(x.double(), norm.weight.double(), eps), rtol=1e-5, atol=1e-6)


def test_add_rms_norm_returns_the_norm_and_the_sum() -> None:
    """The sum is the residual of the next block."""
    norm, x, residual = filled(AddRMSNorm(33, 1e-6, "torch")), random(2, 3, 33), random(2, 3, 33).flip(0)
    normed, total = norm(x, residual)
    assert torch.equal(total, x + residual)
    want = rms_norm(total.double(), norm.weight.double(), 1e-6)
    torch.testing.assert_close(normed.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=str(dtype)) for dtype in (torch.float32, torch.bfloat16)])
def test_add_rms_norm_without_a_residual_is_that_of_zero(dtype: torch.dtype) -> None:
    """The first block has nothing to add to."""
    norm, x = filled(AddRMSNorm(33, 1e-6, "torch").to(dtype)), random(4, 33).to(dtype)
    normed, total = norm(x)
    assert torch.equal(total, x)
    ulp = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(normed, norm(x, torch.zeros_like(x))[0], rtol=ulp, atol=ulp)


@pytest.mark.parametrize(
    ("asked", "runs", "expected"),
    [
        pytest.param("auto", "triton", True, id="auto"),
        pytest.param("auto", "torch", False, id="reference"),
        pytest.param("triton", "triton", False, id="by name"),
    ],
)
def test_a_norm_that_was_asked_for_by_name_is_never_fused(asked: str, runs: str, expected: bool) -> None:
    """Another kernel would do it."""
    norm = AddRMSNorm(33, 1e-6, asked)
    norm.implementation = runs
    assert norm.may_be_fused is expected


def test_swiglu_takes_the_gate_first() -> None:
    """down(silu(gate) * up): the halves are not alike."""
    mlp, x = filled(GatedMLP(7, 5)), random(3, 7)
    gate, up = mlp.gate_up.weight.double().split(5)
    want = (F.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ mlp.down.weight.double().T
    torch.testing.assert_close(mlp(x).double(), want, rtol=1e-5, atol=1e-6)


def test_another_activation_is_that_of_the_gate() -> None:
    """down(gelu(gate) * up)."""
    mlp, x = filled(GatedMLP(7, 5, "gelu_tanh")), random(3, 7)
    gate, up = mlp.gate_up.weight.double().split(5)
    want = (F.gelu(x.double() @ gate.T, approximate="tanh") * (x.double() @ up.T)) @ mlp.down.weight.double().T
    torch.testing.assert_close(mlp(x).double(), want, rtol=1e-5, atol=1e-6)


def test_a_sum_without_a_norm_is_given_twice() -> None:
    """As a norm and what it is of; without a residual the input itself."""
    x, residual = random(3, 6), random(3, 6).flip(0)
    one, other = Add()(x, residual)
    assert torch.equal(one, x + residual) and torch.equal(other, x + residual)
    assert all(each is x for each in Add()(x))


def test_the_weight_of_a_wide_norm_is_not_rounded() -> None:
    """fp32 in a bf16 model, and computed in fp32: alone, and behind a residual."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        norms = [RMSNorm(6, 1e-6, wide=True), add_norm("wide", 6, 1e-6, "torch")]
    finally:
        torch.set_default_dtype(before)
    x = random(3, 6).bfloat16()
    for norm in norms:
        assert norm.weight.dtype == torch.float32
        norm.weight.fill_(1 + 2**-9)
    alone, (behind, _) = norms[0](x), norms[1](x, torch.zeros_like(x))
    want = rms_norm(x.double(), norms[0].weight.double(), 1e-6).bfloat16()
    assert torch.equal(alone, want) and torch.equal(behind, want)
    narrow = rms_norm(x.double(), torch.ones(6).double(), 1e-6).bfloat16()
    assert not torch.equal(want, narrow)
