"""rope_append and cached_attention: both in float64, what may be read and written, and together with the model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lab.models.attention import Attention
from moe_lab.models.kv_cache import LayerCache
from moe_lab.ops.decode_attention import cached_attention, rope_append, takes
from tests.ops.cases import DEVICE, DTYPES
from tests.ops.compiling import assert_compiles

CPU = torch.device("cpu")
EPS = 1e-6
THETA = 10000.0

HEADS = pytest.mark.parametrize(
    ("B", "H", "H_KV", "d"),
    [
        pytest.param(1, 4, 4, 6, id="B=1, a key per head, d=6"),
        pytest.param(3, 4, 2, 8, id="B=3, two heads a key, d=8"),
        pytest.param(1, 3, 1, 64, id="B=1, three heads a key, d=64"),
        pytest.param(3, 1, 1, 6, id="B=3, one head, d=6"),
        pytest.param(1, 16, 2, 128, id="B=1, eight heads a key, d=128"),
        pytest.param(1, 9, 3, 10, id="B=1, nine heads, d=10"),
        pytest.param(1, 16, 2, 512, id="B=1, eight heads a key, d=512"),
    ],
)
NORMS = pytest.mark.parametrize("norm", [pytest.param(kind, id=f"norm={kind}") for kind in ("none", "head", "full")])
CLIPS = pytest.mark.parametrize("clip", [pytest.param(None, id="no clip"), pytest.param(0.7, id="clip")])
WINDOWS = pytest.mark.parametrize("window", [pytest.param(w, id=f"window={w}") for w in (None, 5, 130)])
POSITIONS = pytest.mark.parametrize("position", [pytest.param(p, id=f"at {p}") for p in (0, 1, 63, 64, 128, 199)])


def at(position: int, device: torch.device) -> Tensor:
    return torch.tensor([position], device=device)


def tables(position: int, d: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """cos and sin [1, d] of a position, by the definition of RoPE."""
    angle_d = torch.tensor([position * THETA ** (-2 * (i % (d // 2)) / d) for i in range(d)], dtype=torch.float64)
    return angle_d.cos().float()[None].to(device), angle_d.sin().float()[None].to(device)


class New(NamedTuple):
    """What a new token brings, and the caches."""

    q_Bn: Tensor
    k_Bm: Tensor
    v_Bm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    k_BHNd: Tensor
    v_BHNd: Tensor

    def append(self, clip: float | None, position: int, *, turn_first: bool = False) -> Tensor:
        q_Bn, k_Bm, v_Bm, q_norm, k_norm, *caches = self
        turns = tables(position, self.k_BHNd.shape[3], q_Bn.device)
        place = (turns, at(position, q_Bn.device), *caches, turn_first)
        return rope_append(q_Bn, k_Bm, v_Bm, q_norm, k_norm, EPS, clip, *place)


def new_token(
    B: int, H: int, H_KV: int, d: int, norm: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> New:
    """q, k and v as slices of one projection, and caches of 7 positions."""
    generator = torch.Generator().manual_seed(B + 31 * H + d)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    q_Bn, k_Bm, v_Bm = random(B, (H + 2 * H_KV) * d).split((H * d, H_KV * d, H_KV * d), dim=1)
    widths = {"none": (0, 0), "head": (d, d), "full": (H * d, H_KV * d)}[norm]
    q_norm, k_norm = (1 + 0.3 * random(width) if width else None for width in widths)
    return New(q_Bn, k_Bm, v_Bm, q_norm, k_norm, random(B, H_KV, 7, d), random(B, H_KV, 7, d))


def turned(x_Bn: Tensor, weight: Tensor | None, norm: str, clip: float | None, position: int, d: int) -> Tensor:
    """[B, heads, d] in float64, one head and one pair of dimensions at a time."""
    x_Bn = x_Bn.double().cpu()
    bound = math.inf if clip is None else clip

    def normed(x: Tensor) -> Tensor:
        assert weight is not None
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double().cpu()

    if norm == "full":
        x_Bn = normed(x_Bn)
    x_BHd = x_Bn.clamp(-bound, bound).unflatten(1, (-1, d))
    if norm == "head":
        x_BHd = normed(x_BHd)
    y_BHd = torch.empty_like(x_BHd)
    for i in range(d // 2):
        angle = position * THETA ** (-2 * i / d)
        a, b = x_BHd[..., i], x_BHd[..., i + d // 2]
        y_BHd[..., i] = a * math.cos(angle) - b * math.sin(angle)
        y_BHd[..., i + d // 2] = a * math.sin(angle) + b * math.cos(angle)
    return y_BHd


def assert_near(y: Tensor, expected: Tensor, roundings: int = 1) -> None:
    """Equal up to roundings to y's dtype, and sums in fp32."""
    tolerance = 1e-5 if y.dtype == torch.float32 else roundings * torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=tolerance)


@pytest.mark.thinned(2)
@HEADS
@NORMS
@CLIPS
@DTYPES
def test_a_token_is_normed_clamped_turned_and_kept(
    B: int, H: int, H_KV: int, d: int, norm: str, clip: float | None, dtype: torch.dtype, device: torch.device
) -> None:
    """Queries come back, keys and values stand at the position; every other row of the caches is bitwise as it was."""
    if H == 1 and norm == "head":
        norm = "full"  # a single head is the whole projection
    position = 5
    new = new_token(B, H, H_KV, d, norm, dtype, device)
    before = [cache.clone() for cache in (new.k_BHNd, new.v_BHNd)]
    q_BHd = new.append(clip, position)
    assert q_BHd.shape == (B, H, d) and q_BHd.dtype == dtype and q_BHd.is_contiguous()
    assert_near(q_BHd, turned(new.q_Bn, new.q_norm, norm, clip, position, d))
    assert_near(new.k_BHNd[:, :, position], turned(new.k_Bm, new.k_norm, norm, clip, position, d))
    bound = math.inf if clip is None else clip
    assert torch.equal(new.v_BHNd[:, :, position], new.v_Bm.clamp(-bound, bound).unflatten(1, (-1, d)))
    for cache, old in zip((new.k_BHNd, new.v_BHNd), before, strict=True):
        old[:, :, position] = cache[:, :, position]
        assert torch.equal(cache, old)


@pytest.mark.parametrize("position", [pytest.param(p, id=f"at {p}") for p in (0, 3, 6)])
@DTYPES
def test_only_the_row_of_the_position_is_written(position: int, dtype: torch.dtype, device: torch.device) -> None:
    """The first, one between and the last; of all sequences and heads, and the operands keep their values."""
    new = new_token(3, 4, 2, 6, "head", dtype, device)
    new.k_BHNd.fill_(math.nan)
    new.v_BHNd.fill_(math.nan)
    before = [None if part is None else part.clone() for part in new[:5]]
    q_BHd = new.append(None, position)
    assert_near(q_BHd, turned(new.q_Bn, new.q_norm, "head", None, position, 6))
    for cache in (new.k_BHNd, new.v_BHNd):
        written_N = cache.isfinite().all(-1).all(1).all(0)
        assert written_N.tolist() == [n == position for n in range(7)]
        assert int(cache.isfinite().sum()) == 3 * 2 * 6
    torch.testing.assert_close(list(new[:5]), before, rtol=0, atol=0)
    assert q_BHd.untyped_storage().data_ptr() != new.q_Bn.untyped_storage().data_ptr()


@NORMS
def test_at_position_zero_nothing_turns(norm: str, device: torch.device) -> None:
    """There rope_append is the norm alone; without one it keeps what it is given to the last bit."""
    new = new_token(3, 4, 2, 8, norm, device=device)
    q_BHd = new.append(None, 0)
    assert_near(q_BHd, turned(new.q_Bn, new.q_norm, norm, None, 0, 8))
    if norm == "none":
        assert torch.equal(q_BHd, new.q_Bn.unflatten(1, (-1, 8)))
        assert torch.equal(new.k_BHNd[:, :, 0], new.k_Bm.unflatten(1, (-1, 8)))


def test_the_tables_are_used_as_they_are(device: torch.device) -> None:
    """Each dimension by its own entry: cos and sin may have grown (yarn), or be any numbers."""
    new = new_token(2, 3, 1, 6, "none", device=device)
    generator = torch.Generator().manual_seed(0)
    cos, sin = (torch.randn(1, 6, generator=generator).to(device) for _ in range(2))
    q_BHd = rope_append(*new[:5], EPS, None, (cos, sin), at(2, device), new.k_BHNd, new.v_BHNd)
    for y_BHd, x_Bn in ((q_BHd, new.q_Bn), (new.k_BHNd[:, :, 2], new.k_Bm)):
        x_BHd = x_Bn.double().unflatten(1, (-1, 6))
        partner_BHd = torch.cat((-x_BHd[..., 3:], x_BHd[..., :3]), dim=-1)
        assert_near(y_BHd, x_BHd * cos.double() + partner_BHd * sin.double())


@CLIPS
@NORMS
def test_nan_is_not_clamped_away(norm: str, clip: float | None, device: torch.device) -> None:
    """As in torch.clamp: it stays in the head, or with a norm of all the row, that it came from."""
    new = new_token(3, 4, 2, 6, norm, device=device)
    clean = new_token(3, 4, 2, 6, norm, device=device)
    for part in new[:3]:
        part[1, 7] = math.nan  # of the second head
    q_BHd, clean_BHd = new.append(clip, 4), clean.append(clip, 4)
    for dirty, pure in ((q_BHd, clean_BHd), (new.k_BHNd[:, :, 4], clean.k_BHNd[:, :, 4])):
        assert dirty[1, 1].isnan().any()
        if norm == "full":
            assert dirty[1].isnan().all()
        if norm != "full":
            assert torch.equal(dirty[1, 0], pure[1, 0])
        assert torch.equal(dirty[[0, 2]], pure[[0, 2]])
    expected_BHd = clean.v_BHNd[:, :, 4].clone()
    expected_BHd[1, 1, 1] = math.nan
    torch.testing.assert_close(new.v_BHNd[:, :, 4], expected_BHd, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.t().contiguous().t(), id="transposed"),
        pytest.param(lambda x: x.repeat_interleave(3, dim=1)[:, ::3], id="every third column"),
        pytest.param(lambda x: x.repeat_interleave(2, dim=0)[::2], id="every other row"),
    ],
)
def test_strides_of_a_projection_change_nothing(view: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """A view gives what its copy gives."""
    new, viewed = (new_token(3, 4, 2, 6, "full", device=device) for _ in range(2))
    viewed = New(*(view(part) for part in viewed[:3]), *viewed[3:])
    torch.testing.assert_close(viewed.append(0.7, 3), new.append(0.7, 3), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(viewed[5:], new[5:], rtol=1e-6, atol=1e-6)


@DTYPES
def test_a_part_of_a_larger_cache_is_written_in_place(dtype: torch.dtype, device: torch.device) -> None:
    """Of some of the sequences (KVCache.rows); the others keep their values."""
    new = new_token(2, 4, 2, 6, "none", dtype, device)
    k_BHNd, v_BHNd = (torch.zeros(5, 2, 7, 6, dtype=dtype, device=device) for _ in range(2))
    part = new._replace(k_BHNd=k_BHNd[1:3], v_BHNd=v_BHNd[1:3])
    torch.testing.assert_close(part.append(None, 6), new.append(None, 6))
    for cache, whole in ((k_BHNd, new.k_BHNd), (v_BHNd, new.v_BHNd)):
        torch.testing.assert_close(cache[1:3, :, 6], whole[:, :, 6])
        assert bool(cache[1:3, :, 6].all()) and int(cache.count_nonzero()) == 2 * 2 * 6


N = 200  # positions: two pieces, the second one cut


def kept(
    B: int, H: int, H_KV: int, d: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, d] and caches of N positions, of order one."""
    generator = torch.Generator().manual_seed(B + 31 * H + d)
    shapes = ((B, H, d), (B, H_KV, N, d), (B, H_KV, N, d))
    q_BHd, k_BHNd, v_BHNd = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return q_BHd, k_BHNd, v_BHNd


def attended(
    q_BHd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    position: int,
    window: int | None,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """One head at a time, in float64."""
    q_BHd, k_BHNd, v_BHNd = (part.double().cpu() for part in (q_BHd, k_BHNd, v_BHNd))
    B, H, d = q_BHd.shape
    seen = slice(0 if window is None else max(0, position + 1 - window), position + 1)
    y_BHd = torch.empty(B, H, d, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            kv = h * k_BHNd.shape[1] // H
            scores_n = k_BHNd[b, kv, seen] @ q_BHd[b, h] * (scale or 1 / math.sqrt(d))
            largest, sink = scores_n.max(), 0.0
            share_n = (scores_n - largest).exp()
            if sinks_H is not None:
                sink = float((sinks_H[h].double().cpu() - largest).exp())
            y_BHd[b, h] = share_n @ v_BHNd[b, kv, seen] / (share_n.sum() + sink)
    return y_BHd


def hide_the_unseen(k_BHNd: Tensor, v_BHNd: Tensor, position: int, window: int | None) -> None:
    """NaN in all the cache that no query at the position may see."""
    for cache in (k_BHNd, v_BHNd):
        cache[:, :, position + 1 :] = math.nan
        cache[:, :, : 0 if window is None else max(0, position + 1 - window)] = math.nan


@pytest.mark.thinned(2)
@HEADS
@WINDOWS
@pytest.mark.parametrize("position", [pytest.param(p, id=f"at {p}") for p in (0, 150)])
def test_attention_is_its_definition_in_float64(
    B: int, H: int, H_KV: int, d: int, position: int, window: int | None, device: torch.device
) -> None:
    """For each head by its own key head; what is not seen is NaN and does not leak."""
    q_BHd, *caches = kept(B, H, H_KV, d, device=device)
    hide_the_unseen(*caches, position, window)
    y_BHd = cached_attention(q_BHd, *caches, at(position, device), window)
    assert y_BHd.shape == (B, H, d) and y_BHd.dtype == torch.float32 and y_BHd.is_contiguous()
    assert_near(y_BHd, attended(q_BHd, *caches, position, window))


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("B", "H", "H_KV", "d"), [pytest.param(3, 4, 2, 8, id="two heads a key"), pytest.param(1, 9, 3, 10, id="three")]
)
@DTYPES
@pytest.mark.parametrize("window", [pytest.param(None, id="all"), pytest.param(70, id="window=70")])
@pytest.mark.parametrize(
    ("scale", "sink"),
    [
        pytest.param(0.3, None, id="scale"),
        pytest.param(None, 0.0, id="sinks"),
        pytest.param(0.3, 30.0, id="scale, large sinks"),
        pytest.param(None, -30.0, id="small sinks"),
    ],
)
def test_a_scale_and_sinks(
    B: int, H: int, H_KV: int, d: int, dtype: torch.dtype, window: int | None, scale: float | None, sink: float | None,
    device: torch.device,
) -> None:  # fmt: skip
    """Of each head its own sink, of the query's dtype or of fp32; over several pieces of keys."""
    q_BHd, *caches = kept(B, H, H_KV, d, dtype, device)
    hide_the_unseen(*caches, 150, window)
    sinks_H = None
    if sink is not None:
        sinks_H = (sink + torch.randn(H, generator=torch.Generator().manual_seed(9))).to(device, dtype)
    y_BHd = cached_attention(q_BHd, *caches, at(150, device), window, scale, sinks_H)
    assert_near(y_BHd, attended(q_BHd, *caches, 150, window, scale, sinks_H), roundings=2)


@DTYPES
@POSITIONS
@pytest.mark.parametrize("window", [pytest.param(None, id="all"), pytest.param(70, id="window=70")])
def test_attention_of_any_dtype_at_any_position(
    dtype: torch.dtype, position: int, window: int | None, device: torch.device
) -> None:
    """On either side of where blocks and pieces begin."""
    q_BHd, *caches = kept(2, 6, 2, 64, dtype, device)
    hide_the_unseen(*caches, position, window)
    y_BHd = cached_attention(q_BHd, *caches, at(position, device), window)
    assert y_BHd.dtype == dtype
    assert_near(y_BHd, attended(q_BHd, *caches, position, window), roundings=2)  # the shares, and the result


@settings(max_examples=15, deadline=None, database=None)
@given(data=st.data(), length=st.integers(1, 300), groups=st.sampled_from([1, 2, 3, 5]))
def test_attention_of_any_length_position_and_window(data: st.DataObject, length: int, groups: int) -> None:
    """One piece, a full one, a cut one, and windows that begin and end in any of them."""
    position = data.draw(st.integers(0, length - 1))
    window = data.draw(st.none() | st.integers(1, length + 1))
    generator = torch.Generator().manual_seed(length)
    q_BHd = torch.randn(1, 2 * groups, 6, generator=generator).to(DEVICE)
    k_BHNd, v_BHNd = torch.randn(2, 1, 2, length, 6, generator=generator).to(DEVICE)
    hide_the_unseen(k_BHNd, v_BHNd, position, window)
    y_BHd = cached_attention(q_BHd, k_BHNd, v_BHNd, at(position, DEVICE), window)
    assert_near(y_BHd, attended(q_BHd, k_BHNd, v_BHNd, position, window))


FEW = pytest.mark.parametrize(
    ("B", "S", "H", "H_KV", "d"),
    [
        pytest.param(1, 2, 4, 4, 6, id="two tokens, a key per head"),
        pytest.param(3, 3, 4, 2, 8, id="three tokens, two heads a key"),
        pytest.param(2, 8, 3, 1, 64, id="eight tokens, three heads a key"),
        pytest.param(2, 5, 1, 1, 10, id="five tokens, one head"),
    ],
)


@pytest.mark.thinned(2)
@FEW
@pytest.mark.parametrize("window", [pytest.param(w, id=f"window={w}") for w in (None, 5)])
@pytest.mark.parametrize("position", [pytest.param(p, id=f"from {p}") for p in (0, 125)])
@DTYPES
def test_each_of_a_few_tokens_attends_up_to_itself(
    B: int, S: int, H: int, H_KV: int, d: int, position: int, window: int | None, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    """Each as if it were alone, also where a piece of keys begins between them; what none may see is NaN."""
    _, *caches = kept(B, H, H_KV, d, dtype, device)
    q_BSHd = torch.randn(B, S, H, d, generator=torch.Generator().manual_seed(S)).to(device, dtype)
    for cache in caches:
        cache[:, :, position + S :] = math.nan
        cache[:, :, : 0 if window is None else max(0, position + 1 - window)] = math.nan
    position_S = torch.arange(position, position + S, device=device)
    y_RHd = cached_attention(q_BSHd.flatten(0, 1), *caches, position_S, window)
    assert y_RHd.shape == (B * S, H, d) and y_RHd.dtype == dtype
    want = [attended(q_BSHd[:, s], *caches, position + s, window) for s in range(S)]
    assert_near(y_RHd.view(B, S, H, d), torch.stack(want, dim=1), roundings=2)


@pytest.mark.parametrize("window", [pytest.param(None, id="all"), pytest.param(70, id="window=70")])
def test_sinks_of_a_few_tokens(window: int | None, device: torch.device) -> None:
    """Each head's, for every token."""
    _, *caches = kept(2, 4, 2, 8, device=device)
    q_BSHd = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(1)).to(device)
    sinks_H = torch.tensor([0.0, 1.0, -30.0, 30.0], device=device)
    position_S = torch.arange(140, 143, device=device)
    y_RHd = cached_attention(q_BSHd.flatten(0, 1), *caches, position_S, window, 0.3, sinks_H)
    want = [attended(q_BSHd[:, s], *caches, 140 + s, window, 0.3, sinks_H) for s in range(3)]
    assert_near(y_RHd.view(2, 3, 4, 8), torch.stack(want, dim=1))


@NORMS
@pytest.mark.parametrize("turn_first", [pytest.param(False, id="norm first"), pytest.param(True, id="turn first")])
def test_a_few_tokens_are_kept_as_each_alone(norm: str, turn_first: bool, device: torch.device) -> None:
    """Rows of a sequence follow each other; each has its own position, angles and place in the cache."""
    if norm == "full" and turn_first:
        pytest.skip("norms of whole projections come before the rotation")
    B, S, H, H_KV, d, first = 3, 2, 4, 2, 8, 3
    many = new_token(B * S, H, H_KV, d, norm, device=device)
    caches = [torch.zeros(B, H_KV, 7, d, device=device) for _ in range(2)]
    cos, sin = (torch.cat(part) for part in zip(*(tables(first + s, d, device) for s in range(S)), strict=True))
    position_S = torch.arange(first, first + S, device=device)
    q_RHd = rope_append(*many[:5], EPS, 0.7, (cos, sin), position_S, *caches, turn_first)
    for s in range(S):
        rows = torch.arange(B, device=device) * S + s
        alone = New(*(part[rows] for part in many[:3]), *many[3:5], *(torch.zeros_like(part) for part in caches))
        torch.testing.assert_close(q_RHd[rows], alone.append(0.7, first + s, turn_first=turn_first), rtol=0, atol=0)
        for cache, want in zip(caches, alone[5:], strict=True):
            assert torch.equal(cache[:, :, first + s], want[:, :, first + s])
    assert all(int(cache.any(-1).sum()) == B * H_KV * S for cache in caches)


@DTYPES
def test_of_one_position_the_values_come_back(dtype: torch.dtype, device: torch.device) -> None:
    """To the last bit: the first position, or a window of one."""
    q_BHd, k_BHNd, v_BHNd = kept(3, 6, 2, 8, dtype, device)
    for position, window in ((0, None), (0, 9), (130, 1)):
        y_BHd = cached_attention(q_BHd, k_BHNd, v_BHNd, at(position, device), window)
        assert torch.equal(y_BHd, v_BHNd[:, :, position].repeat_interleave(3, dim=1))


@DTYPES
@pytest.mark.parametrize("size", [pytest.param(0.0, id="equal scores"), pytest.param(200.0, id="huge scores")])
def test_neither_equal_nor_huge_scores_overflow(dtype: torch.dtype, size: float, device: torch.device) -> None:
    """Equal ones give the mean of the values; one far above the rest, in either piece, gives its own value."""
    q_BHd, k_BHNd, v_BHNd = kept(1, 4, 2, 8, dtype, device)
    q_BHd.fill_(size)
    k_BHNd.fill_(-size)
    if size == 0:
        y_BHd = cached_attention(q_BHd, k_BHNd, v_BHNd, at(N - 1, device), None)
        assert_near(y_BHd, v_BHNd.double().mean(2).repeat_interleave(2, dim=1))
        return
    for best in (0, 70, 127, 128, N - 1):
        k_best_BHNd = k_BHNd.clone()
        k_best_BHNd[:, :, best] = size
        y_BHd = cached_attention(q_BHd, k_best_BHNd, v_BHNd, at(N - 1, device), None)
        assert torch.equal(y_BHd, v_BHNd[:, :, best].repeat_interleave(2, dim=1))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
def test_nan_stays_in_its_sequence_and_is_not_lost(device: torch.device) -> None:
    """Of a query in its head, of a key or value that is seen in the heads that share it, and nowhere else."""
    q_BHd, k_BHNd, v_BHNd = kept(3, 4, 2, 8, device=device)
    clean_BHd = cached_attention(q_BHd, k_BHNd, v_BHNd, at(150, device), None)
    q_BHd[0, 1, 3], k_BHNd[1, 0, 20, 0], v_BHNd[2, 1, 140, 5] = math.nan, math.nan, math.nan
    y_BHd = cached_attention(q_BHd, k_BHNd, v_BHNd, at(150, device), None)
    expected = torch.zeros(3, 4, 8, dtype=torch.bool)
    expected[0, 1] = expected[1, :2] = True
    expected[2, 2:, 5] = True
    assert torch.equal(y_BHd.isnan().cpu(), expected)
    assert torch.equal(y_BHd.cpu()[~expected], clean_BHd.cpu()[~expected])


def test_strides_of_the_query_and_a_larger_cache_change_nothing(device: torch.device) -> None:
    """A query cut out of more, or turned, and some of the sequences of a cache give what copies give."""
    q_BHd, k_BHNd, v_BHNd = kept(3, 4, 2, 8, device=device)
    expected_BHd = cached_attention(q_BHd, k_BHNd, v_BHNd, at(150, device), 90)
    wide = torch.full((3, 6, 16), math.nan, device=device)
    wide[:, 1:5, ::2] = q_BHd
    larger_k, larger_v = (torch.cat((part[:1] * math.nan, part, part[:1] * math.nan)) for part in (k_BHNd, v_BHNd))
    for view in (wide[:, 1:5, ::2], q_BHd.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        y_BHd = cached_attention(view, larger_k[1:4], larger_v[1:4], at(150, device), 90)
        assert y_BHd.is_contiguous() and torch.equal(y_BHd, expected_BHd)
    one_BHd = cached_attention(q_BHd[2:], k_BHNd[2:], v_BHNd[2:], at(150, device), 90)
    assert torch.equal(one_BHd, expected_BHd[2:])


def test_attention_writes_nothing_into_its_operands(device: torch.device) -> None:
    """And the result shares no memory with them."""
    operands = (*kept(2, 4, 2, 8, device=device), at(77, device))
    before = [part.clone() for part in operands]
    y_BHd = cached_attention(*operands, 50)
    torch.testing.assert_close(list(operands), before, rtol=0, atol=0)
    assert y_BHd.untyped_storage().data_ptr() not in {part.untyped_storage().data_ptr() for part in operands}


@pytest.mark.parametrize("position", [pytest.param(p, id=f"at {p}") for p in (0, 5)])
@pytest.mark.parametrize("H", [pytest.param(1, id="one head"), pytest.param(4, id="four heads")])
def test_a_norm_may_come_after_the_rotation(H: int, position: int, device: torch.device) -> None:
    """Of queries and keys, each head alone: as turned without a norm, and normed then."""
    new = new_token(2, H, 1, 8, "head", device=device)
    plain = New(*new[:3], None, None, new.k_BHNd.clone(), new.v_BHNd.clone())
    want_q, got_q = plain.append(None, position), new.append(None, position, turn_first=True)
    for got, want, weight in (
        (got_q, want_q, new.q_norm),
        (new.k_BHNd[:, :, position], plain.k_BHNd[:, :, position], new.k_norm),
    ):
        assert weight is not None
        assert_near(got, want / (want.square().mean(-1, keepdim=True) + EPS).sqrt() * weight)
    assert torch.equal(new.v_BHNd, plain.v_BHNd)


def one_token(
    norm: str,
    clip: float | None,
    window: int | None,
    H: int = 6,
    H_KV: int = 2,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    **more: Any,
) -> Attention:
    """An attention layer whose outputs are of order one, with kernels or without (`fuses`)."""
    attention = Attention(24, H, H_KV, 8, norm, EPS, qkv_bias=True, o_bias=True, clip_qkv=clip, window=window, **more)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in attention.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * values if "norm" in name else values / 24**0.5)
    return attention.to(device, dtype)


def empty_cache(B: int, H_KV: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
    return LayerCache(*(torch.zeros(B, H_KV, 9, 8, dtype=dtype, device=device) for _ in range(2)))


LAYERS = pytest.mark.parametrize(
    ("norm", "clip", "window", "H", "H_KV"),
    [
        pytest.param("none", None, None, 6, 2, id="plain"),
        pytest.param("head", None, 3, 6, 2, id="norm of heads, window"),
        pytest.param("head", 0.7, None, 3, 3, id="clip, norm of heads"),
        pytest.param("full", 0.7, 3, 6, 1, id="norm of all, clip, window"),
        pytest.param("full", 0.7, None, 1, 1, id="norm of all, one head"),
    ],
)


def assert_same(y: Tensor, expected: Tensor) -> None:
    """Of the kernels and plain torch, which rounds in more places."""
    tolerance = 3e-5 if y.dtype == torch.float32 else 8 * torch.finfo(y.dtype).eps
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="plain"),
        pytest.param({"scale": 0.6, "sinks": True}, id="sinks"),
        pytest.param({"output_gate": True}, id="output_gate"),
        pytest.param({"scale": 1.0, "value_norm": True}, id="value_norm"),
        pytest.param({"value_norm": True, "values_are_keys": True}, id="values_are_keys"),
    ],
)
@LAYERS
@DTYPES
@pytest.mark.slow
def test_the_layer_is_the_same_with_the_kernels(
    norm: str, clip: float | None, window: int | None, H: int, H_KV: int, dtype: torch.dtype, more: dict[str, Any],
    device: torch.device,
) -> None:  # fmt: skip
    """Token after token on a cache of its own: outputs and caches agree with plain torch."""
    attention = one_token(norm, clip, window, H, H_KV, dtype, device, **more)
    caches = [empty_cache(2, H_KV, dtype, device) for _ in range(2)]
    x_SB1D = torch.randn(4, 2, 1, 24, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    for step, x_B1D in enumerate(x_SB1D):
        results = []
        for attention.fuses, cache in zip((False, True), caches, strict=True):
            results.append(attention(x_B1D, *tables(step, 8, device), cache, at(step, device)))
        assert_same(results[1], results[0])
        assert float(results[0].std()) > 0.1
    for plain, fused in zip(caches[0].buffers(), caches[1].buffers(), strict=True):
        assert_same(fused, plain)
        assert not fused[:, :, 4:].any() and bool(fused[:, :, :4].any(-1).all())


@pytest.mark.parametrize(
    ("norm", "B"), [pytest.param("none", 1, id="no norm, B=1"), pytest.param("full", 3, id="norm of all, B=3")]
)
def test_the_ops_pass_opcheck(norm: str, B: int, device: torch.device) -> None:
    """Schema, mutation of the caches, fake tensors and tracing agree with what the ops do."""
    new, position = new_token(B, 4, 2, 6, norm, device=device), at(3, device)
    arguments = (*new[:5], EPS, 0.7, *tables(3, 6, device), position, *new[5:])
    results = torch.library.opcheck(torch.ops.moe_lab.rope_append.default, arguments)
    assert set(results.values()) == {"SUCCESS"}
    attention = (new.q_Bn.unflatten(1, (-1, 6)), *new[5:], position, 2)
    results = torch.library.opcheck(torch.ops.moe_lab.cached_attention.default, attention)
    assert set(results.values()) == {"SUCCESS"}


@DTYPES
def test_fake_tensors_have_the_real_shapes(dtype: torch.dtype) -> None:
    """Under FakeTensorMode queries and result are [B, H, d] of q's dtype and contiguous."""
    with FakeTensorMode():
        new = New(
            *(torch.empty(n, 3, dtype=dtype).t() for n in (24, 12, 12)),
            None,
            None,
            *(torch.empty(3, 2, 7, 6, dtype=dtype) for _ in range(2)),
        )
        position = torch.empty(1, dtype=torch.int64)
        turns = (torch.empty(1, 6), torch.empty(1, 6))
        q_BHd = rope_append(*new[:5], EPS, None, turns, position, *new[5:])
        y_BHd = cached_attention(q_BHd.permute(2, 1, 0).contiguous().permute(2, 1, 0), *new[5:], position, None)
    for result in (q_BHd, y_BHd):
        assert result.shape == (3, 4, 6) and result.dtype == dtype and result.is_contiguous()


@pytest.mark.gpu
@DTYPES
def test_one_graph_serves_every_position(dtype: torch.dtype, device: torch.device) -> None:
    """The position is read on the device: nothing waits, and a replay follows a new one."""
    attention, plain = (one_token("head", 0.7, 5, dtype=dtype, device=device) for _ in range(2))
    attention.fuses, plain.fuses = True, False
    cache, plain_cache = (empty_cache(3, 2, dtype, device) for _ in range(2))
    x_SB1D = torch.randn(9, 3, 1, 24, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    x_B1D, position_1, cos, sin = x_SB1D[0].clone(), at(0, device), *tables(0, 8, device)
    attention(x_B1D, cos, sin, cache, position_1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_B1D = attention(x_B1D, cos, sin, cache, position_1)
    for step, x in enumerate(x_SB1D):
        turns = tables(step, 8, device)
        for static, value in zip((x_B1D, cos, sin, position_1), (x, *turns, at(step, device)), strict=True):
            static.copy_(value)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager = attention(x_B1D, cos, sin, cache, position_1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph.replay()
        expected_B1D = plain(x, *turns, plain_cache, at(step, device))
        assert_same(y_B1D, expected_B1D)
        assert_same(eager, expected_B1D)


@pytest.mark.parametrize(
    "backend",
    [pytest.param("aot_eager", id="aot_eager"), pytest.param("inductor", id="inductor", marks=pytest.mark.gpu)],
)
def test_the_layer_compiles_as_one_graph(backend: str, device: torch.device) -> None:
    """The caches are written within it, and no position compiles anew."""
    attention, plain = (one_token("full", 0.7, None, device=device) for _ in range(2))
    attention.fuses, plain.fuses = True, False
    cache, plain_cache = (empty_cache(3, 2, torch.float32, device) for _ in range(2))
    x_SB1D = torch.randn(3, 3, 1, 24, generator=torch.Generator().manual_seed(1)).to(device)
    torch.compiler.reset()
    compiled = torch.compile(attention, backend=backend, fullgraph=True, dynamic=False)
    for step, x_B1D in enumerate(x_SB1D):
        turns, position_1 = tables(step, 8, device), at(step, device)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            y_B1D = compiled(x_B1D, *turns, cache, position_1)
        expected_B1D = plain(x_B1D, *turns, plain_cache, position_1)
        assert_same(y_B1D, expected_B1D)
    for fused, kept_plain in zip(cache.buffers(), plain_cache.buffers(), strict=True):
        assert_same(fused, kept_plain)


def launches() -> None:
    """Heads that share a key and such that do not, in bf16; sizes of 1, which Triton takes for constants."""
    for B, H, H_KV, norm in ((2, 6, 2, "head"), (1, 1, 1, "full")):
        new = new_token(B, H, H_KV, 8, norm, torch.bfloat16)
        q_BHd = new.append(0.7, 3)
        cached_attention(q_BHd, *new[5:], at(3, CPU), 1)
        sinks_H = torch.zeros(H, dtype=torch.bfloat16)
        cached_attention(new.append(None, 3, turn_first=True), *new[5:], at(3, CPU), None, 0.5, sinks_H)
    for S, H, H_KV, d in ((8, 8, 1, 128), (2, 4, 4, 128), (2, 8, 1, 512)):
        assert takes(S, H // H_KV, d)
        _, *caches = kept(2, H, H_KV, d, torch.bfloat16)
        cached_attention(torch.empty(2 * S, H, d, dtype=torch.bfloat16), *caches, torch.arange(S), None)


def more_launches() -> None:
    """Every norm and dtype, head_dim 6 and 128, several pieces, caches of one position."""
    for dtype in (torch.float16, torch.float32):
        for norm in ("none", "head", "full"):
            new_token(2, 16, 2, 128, norm, dtype).append(None, 3)
            new_token(1, 3, 1, 6, norm, dtype).append(None, 3)
        for H, H_KV, d in ((16, 2, 128), (4, 4, 64), (3, 1, 6), (16, 8, 256), (16, 2, 512)):
            cached_attention(*kept(2, H, H_KV, d, dtype), at(3, CPU), None)
    q_BHd, k_BHNd, v_BHNd = kept(1, 3, 1, 6)
    cached_attention(q_BHd, k_BHNd[:, :, :1], v_BHNd[:, :, :1], at(0, CPU), None)


@pytest.mark.parametrize(
    "launches", [pytest.param(launches, id="bf16"), pytest.param(more_launches, id="more", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu(launches: Callable[[], None], tmp_path: Path) -> None:
    """Which their interpreter does not ask."""
    assert_compiles(launches, tmp_path)
