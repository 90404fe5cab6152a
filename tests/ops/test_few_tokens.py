"""few_tokens_mlp: the formula in float64, what must not be read, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lab.ops.few_tokens import few_tokens_mlp, most_tokens
from tests.ops.cases import DEVICE, DTYPES
from tests.ops.compiling import assert_compiles

CPU = torch.device("cpu")

SIZES = pytest.mark.parametrize(
    ("T", "E", "K", "D", "F"),
    [
        pytest.param(0, 5, 2, 8, 12, id="T=0"),
        pytest.param(1, 7, 2, 16, 11, id="T=1"),
        pytest.param(3, 5, 5, 33, 17, id="T=3, k=E"),
        pytest.param(3, 1, 1, 8, 8, id="E=1"),
        pytest.param(5, 6, 2, 1, 1, id="D=F=1"),
        pytest.param(2, 13, 9, 10, 6, id="many slots"),
        pytest.param(16, 3, 1, 70, 66, id="T=16, top 1, wide"),
        pytest.param(16, 5, 2, 20, 33, id="T=16, top 2"),
    ],
)
SCALES = pytest.mark.parametrize("scales_input", [pytest.param(False, id="output"), pytest.param(True, id="input")])
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def operands(
    T: int, E: int, K: int, D: int, F: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Operands:
    """x, ids (K different experts per token), weights and the two matrices of each expert, all of order one."""
    generator = torch.Generator().manual_seed(T + 31 * E + K)
    x_TD = torch.randn(T, D, generator=generator)
    ids_TK = torch.rand(T, E, generator=generator).argsort(-1)[:, :K].to(torch.int32)
    weights_TK = torch.rand(T, K, generator=generator) + 0.1
    w_gate_up_E2FD = torch.randn(E, 2 * F, D, generator=generator) / D**0.5
    w_down_EDF = torch.randn(E, D, F, generator=generator) / F**0.5
    return (
        x_TD.to(device, dtype),
        ids_TK.to(device),
        weights_TK.to(device),
        w_gate_up_E2FD.to(device, dtype),
        w_down_EDF.to(device, dtype),
    )


def rederived(inputs: Operands, scales_input: bool, biases: Any = None, activation: Any = None) -> Tensor:
    """One slot at a time, in float64."""
    x_TD, ids_TK, weights_TK, w_gate_up_E2FD, w_down_EDF = (part.cpu() for part in inputs)
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    for t, ids in enumerate(ids_TK.tolist()):
        for k, expert in enumerate(ids):
            if expert < 0:
                continue
            weight = weights_TK[t, k].double()
            x_D = x_TD[t].double() * (weight if scales_input else 1.0)
            up_bias_2F, down_bias_D = (0.0, 0.0) if biases is None else (bias[expert].cpu().double() for bias in biases)
            gate_F, up_F = (w_gate_up_E2FD[expert].double() @ x_D + up_bias_2F).tensor_split(2)
            if activation == "gelu_tanh":
                h_F = torch.nn.functional.gelu(gate_F, approximate="tanh") * up_F
            else:
                alpha, limit = activation or (1.0, math.inf)
                gate_F, up_F = gate_F.clamp(max=limit), up_F.clamp(-limit, limit) + (activation is not None)
                h_F = gate_F / (1 + (-alpha * gate_F).exp()) * up_F
            o_D = w_down_EDF[expert].double() @ h_F + down_bias_D
            y_TD[t] += o_D if scales_input else weight * o_D
    return y_TD


def assert_is_the_sum(y_TD: Tensor, inputs: Operands, scales_input: bool, *kind: Any) -> None:
    """The float64 sum, up to the rounding of x's dtype in each of the three products and of each slot."""
    dtype = inputs[0].dtype
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert y_TD.dtype == dtype and y_TD.shape == inputs[0].shape and y_TD.is_contiguous()
    torch.testing.assert_close(
        y_TD.double().cpu(), rederived(inputs, scales_input, *kind), rtol=tolerance, atol=tolerance
    )


@pytest.mark.thinned(1, empty=("T=0",))
@SIZES
@SCALES
@DTYPES
def test_it_is_the_weighted_sum_of_each_tokens_experts(
    T: int, E: int, K: int, D: int, F: int, scales_input: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """For widths that are multiples of no block, any number of experts, all of them chosen or one."""
    inputs = operands(T, E, K, D, F, dtype, device)
    assert_is_the_sum(few_tokens_mlp(*inputs, scales_input), inputs, scales_input)


@pytest.mark.thinned(2)
@SCALES
@DTYPES
@pytest.mark.parametrize(
    "activation",
    [
        pytest.param(None, id="swiglu"),
        pytest.param((1.702, 0.7), id="clamped"),
        pytest.param("gelu_tanh", id="gelu"),
    ],
)
@pytest.mark.parametrize("bias_dtype", [pytest.param(None, id="no bias"), pytest.param(torch.float32, id="bias")])
def test_biases_and_activations(
    activation: Any, bias_dtype: torch.dtype | None, scales_input: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Biases are of fp32 beside matrices of any dtype."""
    E, D, F = 5, 33, 40
    inputs, biases = operands(7, E, 3, D, F, dtype, device), None
    inputs[1][2, 1] = -1
    if bias_dtype is not None:
        generator = torch.Generator().manual_seed(5)
        biases = [torch.randn(E, n, generator=generator).to(device, bias_dtype) for n in (2 * F, D)]
    y_TD = few_tokens_mlp(*inputs, scales_input, *(biases or (None, None)), activation)
    assert_is_the_sum(y_TD, inputs, scales_input, biases, activation)


@SCALES
@pytest.mark.parametrize("T", [17, pytest.param(33, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu)],
)
def test_more_tokens_are_few_in_16_bits(T: int, scales_input: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Of 32 and 64 rows of a block, all of them used or not."""
    inputs = operands(T, 6, 3, 20, 33, dtype, device)
    assert_is_the_sum(few_tokens_mlp(*inputs, scales_input), inputs, scales_input)


@pytest.mark.slow
@SCALES
@settings(max_examples=15, deadline=None, database=None)
@given(data=st.data(), T=st.integers(0, 16), E=st.integers(1, 9), K=st.integers(1, 4))
def test_unused_slots_may_stand_anywhere(scales_input: bool, data: st.DataObject, T: int, E: int, K: int) -> None:
    """Any slots of any tokens, all of a token's, all there are; what weight stands beside them is not read."""
    K = min(K, E)
    x_TD, ids_TK, weights_TK, *matrices = operands(T, E, K, 5, 3, device=DEVICE)
    used = data.draw(st.lists(st.booleans(), min_size=T * K, max_size=T * K))
    unused_TK = ~torch.tensor(used, dtype=torch.bool, device=DEVICE).view(T, K)
    ids_TK = ids_TK.masked_fill(unused_TK, -1)
    inputs = (x_TD, ids_TK, weights_TK.masked_fill(unused_TK, math.nan), *matrices)
    assert_is_the_sum(few_tokens_mlp(*inputs, scales_input), inputs, scales_input)


@pytest.mark.thinned(1, empty=("none at all",))
@SCALES
@DTYPES
@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([[2, 0], [2, 1], [2, 6], [0, 2], [6, 2]], id="one expert in all"),
        pytest.param([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]], id="two in all"),
        pytest.param([[0, 1], [2, 3], [4, 5], [6, -1], [-1, -1]], id="none twice"),
        pytest.param([[-1, 3], [-1, -1], [3, -1], [-1, -1], [-1, 3]], id="first slots unused"),
        pytest.param([[-1, -1]] * 5, id="none at all"),
    ],
)
def test_experts_may_be_shared_by_any_tokens(
    scales_input: bool, dtype: torch.dtype, ids: list[list[int]], device: torch.device
) -> None:
    """One program does the work of all slots with its expert, wherever they stand."""
    x_TD, _, *rest = operands(5, 7, 2, 19, 37, dtype, device)
    inputs = (x_TD, torch.tensor(ids, dtype=torch.int32, device=device), *rest)
    assert_is_the_sum(few_tokens_mlp(*inputs, scales_input), inputs, scales_input)


@SCALES
def test_a_token_without_an_expert_is_zero(scales_input: bool, device: torch.device) -> None:
    """Exactly, whatever its hidden state, and the others are as they were."""
    x_TD, ids_TK, *rest = operands(5, 7, 3, 19, 37, device=device)
    ids_TK[[1, 4]] = -1
    clean_TD = few_tokens_mlp(x_TD, ids_TK, *rest, scales_input)
    x_TD[1], x_TD[4] = math.nan, math.inf
    y_TD = few_tokens_mlp(x_TD, ids_TK, *rest, scales_input)
    assert not y_TD[[1, 4]].any() and bool(y_TD[[0, 2, 3]].all())
    assert torch.equal(y_TD, clean_TD)


@SCALES
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_tokens_do_not_touch_each_other(scales_input: bool, device: torch.device) -> None:
    """NaN and infinities of a token, whose experts others share, leave the others bitwise as they were."""
    x_TD, *rest = operands(5, 3, 2, 19, 37, device=device)
    clean_TD = few_tokens_mlp(x_TD, *rest, scales_input)
    x_TD[1, 3], x_TD[3, 18] = math.nan, math.inf
    y_TD = few_tokens_mlp(x_TD, *rest, scales_input)
    assert torch.equal(y_TD[[0, 2, 4]], clean_TD[[0, 2, 4]])
    assert bool(y_TD[1].isnan().all()) and not y_TD[3].isfinite().any()


@SCALES
def test_the_matrices_of_other_experts_are_not_used(scales_input: bool, device: torch.device) -> None:
    """NaN in them never reaches a result; nor does NaN of an expert the tokens that have not chosen it."""
    x_TD, _, weights_TK, w_gate_up_E2FD, w_down_EDF = operands(3, 7, 2, 19, 37, device=device)
    ids_TK = torch.tensor([[1, 5], [5, -1], [6, 3]], dtype=torch.int32, device=device)
    arguments = (x_TD, ids_TK, weights_TK, w_gate_up_E2FD, w_down_EDF)
    clean_TD = few_tokens_mlp(*arguments, scales_input)
    w_gate_up_E2FD[[0, 2, 4]] = math.nan
    w_down_EDF[[0, 2, 4]] = math.nan
    assert torch.equal(few_tokens_mlp(*arguments, scales_input), clean_TD)
    w_gate_up_E2FD[3], w_down_EDF[6] = math.nan, math.nan
    y_TD = few_tokens_mlp(*arguments, scales_input)
    assert torch.equal(y_TD[:2], clean_TD[:2]) and bool(y_TD[2].isnan().all())


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
    ],
)
def test_products_are_accumulated_in_fp32(dtype: torch.dtype, device: torch.device) -> None:
    """Sums of 2500 ones are 2500, which an fp16 or bf16 accumulator cannot reach: of D first, of F then."""
    one_11 = torch.ones(1, 1, device=device)
    id_11 = torch.zeros(1, 1, dtype=torch.int32, device=device)
    silu_8 = 8 / (1 + math.exp(-8))
    for D, F in ((2500, 1), (1, 2500)):
        w_gate_up_12FD = torch.ones(1, 2 * F, D, dtype=dtype, device=device)
        w_gate_up_12FD[:, :F] = 0
        w_gate_up_12FD[:, :F, 0] = 8
        x_1D = torch.ones(1, D, dtype=dtype, device=device)
        w_down_1DF = torch.full((1, D, F), 0.125, dtype=dtype, device=device)
        y_1D = few_tokens_mlp(x_1D, id_11, one_11, w_gate_up_12FD, w_down_1DF, False)
        expected_1D = torch.full((1, D), silu_8 * 0.125 * 2500, dtype=torch.float64)
        torch.testing.assert_close(y_1D.double().cpu(), expected_1D, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
    ],
)
def test_slots_are_summed_in_fp32(dtype: torch.dtype, device: torch.device) -> None:
    """Two small slots, each lost beside the large one in the dtype, are not lost together."""
    small = 0.4 * torch.finfo(dtype).eps
    w_gate_up_321 = torch.full((3, 2, 1), 8.0, dtype=dtype, device=device)
    w_down_311 = torch.ones(3, 1, 1, dtype=dtype, device=device)
    x_11 = torch.ones(1, 1, dtype=dtype, device=device)

    def of(ids: list[int], weights: list[float]) -> float:
        ids_1K = torch.tensor([ids], dtype=torch.int32, device=device)
        weights_1K = torch.tensor([weights], device=device)
        return float(few_tokens_mlp(x_11, ids_1K, weights_1K, w_gate_up_321, w_down_311, False))

    alone = of([0], [1.0])
    if dtype != torch.float32:  # in which the sum of the three is rounded once, to the nearest
        expected = float(torch.tensor(alone * (1 + 2 * small), dtype=torch.float64).to(dtype))
        assert of([0, 1, 2], [1.0, small, small]) == expected > alone
    assert of([0, 1, 2], [1.0, 0.5, 0.25]) == pytest.approx(1.75 * alone, rel=2 * torch.finfo(dtype).eps)


@pytest.mark.gpu
def test_the_sum_waits_for_all_slots() -> None:
    """The last program of some columns adds them up: each of many calls gives the bits of its first.

    Two inputs take turns, so that what a call before has left is not what this one must read.
    """
    x_TD, ids_TK, *others = operands(64, 64, 8, 2048, 256, torch.bfloat16, torch.device("cuda"))
    inputs = [(x_TD, ids_TK, *others), (2 * x_TD, ids_TK.flip(0), *others)]
    first = [few_tokens_mlp(*each, False).clone() for each in inputs]
    assert not torch.equal(*first)
    calls = [few_tokens_mlp(*inputs[i % 2], False) for i in range(200)]
    assert all(torch.equal(y_TD, first[i % 2]) for i, y_TD in enumerate(calls))
    assert not few_tokens_mlp(x_TD, torch.full_like(ids_TK, -1), *others, False).any()


@SCALES
def test_strides_of_the_inputs_change_nothing(scales_input: bool, device: torch.device) -> None:
    """Tokens, ids and weights that are views give what their copies give."""
    x_TD, ids_TK, weights_TK, *matrices = operands(5, 7, 3, 19, 37, device=device)
    expected_TD = few_tokens_mlp(x_TD, ids_TK, weights_TK, *matrices, scales_input)
    wide_TD = torch.full((10, 40), math.nan, device=device)
    wide_TD[::2, 3:22] = x_TD
    ids_KT, weights_KT = ids_TK.t().contiguous(), weights_TK.t().contiguous()
    for x in (wide_TD[::2, 3:22], x_TD.t().contiguous().t()):
        y_TD = few_tokens_mlp(x, ids_KT.t(), weights_KT.t(), *matrices, scales_input)
        assert y_TD.is_contiguous() and torch.equal(y_TD, expected_TD)


@DTYPES
def test_the_operands_keep_their_values(dtype: torch.dtype, device: torch.device) -> None:
    """Nothing is written into them, and the result shares no memory with them."""
    inputs = operands(3, 7, 2, 19, 37, dtype, device)
    before = [part.clone() for part in inputs]
    y_TD = few_tokens_mlp(*inputs, False)
    torch.testing.assert_close(list(inputs), before, rtol=0, atol=0)
    assert y_TD.untyped_storage().data_ptr() not in {part.untyped_storage().data_ptr() for part in inputs}


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16")])
def test_more_tokens_than_are_few_are_refused(dtype: torch.dtype) -> None:
    """They are never asked for: our own mistake, an assertion."""
    with pytest.raises(AssertionError):
        few_tokens_mlp(*operands(most_tokens(dtype) + 1, 5, 2, 8, 8, dtype), False)


@pytest.mark.parametrize("which", [pytest.param(3, id="gate and up"), pytest.param(4, id="down")])
def test_matrices_of_another_dtype_are_a_value_error(which: int, device: torch.device) -> None:
    """Casting would copy them; a fake call refuses the same."""
    inputs = list(operands(3, 5, 2, 8, 8, device=device))
    inputs[which] = inputs[which].half()
    with pytest.raises(ValueError, match="few_tokens_mlp"):
        few_tokens_mlp(*inputs, False)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="few_tokens_mlp"):
        few_tokens_mlp(*(torch.empty_like(part) for part in inputs), False)


@SCALES
@pytest.mark.parametrize("T", [pytest.param(0, id="T=0"), pytest.param(3, id="T=3")])
def test_the_op_passes_opcheck(scales_input: bool, T: int, device: torch.device) -> None:
    """Schema, fake tensors and tracing agree with what the op does."""
    arguments = (*operands(T, 5, 2, 7, 6, device=device), scales_input)
    results = torch.library.opcheck(torch.ops.moe_lab.few_tokens_mlp.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@DTYPES
def test_fake_tensors_have_the_real_shape(dtype: torch.dtype) -> None:
    """Under FakeTensorMode the result is [T, D] of x's dtype and contiguous, whatever x's strides."""
    with FakeTensorMode():
        x_TD, ids_TK = torch.empty(9, 3, dtype=dtype).t(), torch.empty(3, 2, dtype=torch.int32)
        matrices = torch.empty(5, 14, 9, dtype=dtype), torch.empty(5, 9, 7, dtype=dtype)
        y_TD = few_tokens_mlp(x_TD, ids_TK, torch.empty(3, 2), *matrices, False)
    assert y_TD.shape == (3, 9) and y_TD.dtype == dtype and y_TD.is_contiguous()


def launches() -> None:
    """Sizes of 1, which Triton takes for constants of the kernel, and larger ones."""
    few_tokens_mlp(*operands(16, 9, 3, 40, 24, torch.bfloat16), True)
    few_tokens_mlp(*operands(1, 2, 1, 1, 1, torch.bfloat16), True)
    for F, D in ((24, 40), (1, 1)):  # biases of fp32, and the clamped activation
        biases = torch.zeros(9, 2 * F), torch.zeros(9, D)
        few_tokens_mlp(*operands(16, 9, 3, D, F, torch.bfloat16), False, *biases, (1.702, 7.0))
    few_tokens_mlp(*operands(16, 9, 3, 40, 24, torch.bfloat16), False, None, None, "gelu_tanh")


def more_launches() -> None:
    """The other dtypes, and a size of 1 beside larger ones."""
    for dtype in (torch.float16, torch.float32):
        few_tokens_mlp(*operands(16, 9, 3, 40, 24, dtype), False)
        few_tokens_mlp(*operands(1, 2, 1, 1, 1, dtype), True)
    few_tokens_mlp(*operands(2, 5, 1, 3, 1), False)
    few_tokens_mlp(*operands(1, 5, 2, 1, 3), False)


@pytest.mark.slow
@pytest.mark.parametrize("launches", [pytest.param(launches, id="bf16"), pytest.param(more_launches, id="more")])
def test_the_kernels_compile_for_a_gpu(launches: Callable[[], None], tmp_path: Path) -> None:
    """Which their interpreter does not ask."""
    assert_compiles(launches, tmp_path)
