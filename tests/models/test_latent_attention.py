"""models/latent_attention.py: the definition in float64, and the compressed cache."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_lab.models.kv_cache import KVCache, LatentCache
from moe_lab.models.latent_attention import LatentAttention
from moe_lab.models.parameters import initialize
from moe_lab.models.rope import rope_tables
from moe_lab.ops.library import HAS_TRITON
from moe_lab.ops.rotate import rotate
from moe_lab.runs.compared_cache import ComparedCache

D, H, NOPE, ROPE, V, RANK = 20, 3, 5, 6, 7, 9

with_queries = pytest.mark.parametrize(
    "q_rank", [pytest.param(None, id="plain_queries"), pytest.param(8, id="low_rank_queries")]
)


def attention_of(
    q_rank: int | None = 8, *, bias: bool = True, scale: float = 1.3, growth: tuple[float, int] | None = None
) -> LatentAttention:
    sizes = {"nope_dim": NOPE, "rope_dim": ROPE, "v_dim": V, "kv_rank": RANK, "q_rank": q_rank}
    attention = LatentAttention(D, H, **sizes, scale=scale, bias=bias, growth=growth)
    initialize(attention, 3)
    return attention


def tables(length: int) -> tuple[Tensor, Tensor]:
    return rope_tables(length, ROPE, 100.0, torch.device("cpu"))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def defined(attention: LatentAttention, x_SD: Tensor) -> Tensor:
    """[S, D] token by token and head by head, in float64, keys and values of heads made."""

    def linear(name: str, x: Tensor) -> Tensor:
        module = getattr(attention, name)
        return x @ module.weight.double().T + (0 if module.bias is None else module.bias.double())

    def norm(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * getattr(attention, name).weight.double()

    x, S = x_SD.double(), len(x_SD)
    cos, sin = tables(S)

    def turned(x_Sd: Tensor) -> Tensor:
        half = x_Sd.shape[1] // 2
        return x_Sd * cos.double() + torch.cat((-x_Sd[:, half:], x_Sd[:, :half]), 1) * sin.double()

    q = linear("q_up", norm("q_down_norm", linear("q_down", x))) if attention.has_q_rank else linear("q", x)
    if attention.growth is not None:
        beta, length = attention.growth
        q = q * torch.tensor([[1 + beta * math.log(1 + p // length)] for p in range(S)])
    down = linear("kv_down", x)
    c, r = norm("kv_down_norm", down[:, :RANK]), turned(down[:, RANK:])
    up_SHd, q_SHd = linear("kv_up", c).view(S, H, NOPE + V), q.view(S, H, NOPE + ROPE)
    heads = []
    for h in range(H):
        q_Sd = torch.cat((q_SHd[:, h, :NOPE], turned(q_SHd[:, h, NOPE:])), 1)
        k_Sd = torch.cat((up_SHd[:, h, :NOPE], r), 1)
        scores = attention.scale * q_Sd @ k_Sd.T
        heads.append(scores.masked_fill(torch.ones(S, S).triu(1).bool(), -torch.inf).softmax(1) @ up_SHd[:, h, NOPE:])
    return linear("o", torch.cat(heads, 1))


@with_queries
@pytest.mark.parametrize("S", [pytest.param(n, id=f"{n}_tokens") for n in (1, 2, 7)])
def test_it_is_its_definition_in_float64(q_rank: int | None, S: int) -> None:
    """The softmax is scaled by scale / sqrt(nope + rope)."""
    attention, x = attention_of(q_rank), random(2, S, D)
    assert attention.scale == pytest.approx(1.3 / 11**0.5)
    got = attention(x, *tables(S))
    for row in range(2):
        torch.testing.assert_close(got[row].double(), defined(attention, x[row]), rtol=0, atol=1e-5)


@pytest.mark.thinned(2)
@with_queries
@pytest.mark.parametrize("context", [pytest.param(n, id=f"behind_{n}") for n in (1, 4, 8)])
@pytest.mark.parametrize(
    ("at_once", "by"),
    [
        pytest.param(1, "torch", id="1_at_once"),
        pytest.param(2, "torch", id="2_at_once"),
        pytest.param(1, "triton", id="1_by_triton"),
        pytest.param(2, "triton", id="2_by_triton"),
    ],
)
def test_tokens_behind_a_cache_are_those_of_a_whole_pass(
    q_rank: int | None, context: int, at_once: int, by: str, device: torch.device
) -> None:
    """One or some at a time, by the kernels too: the latent form gives what keys and values of heads give."""
    attention, x = attention_of(q_rank).to(device), random(2, 10, D).to(device)
    cos, sin = (table.to(device) for table in tables(10))
    want, cache = attention(x, cos, sin), attention.make_cache(2, 12)
    attention.computed_by = by
    got = [attention(x[:, :context], cos[:context], sin[:context], cache)]
    for start in range(context, 10, at_once):
        at = slice(start, min(start + at_once, 10))
        got.append(attention(x[:, at], cos[at], sin[at], cache, torch.arange(10, device=device)[at]))
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("beta", [pytest.param(beta, id=f"beta={beta}") for beta in (0.0, 0.7)])
def test_queries_may_grow_with_their_position(beta: float) -> None:
    """At every third position, at once and behind a cache."""
    attention, x = attention_of(growth=(beta, 3)), random(1, 10, D)
    cos, sin = tables(10)
    want = attention(x, cos, sin)
    torch.testing.assert_close(want[0].double(), defined(attention, x[0]), rtol=0, atol=1e-5)
    cache = attention.make_cache(1, 10)
    attention(x[:, :2], cos[:2], sin[:2], cache)
    for p in range(2, 10):
        got = attention(x[:, p : p + 1], cos[p : p + 1], sin[p : p + 1], cache, torch.tensor([p]))
        torch.testing.assert_close(got, want[:, p : p + 1], rtol=0, atol=1e-5)
    assert bool(beta) != torch.allclose(want, attention_of()(x, cos, sin))


def test_a_cache_keeps_the_latent_and_its_turned_key() -> None:
    """rank + rope values of a token, whatever the number of heads; the value is a view of the key."""
    attention, x = attention_of(), random(2, 4, D)
    cos, sin = tables(4)
    cache = attention.make_cache(2, 6)
    attention(x, cos, sin, cache)
    assert isinstance(cache, LatentCache) and cache.k_BHNd.shape == (2, 1, 6, RANK + ROPE)
    assert KVCache([cache], 6).bytes_per_position == 2 * (RANK + ROPE) * 4
    assert cache.v_BHNd.data_ptr() == cache.k_BHNd.data_ptr()
    down = attention.kv_down(x)
    torch.testing.assert_close(cache.v_BHNd[:, 0, :4], attention.kv_down_norm(down[..., :RANK]))
    torch.testing.assert_close(cache.k_BHNd[:, :, :4, RANK:], rotate(down[..., RANK:].unsqueeze(1), cos, sin))
    assert not cache.k_BHNd[:, :, 4:].any()


def test_rows_of_a_latent_cache_share_its_memory() -> None:
    """As of any cache."""
    whole = KVCache([attention_of().make_cache(5, 4)], 4)
    part = whole.rows(1, 3)
    part.layers[0].begin(torch.ones(2, 1, 4, RANK + ROPE), torch.ones(2, 1, 4, RANK))
    assert whole.length == part.length == 4
    assert whole.layers[0].k_BHNd.sum((1, 2, 3)).tolist() == [0, 60, 60, 0, 0]


def test_a_latent_cache_keeps_its_dtype() -> None:
    """The reference reads in fp32 what a bf16 run has cached."""
    cache = LatentCache(torch.zeros(1, 1, 3, 4, dtype=torch.bfloat16), rank=3)
    key = random(1, 1, 1, 4)
    k, v = cache.put(key, key[..., :3], torch.tensor([1]))
    assert cache.k_BHNd.dtype == torch.bfloat16 and k.dtype == v.dtype == torch.float32
    assert torch.equal(k[:, :, 1:2], key.bfloat16().float()) and torch.equal(v, k[..., :3])


@pytest.mark.parametrize("index", [pytest.param(2, id="latent"), pytest.param(RANK + 1, id="turned_key")])
def test_a_wrong_value_in_a_latent_cache_is_seen(index: int) -> None:
    """By what compares a run's cache with the reference's."""
    kept, wanted = (LatentCache(random(2, 1, 4, RANK + ROPE), RANK) for _ in range(2))
    kept.k_BHNd[1, 0, 3, index] += 1
    compared = ComparedCache(KVCache([kept], 4))
    compared.layers[0].begin(wanted.k_BHNd, wanted.v_BHNd)
    assert compared.error() > 0.1


def test_kernels_compute_where_they_can_and_never_the_reference() -> None:
    """Decided by the device."""
    attention = attention_of()
    for device, by in (("cuda", "triton" if HAS_TRITON else "torch"), ("cpu", "torch")):
        attention.compute_on(torch.device(device))
        assert attention.computed_by == by
    attention.compute_on(torch.device("cuda"))
    attention.use_reference()
    assert attention.computed_by == "torch"


def test_who_attends_on_the_cache() -> None:
    """The kernel takes one new token; the reference takes none."""
    attention = attention_of()
    assert (attention.decoded_by(1), attention.decoded_by(2)) == ("torch", "torch")
    attention.computed_by = "triton"
    assert (attention.decoded_by(1), attention.decoded_by(2)) == ("triton", "torch")
    attention.use_reference()
    assert attention.decoded_by(1) == "torch"
