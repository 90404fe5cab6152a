"""gemv and norm_gemv: the product of a few rows in float64, odd sizes, and chains in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lab.models.layers import AddRMSNorm, Linear, joined_with, norm_and_project, place_together, project_together
from moe_lab.ops import add_rms_norm, extension
from moe_lab.ops import gemv as gemv_module
from moe_lab.ops.gemv import gemv, norm_gemv, takes
from tests.ops.cases import DEVICE, normal

HALVES = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")]
)
SIZES = pytest.mark.parametrize(
    ("T", "N", "K"),
    [
        pytest.param(1, 1, 8, id="1x8"),
        pytest.param(1, 37, 264, id="37x264"),
        pytest.param(1, 199, 1032, id="199x1032, two parts of a row"),
        pytest.param(1, 2500, 2048, id="2500x2048, some warps with a row more"),
        pytest.param(1, 5, 8192, id="5x8192"),
        pytest.param(2, 1, 8, id="2 rows, 1x8, most warps without columns"),
        pytest.param(3, 37, 264, id="3 rows, 37x264, a tile and a chunk in part"),
        pytest.param(8, 2500, 2048, id="8 rows, 2500x2048, some blocks with a tile more"),
        pytest.param(7, 199, 1032, id="7 rows, 199x1032"),
        pytest.param(8, 5, 8192, id="8 rows, 5x8192, as many elements as it takes"),
    ],
)


@pytest.fixture(autouse=True)
def loaded(device: torch.device) -> None:
    """On a GPU the kernel is the extension's."""
    if device.type == "cuda":
        extension.load()
        if not gemv_module.is_faster(device):
            pytest.skip("the kernel needs compute capability 9.0 and nvcc")


def settled(*tensors: Tensor) -> tuple[Tensor, ...]:
    """When they are there: a weight may not come from the kernel just before."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return tensors


def assert_is_the_product(y_TN: Tensor, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
    """Up to the rounding of the result, and of sums in fp32."""
    want = torch.nn.functional.linear(x_TK.double(), weight_NK.double(), None if bias_N is None else bias_N.double())
    assert y_TN.shape == want.shape and y_TN.dtype == x_TK.dtype and y_TN.is_contiguous()
    eps = torch.finfo(y_TN.dtype).eps
    torch.testing.assert_close(y_TN.double(), want, rtol=eps, atol=1e-6 * weight_NK.shape[1] ** 0.5 + eps)


@SIZES
@pytest.mark.parametrize("has_bias", [pytest.param(False, id="no bias"), pytest.param(True, id="bias")])
@HALVES
def test_it_is_the_product(T: int, N: int, K: int, has_bias: bool, dtype: torch.dtype) -> None:
    """Of any width, with and without a bias; the operands keep their values."""
    x, weight = normal(T, K, dtype=dtype), normal(N, K, dtype=dtype)
    bias = normal(N, dtype=dtype) if has_bias else None
    before = [None if part is None else part.clone() for part in (x, weight, bias)]
    settled()
    y = gemv(x, weight, bias)
    assert_is_the_product(y, x, weight, bias)
    torch.testing.assert_close([x, weight, bias], before, rtol=0, atol=0)


@SIZES
@pytest.mark.parametrize("has_residual", [pytest.param(False, id="x alone"), pytest.param(True, id="residual")])
@HALVES
def test_the_norm_is_add_rms_norm(T: int, N: int, K: int, has_residual: bool, dtype: torch.dtype) -> None:
    """The sum comes out to the last bit; the product is that of what add_rms_norm gives, up to a rounding of it."""
    x, weight, norm, bias = (normal(*shape, dtype=dtype) for shape in ((T, K), (N, K), (K,), (N,)))
    residual = 3 * normal(T, K, dtype=dtype) + 1 if has_residual else None
    settled()
    y, total = norm_gemv(x, residual, norm, 1e-5, weight, bias)
    normed, want_total = add_rms_norm.reference(x, torch.zeros_like(x) if residual is None else residual, norm, 1e-5)
    assert torch.equal(total, want_total)
    want = torch.nn.functional.linear(normed.double(), weight.double(), bias.double())
    # Of each element of the row a rounding may go the other way.
    spread = torch.finfo(dtype).eps * (normed.double().square() @ weight.double().square().T).sqrt()
    assert bool(((y - want).abs() <= 2 * spread + torch.finfo(dtype).eps * want.abs() + 1e-3).all())


@settings(max_examples=15, deadline=None, database=None)
@given(T=st.integers(1, 8), N=st.integers(1, 300), K=st.integers(1, 40))
def test_any_size(T: int, N: int, K: int) -> None:
    """Rows of which a warp reads a part."""
    x, weight = settled(normal(T, 8 * K, dtype=torch.float16), normal(N, 8 * K, dtype=torch.float16))
    assert_is_the_product(gemv(x, weight), x, weight)


def test_nan_and_infinity_stay_in_their_element(device: torch.device) -> None:
    """What a row of the weights has comes out in its element alone; what x has in all."""
    x, weight = normal(1, 40, dtype=torch.float16), normal(9, 40, dtype=torch.float16)
    weight[3, 7], weight[5, 0] = torch.nan, torch.inf
    settled()
    y_N = gemv(x, weight)[0]
    assert y_N[3].isnan() and y_N[5].isinf() and int(y_N.isfinite().sum()) == 7
    x[0, 2] = torch.nan
    assert gemv(*settled(x, weight)).isnan().all()


def test_a_row_of_a_larger_tensor_will_do() -> None:
    """As the last position of a pass is."""
    x, weight = settled(normal(3, 48, dtype=torch.float16), normal(7, 48, dtype=torch.float16))
    assert_is_the_product(gemv(x[1:2], weight), x[1:2], weight)


@HALVES
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (1, 4)])
def test_wide_rows(T: int, dtype: torch.dtype) -> None:
    """As wide and as many as the kernels take without a norm."""
    x, weight = settled(normal(T, 16384, dtype=dtype), normal(5, 16384, dtype=dtype))
    assert_is_the_product(gemv(x, weight), x, weight)


@pytest.mark.parametrize("norms", [pytest.param(False, id="gemv"), pytest.param(True, id="norm_gemv")])
def test_the_ops_pass_opcheck(norms: bool) -> None:
    """Schema, fake and what is written."""
    x, weight, norm = settled(*(normal(*shape, dtype=torch.float16) for shape in ((1, 40), (9, 40), (40,))))
    if norms:
        torch.library.opcheck(torch.ops.moe_lab.norm_gemv.default, (x, 2 * x, norm, 1e-5, weight, None))
    else:
        torch.library.opcheck(torch.ops.moe_lab.gemv.default, (x, weight, weight[:, 0].contiguous()))


@HALVES
def test_a_bias_may_begin_anywhere(dtype: torch.dtype) -> None:
    """As that of keys does, behind that of queries."""
    x, weight = settled(normal(1, 48, dtype=dtype), normal(7, 48, dtype=dtype))
    bias = normal(12, dtype=dtype)[5:]
    assert_is_the_product(gemv(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize(
    ("shape", "dtype", "norms", "taken"),
    [
        pytest.param((1, 40), torch.float16, True, True, id="one row"),
        pytest.param((1, 1, 40), torch.bfloat16, False, True, id="a sequence of one"),
        pytest.param((2, 1, 40), torch.float16, True, True, id="two sequences of one"),
        pytest.param((8, 8192), torch.float16, True, True, id="the most rows"),
        pytest.param((9, 40), torch.float16, False, False, id="9 rows"),
        pytest.param((5, 16384), torch.float16, False, False, id="too many elements"),
        pytest.param((0, 40), torch.float16, False, False, id="no row"),
        pytest.param((1, 42), torch.float16, False, False, id="not a multiple of 8"),
        pytest.param((1, 40), torch.float32, False, False, id="fp32"),
        pytest.param((1, 16384), torch.float16, False, True, id="wide"),
        pytest.param((4, 16384), torch.float16, False, True, id="wide, as many elements as it takes"),
        pytest.param((1, 8200), torch.float16, True, False, id="too wide for a norm"),
    ],
)
def test_what_it_takes(shape: tuple[int, ...], dtype: torch.dtype, norms: bool, taken: bool) -> None:
    """A few rows of 16 bits in pieces of 16 bytes."""
    x = torch.empty(shape, dtype=dtype)
    assert takes(x, torch.empty(3, shape[-1], dtype=dtype), None, norms=norms) == taken
    assert not takes(x, torch.empty(3, dtype=torch.float64))


def test_its_fake_has_its_shape() -> None:
    """For a pass that is traced."""
    with FakeTensorMode():
        y = torch.ops.moe_lab.gemv(torch.empty(3, 40, dtype=torch.float16), torch.empty(9, 40), None)
    assert y.shape == (3, 9) and y.dtype == torch.float16


@pytest.mark.parametrize(
    ("shape", "dtype", "by_kernel"),
    [
        pytest.param((1, 40), torch.float16, True, id="one row"),
        pytest.param((1, 1, 40), torch.float16, True, id="a sequence of one"),
        pytest.param((3, 2, 40), torch.float16, True, id="three sequences of two"),
        pytest.param((9, 40), torch.float16, False, id="9 rows"),
        pytest.param((0, 40), torch.float16, False, id="none"),
        pytest.param((1, 40), torch.float32, False, id="fp32"),
    ],
)
def test_a_linear_layer_uses_it_for_a_few_rows_in_16_bits(
    shape: tuple[int, ...], dtype: torch.dtype, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and together with others; what it is used for has the values that torch gives."""
    rows = []
    monkeypatch.setattr(gemv_module, "is_faster", lambda device: True)
    monkeypatch.setattr(gemv_module, "gemv", lambda x, *rest: rows.append(x.shape) or gemv(x, *rest))
    q, k = (Linear(40, n, bias=True).to(DEVICE, dtype) for n in (12, 8))
    place_together(q, k)
    for part in (*q.parameters(), *k.parameters()):
        part.copy_(normal(*part.shape))
    x = normal(*shape, dtype=dtype)
    settled()
    want = [torch.nn.functional.linear(x, layer.weight.to(dtype), layer.bias.to(dtype)) for layer in (q, k)]
    got = [*project_together(x, q, k), q(x)]
    assert rows == ([(x[..., 0].numel(), 40)] * 2 if by_kernel else [])
    torch.testing.assert_close(got, [*want, want[0]], rtol=2e-3, atol=2e-3)
    q.use_reference()
    assert torch.equal(q(x), want[0])


@pytest.mark.parametrize(
    ("shape", "asked", "by_kernel"),
    [
        pytest.param((1, 1, 40), "auto", True, id="one row"),
        pytest.param((2, 3, 40), "auto", True, id="two sequences of three"),
        pytest.param((9, 1, 40), "auto", False, id="9 rows"),
        pytest.param((1, 1, 40), "triton", False, id="a kernel was asked for by name"),
    ],
)
def test_a_norm_and_the_layers_behind_it(
    shape: tuple[int, ...], asked: str, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as one after the other."""
    monkeypatch.setattr(gemv_module, "is_faster", lambda device: True)
    norm, q, k = AddRMSNorm(40, 1e-5, asked), Linear(40, 12), Linear(40, 8)
    norm.implementation = "triton"
    place_together(q, k)
    for part in (*norm.parameters(), *q.parameters(), *k.parameters()):
        part.copy_(normal(*part.shape))
    for module in (norm, q, k):
        module.to(DEVICE)
    weights = [part.half() for part in (norm.weight, q.weight, k.weight)]
    norm.weight = torch.nn.Parameter(weights[0], requires_grad=False)
    whole = torch.cat(weights[1:])
    q.weight, k.weight = (torch.nn.Parameter(part, requires_grad=False) for part in whole.split([12, 8]))
    x, residual = normal(*shape, dtype=torch.float16), 2 * normal(*shape, dtype=torch.float16)
    settled()
    joined = joined_with(norm, x, residual, q, k)
    assert (joined is not None) == by_kernel
    if joined is not None:
        parts, total = norm_and_project(norm, x, residual, joined, q, k)
        normed, want_total = add_rms_norm.reference(x, residual, norm.weight, 1e-5)
        assert torch.equal(total, want_total) and total.shape == shape
        torch.testing.assert_close(list(parts), [q(normed), k(normed)], rtol=4e-3, atol=4e-3)


def test_the_last_position_of_each_sequence_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows do not lie one behind the other."""
    monkeypatch.setattr(gemv_module, "is_faster", lambda device: True)
    norm, head = AddRMSNorm(40, 1e-5, "auto"), Linear(40, 12)
    norm.implementation = "triton"
    for module in (norm, head):
        module.weight = torch.nn.Parameter(normal(*module.weight.shape, dtype=torch.float16), requires_grad=False)
    x, residual = (normal(3, 5, 40, dtype=torch.float16)[:, -1:] for _ in range(2))
    settled()
    joined = joined_with(norm, x, residual, head)
    assert joined is not None
    (logits,), total = norm_and_project(norm, x, residual, joined, head)
    normed, want_total = add_rms_norm.reference(x, residual, norm.weight, 1e-5)
    assert torch.equal(total, want_total)
    torch.testing.assert_close([logits, head(x)], [head(normed), x @ head.weight.T], rtol=4e-3, atol=4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [pytest.param(T, id=f"T={T}") for T in (1, 3, 8)])
def test_a_chain_in_a_graph_waits_for_what_it_reads(T: int) -> None:
    """Each product reads what the one before it wrote: 200 replays, each of another x, to the last bit."""
    norm = normal(512, dtype=torch.bfloat16)
    weights = [normal(n, k, dtype=torch.bfloat16) / k**0.5 for n, k in [(3000, 512), (512, 3000)] * 10]
    x = normal(T, 512, dtype=torch.bfloat16)

    def chain() -> Tensor:
        y, total = x, x
        for weight in weights:
            if len(weight) == 3000:
                y, total = norm_gemv(y, total, norm, 1e-5, weight)
            else:
                y = gemv(y, weight)
        return y

    settled(chain())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for seed in range(200):
        x.copy_(torch.randn(T, 512, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        replayed = y.clone()
        step, total = x, x
        for weight in weights:
            if len(weight) == 3000:
                step, total = settled(*norm_gemv(step, total, norm, 1e-5, weight))
            else:
                (step,) = settled(gemv(step, weight))
        assert torch.equal(replayed, step)


def test_its_limits_are_the_kernels() -> None:
    """The header names them too."""
    header = (extension.sources() / "decode.h").read_text()
    columns, alone = gemv_module._MOST_COLUMNS, gemv_module._MOST_COLUMNS_ALONE
    assert f"kMostColumns = {columns}, kMostColumnsAlone = {alone};" in header
    bits = gemv_module._MOST_ELEMENTS.bit_length() - 1
    assert f"kMostRows = {gemv_module.MOST_ROWS}, kMostElements = 1 << {bits};" in header
