"""ops/latent_attention.py: its definition in float64, and what may be read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.ops.latent_attention import latent_attention, reference
from tests.ops.cases import DEVICE, DTYPES, normal
from tests.ops.compiling import assert_compiles


def at(position: int) -> Tensor:
    return torch.tensor([position], device=DEVICE)


def defined(q_BHm: Tensor, latent_BNm: Tensor, rank: int, position: int, scale: float) -> Tensor:
    seen = latent_BNm[:, : position + 1].double()
    return (q_BHm.double() @ seen.transpose(1, 2) * scale).softmax(2) @ seen[..., :rank]


def assert_defined(q: Tensor, latent: Tensor, rank: int, position: int, scale: float) -> None:
    """What lies behind the position is NaN and does not leak."""
    want = defined(q, latent, rank, position, scale)
    latent[:, position + 1 :] = math.nan
    y = latent_attention(q, latent, rank, at(position), scale)
    assert y.shape == want.shape and y.dtype == q.dtype and y.is_contiguous()
    tolerance = 1e-5 if q.dtype == torch.float32 else 8 * torch.finfo(q.dtype).eps
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.thinned(1)
@DTYPES
@pytest.mark.parametrize(
    ("B", "H", "rank", "rope", "N"),
    [
        pytest.param(1, 3, 9, 6, 37, id="odd"),
        pytest.param(3, 16, 32, 8, 65, id="two pieces"),
        pytest.param(2, 70, 24, 4, 20, id="two blocks of heads"),
        pytest.param(1, 1, 1, 2, 1, id="least"),
        pytest.param(1, 16, 512, 64, 70, id="deepseek"),
    ],
)
@pytest.mark.parametrize(
    "where", [pytest.param(0, id="first"), pytest.param(0.5, id="middle"), pytest.param(1, id="last")]
)
def test_it_is_its_definition(B: int, H: int, rank: int, rope: int, N: int, where: float, dtype: torch.dtype) -> None:
    """At the first, a middle and the last position."""
    q, latent = normal(B, H, rank + rope, dtype=dtype), normal(B, N, rank + rope, dtype=dtype)
    assert_defined(q, latent, rank, round(where * (N - 1)), (rank + rope) ** -0.5)


@pytest.mark.slow
def test_more_positions_than_a_piece_of_a_block() -> None:
    """64 pieces of two blocks each, the last one cut, most of them behind the position or not."""
    q, latent = normal(2, 3, 7), normal(2, 64 * 16 + 5, 7)
    for position in (3, 700, 64 * 16 + 4):
        assert_defined(q, latent.clone(), 5, position, 0.4)


@settings(deadline=None, max_examples=8)
@given(st.data(), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 70))
def test_any_sizes(data: st.DataObject, B: int, H: int, rank: int, N: int) -> None:
    position = data.draw(st.integers(0, N - 1))
    assert_defined(normal(B, H, rank + 4), normal(B, N, rank + 4), rank, position, 0.3)


@given(st.integers(0, 2000), st.integers(1, 10**6), st.sampled_from([16, 32]))
def test_pieces_fill_a_gpu_and_no_more(n_blocks: int, N: int, block_n: int) -> None:
    """What the pieces write and read again does not grow with the batch and the heads beyond that."""
    from moe_lab.ops.latent_attention_triton import keys_of_a_piece

    keys = keys_of_a_piece(n_blocks, N, block_n)
    n_pieces = -(-N // keys)
    assert keys % block_n == 0 and keys >= 2 * block_n
    assert n_pieces <= 64 and n_blocks * n_pieces <= max(n_blocks, 512)
    if n_pieces > 1 and keys > 2 * block_n:  # a piece more would be one too many, or positions do not divide
        assert -(-N // (keys - block_n)) > min(64, max(512 // max(n_blocks, 1), 1))


@pytest.mark.slow
def test_many_sequences_are_each_one_piece() -> None:
    """Of more positions than a piece has otherwise."""
    from moe_lab.ops.latent_attention_triton import keys_of_a_piece

    assert keys_of_a_piece(257, 40, 16) > 40
    assert_defined(normal(257, 1, 7), normal(257, 40, 7), 5, 39, 0.4)


def test_a_part_of_a_larger_cache_is_read() -> None:
    """Some of the sequences, as `KVCache.rows` gives them, and queries whose heads do not lie together."""
    cache = normal(5, 1, 9, 12)
    q = normal(3, 12, 2).permute(2, 0, 1)
    y = latent_attention(q, cache[1:3, 0], 8, at(6), 0.5)
    torch.testing.assert_close(y.double(), defined(q, cache[1:3, 0], 8, 6, 0.5), rtol=1e-5, atol=1e-5)


def test_huge_scores_do_not_overflow_and_nan_stays_in_its_sequence() -> None:
    q, latent = normal(2, 3, 12) * 1e4, normal(2, 40, 12)
    latent[1, 3] = math.nan
    y = latent_attention(q, latent, 8, at(30), 1.0)
    torch.testing.assert_close(y[:1].double(), defined(q[:1], latent[:1], 8, 30, 1.0), rtol=1e-4, atol=1e-4)
    assert y[1].isnan().all()


def test_the_reference_is_the_same() -> None:
    q, latent = normal(2, 3, 12), normal(2, 40, 12)
    torch.testing.assert_close(
        reference(q, latent, 8, at(30), 0.5), latent_attention(q, latent, 8, at(30), 0.5), rtol=1e-5, atol=1e-5
    )


def test_the_op_passes_opcheck() -> None:
    arguments = (normal(2, 3, 12), normal(2, 9, 12), 8, at(4), 0.5)
    results = torch.library.opcheck(torch.ops.moe_lab.latent_attention.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def launches() -> None:
    """Every dtype, DeepSeek's sizes and small ones."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for H, rank, rope in ((16, 512, 64), (128, 512, 64), (3, 9, 6)):
            q, latent = torch.empty(2, H, rank + rope, dtype=dtype), torch.empty(2, 300, rank + rope, dtype=dtype)
            latent_attention(q, latent, rank, torch.zeros(1, dtype=torch.int64), 0.5)


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    assert_compiles(launches, tmp_path)
