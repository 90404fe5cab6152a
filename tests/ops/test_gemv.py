"""gemv: the product of one row in float64, odd sizes, and chains in a CUDA graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lab.models.layers import Linear, place_together, project_together
from moe_lab.ops import gemv as gemv_module
from moe_lab.ops.dependent_launch import is_dependent
from moe_lab.ops.gemv import gemv
from tests.ops.cases import DEVICE, DTYPES, normal
from tests.ops.compiling import assert_compiles


def settled(*tensors: Tensor) -> tuple[Tensor, ...]:
    """When they are there: a weight may not come from the kernel just before."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return tensors


def assert_is_the_product(y_1N: Tensor, x_1K: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
    """Up to the rounding of the result, and of sums in fp32."""
    want = torch.nn.functional.linear(x_1K.double(), weight_NK.double(), None if bias_N is None else bias_N.double())
    assert y_1N.shape == want.shape and y_1N.dtype == x_1K.dtype and y_1N.is_contiguous()
    eps = torch.finfo(y_1N.dtype).eps
    torch.testing.assert_close(y_1N.double(), want, rtol=eps, atol=1e-6 * weight_NK.shape[1] ** 0.5 + eps)


@pytest.mark.parametrize(
    ("N", "K"),
    [
        pytest.param(1, 1, id="one by one"),
        pytest.param(37, 100, id="37x100"),
        pytest.param(199, 64, id="199x64"),
        pytest.param(5, 4096, id="5x4096, one tile of columns"),
        pytest.param(3, 4097, id="3x4097, a column more"),
        pytest.param(2, 12288, id="2x12288, three tiles"),
    ],
)
@pytest.mark.parametrize("has_bias", [pytest.param(False, id="no bias"), pytest.param(True, id="bias")])
@DTYPES
def test_it_is_the_product(N: int, K: int, has_bias: bool, dtype: torch.dtype) -> None:
    """Of any width, with and without a bias; the operands keep their values."""
    x, weight = normal(1, K, dtype=dtype), normal(N, K, dtype=dtype)
    bias = normal(N, dtype=dtype) if has_bias else None
    before = [None if part is None else part.clone() for part in (x, weight, bias)]
    settled()
    y = gemv(x, weight, bias)
    assert_is_the_product(y, x, weight, bias)
    torch.testing.assert_close([x, weight, bias], before, rtol=0, atol=0)


@settings(max_examples=15, deadline=None, database=None)
@given(N=st.integers(1, 300), K=st.integers(1, 300))
def test_any_size(N: int, K: int) -> None:
    """Programs with a cut tile of rows and of columns."""
    x, weight = settled(normal(1, K), normal(N, K))
    assert_is_the_product(gemv(x, weight), x, weight)


def test_nan_and_infinity_stay_in_their_element(device: torch.device) -> None:
    """What a row of the weights has comes out in its element alone; what x has in all."""
    x, weight = normal(1, 40), normal(9, 40)
    weight[3, 7], weight[5, 0] = torch.nan, torch.inf
    settled()
    y_N = gemv(x, weight)[0]
    assert y_N[3].isnan() and y_N[5].isinf() and int(y_N.isfinite().sum()) == 7
    x[0, 2] = torch.nan
    assert gemv(*settled(x, weight)).isnan().all()


def test_a_row_of_a_larger_tensor_will_do() -> None:
    """As the last position of a pass is."""
    x, weight = settled(normal(3, 50), normal(7, 50))
    assert_is_the_product(gemv(x[1:2], weight), x[1:2], weight)


def launches() -> None:
    """Of one tile of columns and of several."""
    for N, K in ((6144, 2048), (50304, 2048), (7, 40), (4096, 14336)):
        x, weight = torch.empty(1, K, dtype=torch.bfloat16), torch.empty(N, K, dtype=torch.bfloat16)
        gemv(x, weight, torch.empty(N, dtype=torch.bfloat16) if N == 7 else None)


@pytest.mark.slow
def test_the_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """Which its interpreter does not ask."""
    assert_compiles(launches, tmp_path)


def test_its_fake_has_its_shape() -> None:
    """For a pass that is traced."""
    with FakeTensorMode():
        y = torch.ops.moe_lab.gemv(torch.empty(1, 40, dtype=torch.float16), torch.empty(9, 40), None)
    assert y.shape == (1, 9) and y.dtype == torch.float16


@pytest.mark.parametrize(
    ("shape", "dtype", "by_kernel"),
    [
        pytest.param((1, 40), torch.float16, True, id="one row"),
        pytest.param((1, 1, 40), torch.float16, True, id="a sequence of one"),
        pytest.param((2, 40), torch.float16, False, id="two rows"),
        pytest.param((0, 40), torch.float16, False, id="none"),
        pytest.param((1, 40), torch.float32, False, id="fp32"),
    ],
)
def test_a_linear_layer_uses_it_for_one_row_in_16_bits(
    shape: tuple[int, ...], dtype: torch.dtype, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and together with others; what it is used for has the values that torch gives."""
    rows = []
    monkeypatch.setattr(gemv_module, "gemv", lambda x, *rest: rows.append(x.shape) or gemv(x, *rest))
    q, k = (Linear(40, n, bias=True).to(DEVICE, dtype) for n in (12, 8))
    place_together(q, k)
    for part in (*q.parameters(), *k.parameters()):
        part.copy_(normal(*part.shape))
    x = normal(*shape, dtype=dtype)
    settled()
    want = [layer(x) for layer in (q, k)]
    assert not rows
    q.uses_gemv = k.uses_gemv = True
    got = [*project_together(x, q, k), q(x)]
    assert rows == ([(1, 40), (1, 40)] if by_kernel else [])
    torch.testing.assert_close(got, [*want, want[0]], rtol=2e-3, atol=2e-3)
    q.use_reference()
    assert torch.equal(q(x), want[0])


@pytest.mark.gpu
def test_a_chain_in_a_graph_waits_for_what_it_reads() -> None:
    """Each product reads what the one before it wrote: 200 replays, each of another x, to the last bit."""
    assert is_dependent(DEVICE) == (torch.cuda.get_device_capability() >= (9, 0))
    weights = [normal(n, k, dtype=torch.bfloat16) / k**0.5 for n, k in [(3000, 512), (512, 3000)] * 10]
    x = normal(1, 512, dtype=torch.bfloat16)

    def chain() -> Tensor:
        y = x
        for weight in weights:
            y = gemv(y, weight)
        return y

    settled(chain())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for seed in range(200):
        x.copy_(torch.randn(1, 512, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        replayed = y.clone()
        step = x
        for weight in weights:
            (step,) = settled(gemv(step, weight))
        assert torch.equal(replayed, step)
