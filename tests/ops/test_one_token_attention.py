"""one_token_attention: its definition in float64, what may be read and written, and one graph for every position."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lab.models.attention import Attention
from moe_lab.models.kv_cache import LayerCache
from moe_lab.ops import extension
from moe_lab.ops import one_token_attention as one_token_module
from moe_lab.ops.one_token_attention import one_token_attention, takes
from tests.ops.test_decode_attention import EPS, assert_near, at, attended, hide_the_unseen, tables, turned

HALVES = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")]
)
SHAPES = pytest.mark.parametrize(
    ("B", "H", "G", "d"),
    [
        pytest.param(1, 16, 1, 128, id="B=1, 16 heads, d=128"),
        pytest.param(3, 1, 1, 64, id="B=3, one head, d=64"),
        pytest.param(1, 5, 1, 64, id="B=1, 5 heads, d=64"),
        pytest.param(10, 7, 1, 128, id="B=10, 7 heads, d=128: a block a head"),
        pytest.param(1, 32, 8, 128, id="B=1, 8 of 32 heads share a key, d=128"),
        pytest.param(3, 21, 7, 64, id="B=3, 7 of 21 heads, d=64"),
        pytest.param(2, 4, 4, 64, id="B=2, all 4 heads share a key, d=64"),
        pytest.param(40, 12, 3, 128, id="B=40, 3 of 12 heads, d=128: a block for a key head"),
    ],
)
N = 300


@pytest.fixture(autouse=True)
def loaded(device: torch.device) -> None:
    """On a GPU the kernel is the extension's."""
    if device.type == "cuda":
        extension.load()
        if not one_token_module.is_faster(device):
            pytest.skip("the kernel needs compute capability 9.0 and nvcc")


class Case:
    """What a new token brings, and caches whose unseen positions are NaN."""

    def __init__(
        self, B: int, H: int, d: int, norm: str, dtype: torch.dtype, device: torch.device, length: int = N, G: int = 1
    ):
        generator = torch.Generator().manual_seed(B + 31 * H + d)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.H, self.d, self.norm, self.device = H, d, norm, device
        kept = (B, H // G, length, d)
        self.q, self.k, self.v = random(B, (H + 2 * H // G) * d).split([H * d, H // G * d, H // G * d], dim=1)
        widths = [{"none": 0, "head": d, "full": heads * d}[norm] for heads in (H, H // G)]
        self.q_norm, self.k_norm = (1 + 0.3 * random(width) if width else None for width in widths)
        self.k_BHNd, self.v_BHNd = random(*kept), random(*kept)
        self.sinks_H = random(H)

    def run(
        self, position: int, clip: float | None, window: int | None, *rest: object, turn_first: bool = False
    ) -> Tensor:
        turns = tables(position, self.d, self.device)
        of_new = (self.q, self.k, self.v, self.q_norm, self.k_norm, EPS, clip, turns, at(position, self.device))
        return one_token_attention(*of_new, self.k_BHNd, self.v_BHNd, turn_first, window, *rest)  # type: ignore[arg-type]


@pytest.mark.thinned(2)
@SHAPES
@pytest.mark.parametrize(
    ("norm", "clip", "window"),
    [
        pytest.param("none", 0.7, None, id="no norm, clip"),
        pytest.param("head", None, 70, id="norm of heads, window=70"),
        pytest.param("full", 0.7, None, id="norm of all, clip"),
    ],
)
@pytest.mark.parametrize("position", [pytest.param(p, id=f"at {p}") for p in (0, 1, 8, 63, 299)])
@HALVES
def test_it_is_its_definition_in_float64(
    B: int, H: int, G: int, d: int, norm: str, clip: float | None, position: int, window: int | None,
    dtype: torch.dtype, device: torch.device,
) -> None:  # fmt: skip
    """The new key and value stand at the position, nothing else of the caches changes, and the unseen is not read."""
    norm = "full" if H == 1 and norm == "head" else norm
    case = Case(B, H, d, norm, dtype, device, G=G)
    hide_the_unseen(case.k_BHNd, case.v_BHNd, position - 1, None if window is None else window - 1)
    before = [cache.clone() for cache in (case.k_BHNd, case.v_BHNd)]
    y_BHd = case.run(position, clip, window)
    bound = math.inf if clip is None else clip
    new_k = turned(case.k, case.k_norm, norm, clip, position, d)
    new_v = case.v.clamp(-bound, bound).view(B, H // G, d)
    assert_near(case.k_BHNd[:, :, position], new_k, roundings=2)
    assert torch.equal(case.v_BHNd[:, :, position], new_v)
    for cache, old in zip((case.k_BHNd, case.v_BHNd), before, strict=True):
        others = [n for n in range(N) if n != position]
        torch.testing.assert_close(cache[:, :, others], old[:, :, others], rtol=0, atol=0, equal_nan=True)
    q_BHd = turned(case.q, case.q_norm, norm, clip, position, d).to(dtype)
    assert_near(y_BHd, attended(q_BHd, case.k_BHNd, case.v_BHNd, position, window), roundings=3)


@pytest.mark.parametrize("sink", [pytest.param(0.0, id="sinks"), pytest.param(30.0, id="large sinks")])
@pytest.mark.parametrize("G", [pytest.param(1, id="a key a head"), pytest.param(3, id="three heads a key")])
@HALVES
def test_a_scale_and_sinks(sink: float, G: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of each head its own sink."""
    case = Case(2, 6, 64, "none", dtype, device, G=G)
    sinks_H = case.sinks_H + sink
    y_BHd = case.run(150, None, 70, 0.3, sinks_H)
    q_BHd = turned(case.q, None, "none", None, 150, 64).to(dtype)
    assert_near(y_BHd, attended(q_BHd, case.k_BHNd, case.v_BHNd, 150, 70, 0.3, sinks_H), roundings=3)


@pytest.mark.parametrize(
    ("B", "H", "G", "d", "position"),
    [
        pytest.param(1, 2, 1, 128, 3990, id="a cluster a head, d=128"),
        pytest.param(1, 2, 1, 64, 3990, id="a cluster a head, d=64"),
        pytest.param(40, 2, 1, 64, 290, id="a block a head, d=64"),
        pytest.param(1, 8, 4, 128, 3990, id="a cluster for four heads, d=128"),
        pytest.param(40, 8, 4, 64, 290, id="a block for four heads, d=64"),
    ],
)
def test_rings_go_round(B: int, H: int, G: int, d: int, position: int, device: torch.device) -> None:
    """More positions than the warps' rings have room for."""
    case = Case(B, H, d, "none", torch.float16, device, length=position + 3, G=G)
    y_BHd = case.run(position, None, None)
    q_BHd = turned(case.q, None, "none", None, position, d).to(torch.float16)
    assert_near(y_BHd, attended(q_BHd, case.k_BHNd, case.v_BHNd, position, None), roundings=3)


@pytest.mark.parametrize("G", [pytest.param(1, id="a key a head"), pytest.param(3, id="three heads a key")])
@HALVES
def test_a_norm_may_come_after_the_rotation(G: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of each head, of queries and of keys."""
    case = Case(2, 3, 64, "head", dtype, device, G=G)

    def normed(x_Bn: Tensor, weight_d: Tensor | None) -> Tensor:
        assert weight_d is not None
        y_BHd = turned(x_Bn, None, "none", None, 70, 64)
        return y_BHd / (y_BHd.square().mean(-1, keepdim=True) + EPS).sqrt() * weight_d.double().cpu()

    y_BHd = case.run(70, None, None, turn_first=True)
    assert_near(case.k_BHNd[:, :, 70], normed(case.k, case.k_norm), roundings=2)
    q_BHd = normed(case.q, case.q_norm).to(dtype)
    assert_near(y_BHd, attended(q_BHd, case.k_BHNd, case.v_BHNd, 70, None), roundings=3)


def test_the_op_passes_opcheck(device: torch.device) -> None:
    """Schema, fake, and that it writes the caches alone."""
    case = Case(2, 3, 64, "head", torch.float16, device)
    turns, norms = tables(70, 64, device), (case.q_norm, case.k_norm, EPS, 2.0)
    kept = (at(70, device), case.k_BHNd, case.v_BHNd, False, 50, 0.1, case.sinks_H)
    new = (part.contiguous() for part in (case.q, case.k, case.v))
    torch.library.opcheck(torch.ops.moe_lab.one_token_attention.default, (*new, *norms, *turns, *kept))


@HALVES
def test_nan_stays_in_its_sequence(dtype: torch.dtype, device: torch.device) -> None:
    """Of a cached key and of a new query."""
    case = Case(3, 2, 64, "none", dtype, device)
    case.k_BHNd[0, 1, 40] = math.nan
    case.q[2, 3] = math.nan
    is_nan_BH = case.run(100, 1.0, None).isnan().any(2)
    assert is_nan_BH.tolist() == [[False, True], [False, False], [True, False]]
    case = Case(3, 4, 64, "none", dtype, device, G=2)
    case.v_BHNd[0, 1, 40] = math.nan
    case.q[2, 3] = math.nan
    is_nan_BH = case.run(100, 1.0, None).isnan().any(2)
    assert is_nan_BH.tolist() == [[False, False, True, True], [False] * 4, [True, False, False, False]]


@HALVES
def test_an_infinite_new_value_is_seen_in_its_own_place(dtype: torch.dtype, device: torch.device) -> None:
    """As one that is cached: the others stay finite, and nothing is NaN."""
    case = Case(3, 2, 64, "none", dtype, device)
    case.v[1, 64 + 5] = math.inf
    case.v_BHNd[2, 0, 40, 7] = -math.inf
    y_BHd = case.run(100, None, None)
    assert y_BHd.isinf().nonzero().tolist() == [[1, 1, 5], [2, 0, 7]] and not y_BHd.isnan().any()
    case = Case(2, 4, 64, "none", dtype, device, G=2)
    case.v[0, 5], case.v_BHNd[1, 1, 40, 7] = math.inf, -math.inf
    y_BHd = case.run(100, None, None)
    wanted = [[0, 0, 5], [0, 1, 5], [1, 2, 7], [1, 3, 7]]
    assert y_BHd.isinf().nonzero().tolist() == wanted and not y_BHd.isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("G", [pytest.param(1, id="a key a head"), pytest.param(8, id="eight heads a key")])
@HALVES
def test_one_graph_serves_every_position_bit_for_bit(G: int, dtype: torch.dtype, device: torch.device) -> None:
    """Replays give what eager calls give, at positions that the graph was not recorded at."""
    case, eager = (Case(1, 16, 128, "full", dtype, device, G=G) for _ in range(2))
    position, turns = at(5, device), tables(5, 128, device)
    of_new = (case.q, case.k, case.v, case.q_norm, case.k_norm, EPS, None, turns, position, case.k_BHNd, case.v_BHNd)
    one_token_attention(*of_new)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = one_token_attention(*of_new)
    eager.k_BHNd.copy_(case.k_BHNd), eager.v_BHNd.copy_(case.v_BHNd)
    for p in (0, 3, 64, 200, 299, 65):
        position.fill_(p)
        for own, new in zip(turns, tables(p, 128, device), strict=True):
            own.copy_(new)
        graph.replay()
        assert torch.equal(y, eager.run(p, None, None))
        assert torch.equal(case.k_BHNd, eager.k_BHNd) and torch.equal(case.v_BHNd, eager.v_BHNd)


@pytest.mark.parametrize(
    ("n_tokens", "queries_per_key", "head_dim", "dtypes", "taken"),
    [
        pytest.param(1, 1, 64, (torch.float16, torch.float16), True, id="as it is"),
        pytest.param(1, 1, 128, (torch.bfloat16,), True, id="bf16"),
        pytest.param(1, 1, 64, (torch.float32,), False, id="fp32"),
        pytest.param(2, 1, 64, (torch.float16,), False, id="two tokens"),
        pytest.param(1, 8, 64, (torch.float16,), True, id="eight heads a key"),
        pytest.param(1, 9, 64, (torch.float16,), False, id="nine heads a key"),
        pytest.param(1, 1, 96, (torch.float16,), False, id="d=96"),
        pytest.param(1, 1, 64, (torch.float16, torch.float32), False, id="a wide norm"),
    ],
)
def test_what_it_takes(
    n_tokens: int, queries_per_key: int, head_dim: int, dtypes: tuple[torch.dtype, ...], taken: bool
) -> None:
    """One token, heads that share a key, dtypes and widths of the kernel."""
    tensors = [torch.empty(1, dtype=dtype) for dtype in dtypes]
    assert takes(n_tokens, queries_per_key, head_dim, *tensors, None) == taken


@pytest.mark.parametrize("norm", [pytest.param(kind, id=f"norm={kind}") for kind in ("none", "head", "full")])
@pytest.mark.parametrize("key_heads", [pytest.param(3, id="a key a head"), pytest.param(1, id="three heads a key")])
def test_the_layer_is_the_same_with_it(
    key_heads: int, norm: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch computes the layer, up to the rounding of 16 bits; and it is called."""
    layer = Attention(96, 3, key_heads, 64, norm, EPS).to(device, torch.float16)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in layer.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * value if "norm" in name else value / parameter.shape[-1] ** 0.5)
    kept = [torch.randn(2, key_heads, 40, 64, generator=generator).to(device, torch.float16) for _ in range(2)]
    x = torch.randn(2, 1, 96, generator=generator).to(device, torch.float16)
    arguments = (*tables(20, 64, device), LayerCache(kept[0].clone(), kept[1].clone()), at(20, device))
    layer.use_reference()
    want = layer(x, *arguments)
    calls = []
    monkeypatch.setattr(one_token_module, "is_faster", lambda device: True)
    monkeypatch.setattr(
        one_token_module, "one_token_attention", lambda *rest: calls.append(1) or one_token_attention(*rest)
    )
    layer.fuses = True
    assert layer.decoded_by(1) == extension.label(device) and layer.decoded_by(2) == "triton"
    got = layer(x, *tables(20, 64, device), LayerCache(*kept), at(20, device))
    assert calls == [1]
    torch.testing.assert_close(got, want, rtol=4e-3, atol=4e-3)


@HALVES
def test_its_fake_has_its_shape(dtype: torch.dtype) -> None:
    """For a pass that is traced."""
    with FakeTensorMode():
        q, cache = torch.empty(2, 256, dtype=dtype), torch.empty(2, 4, 9, 64, dtype=dtype)
        table, position = torch.empty(1, 64), torch.empty(1, dtype=torch.int64)
        y = torch.ops.moe_lab.one_token_attention(
            q, q, q, None, None, EPS, 1.0, table, table, position, cache, cache, False, 9, 0.1, None
        )
    assert y.shape == (2, 4, 64) and y.dtype == dtype


def test_its_limit_is_the_kernels() -> None:
    """The header names it too."""
    header = (extension.sources() / "decode.h").read_text()
    assert f"kMostQueries = {one_token_module._MOST_QUERIES};" in header
