"""hash_uniform against an independent implementation of the documented mixing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.ops import hash_uniform as module
from moe_lab.ops.hash_uniform import fill_uniform, hash_integers, hash_words, stream_of

CPU = torch.device("cpu")
MANY = 200_003

STREAMS = pytest.mark.parametrize(
    "stream",
    [
        pytest.param((1, 0), id="identity"),
        pytest.param((-1, -(1 << 31)), id="largest words"),
        pytest.param(stream_of(0, "layers.0.w_down_EDF", 3), id="a parameter"),
    ],
)


def words(stream: tuple[int, int], start: int, count: int) -> np.ndarray:
    """The documented mixing in uint64, cut to 32 bits after every step."""
    mask = np.uint64(0xFFFFFFFF)
    multiplier, offset = (np.uint64(word % (1 << 32)) for word in stream)
    x = np.arange(start, start + count, dtype=np.uint64)
    x = (x * multiplier + offset) & mask
    x ^= x >> np.uint64(16)
    x = x * np.uint64(0x21F0AAAD) & mask
    x ^= x >> np.uint64(15)
    x = x * np.uint64(0x735A2D97) & mask
    x ^= x >> np.uint64(15)
    return x


def uniform(stream: tuple[int, int], count: int, bound: float, centre: float = 0.0) -> np.ndarray:
    """The documented map from words to numbers: the signed top 24 bits, in float32."""
    bits = words(stream, 0, count).astype(np.uint32).view(np.int32) >> 8
    return (bits.astype(np.float32) + np.float32(0.5)) * np.float32(bound / 2**23) + np.float32(centre)


def filled(
    shape: int | tuple[int, ...], stream: tuple[int, int], bound: float = 1.0, centre: float = 0.0,
    dtype: torch.dtype = torch.float32, device: torch.device = CPU,
) -> torch.Tensor:  # fmt: skip
    """A new tensor, filled."""
    return fill_uniform(
        torch.full((shape,) if isinstance(shape, int) else shape, torch.nan, dtype=dtype, device=device),
        stream,
        bound,
        centre,
    )


@STREAMS
@pytest.mark.parametrize(
    ("start", "count"),
    [
        pytest.param(0, 1, id="first"),
        pytest.param(0, 1999, id="from the start"),
        pytest.param(262_143, 37, id="across a chunk"),
        pytest.param((1 << 31) - 5, 5, id="the last"),
        pytest.param(7, 0, id="none"),
    ],
)
def test_words_are_the_documented_mixing(stream: tuple[int, int], start: int, count: int) -> None:
    """int32 arithmetic that wraps gives the bits that unsigned arithmetic gives."""
    found = hash_words(stream, start, count, CPU)
    assert found.dtype == torch.int32
    np.testing.assert_array_equal(found.numpy().view(np.uint32), words(stream, start, count))


@settings(max_examples=50, deadline=None, database=None)
@given(
    multiplier=st.integers(-(1 << 30), (1 << 30) - 1).map(lambda half: 2 * half + 1),
    offset=st.integers(-(1 << 31), (1 << 31) - 1),
    start=st.integers(0, (1 << 31) - 9),
)
def test_words_are_the_documented_mixing_for_any_stream(multiplier: int, offset: int, start: int) -> None:
    """Any odd multiplier, any offset, any place in the stream."""
    found = hash_words((multiplier, offset), start, 9, CPU).numpy().view(np.uint32)
    np.testing.assert_array_equal(found, words((multiplier, offset), start, 9))


def test_a_stream_ends_at_two_to_the_31() -> None:
    """Past its last element a stream refuses rather than repeats."""
    with pytest.raises(AssertionError, match="2\\*\\*31"):
        hash_words((1, 0), (1 << 31) - 5, 6, CPU)


def test_words_of_a_stream_do_not_repeat() -> None:
    """The mixing is a bijection: all words of a stream differ."""
    assert hash_words(stream_of("any"), 0, MANY, CPU).unique().numel() == MANY


@pytest.mark.parametrize(
    ("bound", "centre"),
    [
        pytest.param(1.0, 0.0, id="unit"),
        pytest.param(0.02, 0.0, id="small"),
        pytest.param(0.1, 1.0, id="around one"),
        pytest.param(3.0, -0.7, id="wide"),
    ],
)
def test_numbers_are_the_documented_map_of_the_words(bound: float, centre: float) -> None:
    """The values are bitwise those of numpy in float32."""
    stream = stream_of(1, "w")
    np.testing.assert_array_equal(filled(1999, stream, bound, centre).numpy(), uniform(stream, 1999, bound, centre))


def test_the_first_numbers_of_a_stream_never_change() -> None:
    """The same in every process and version: results and checkpoints of numbers depend on it."""
    assert stream_of(0, "layers.0.w", 3) == (-15123571, 1298853039)
    assert hash_words(stream_of(0, "layers.0.w", 3), 0, 4, CPU).tolist() == [
        -1024208453,
        -1055190015,
        1833223020,
        351564622,
    ]


@pytest.mark.parametrize(
    "chunk",
    [pytest.param(1, id="1"), pytest.param(7, id="7"), pytest.param(500, id="500"), pytest.param(501, id="501")],
)
@pytest.mark.parametrize(
    "shape", [pytest.param((0, 7), id="empty"), pytest.param((5, 12, 8), id="480"), pytest.param((501,), id="501")]
)
def test_chunking_does_not_matter(chunk: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many elements are computed at a time, element i is the same, and the shape only arranges them."""
    whole = filled(shape, stream_of("w"), 0.3, 0.1)
    monkeypatch.setattr(module, "CHUNK", chunk)
    in_chunks = filled(shape, stream_of("w"), 0.3, 0.1)
    assert torch.equal(whole, in_chunks)
    assert torch.equal(in_chunks.view(-1), filled(whole.numel(), stream_of("w"), 0.3, 0.1))


def test_a_longer_stream_begins_with_the_shorter() -> None:
    """Element i depends on the stream and i, not on how many there are."""
    assert torch.equal(filled(1999, stream_of("w"))[:37], filled(37, stream_of("w")))


def test_numbers_fill_their_range_evenly() -> None:
    """Within the bound, mean 0, variance bound^2 / 3, sixteen bins equally full: each within five standard errors."""
    x = filled(MANY, stream_of(5, "x"), 0.25).double()
    assert 0.2499 < float(x.max()) <= 0.25 and -0.25 <= float(x.min()) < -0.2499
    assert abs(float(x.mean())) < 5 * 0.25 / (3 * MANY) ** 0.5
    assert float(x.var()) == pytest.approx(0.25**2 / 3, rel=0.01)
    bins = torch.histc(x, 16, -0.25, 0.25)
    assert float((bins - MANY / 16).abs().max()) < 5 * (MANY / 16) ** 0.5


@pytest.mark.parametrize("centre", [pytest.param(1.0, id="1"), pytest.param(-3.5, id="-3.5")])
def test_the_centre_moves_the_mean(centre: float) -> None:
    """All numbers lie within the bound of the centre, on both sides alike."""
    x = filled(MANY, stream_of("x"), 0.5, centre).double()
    assert float((x - centre).abs().max()) <= 0.5
    assert float(x.mean()) == pytest.approx(centre, abs=5 * 0.5 / (3 * MANY) ** 0.5)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param((0, "w", 0), (0, "w", 1), id="next expert"),
        pytest.param((0, "w", 0), (1, "w", 0), id="next seed"),
        pytest.param((0, "layers.1.w"), (0, "layers.11.w"), id="another name"),
        pytest.param((0, "w", 12), (0, "w1", 2), id="words joined otherwise"),
    ],
)
def test_different_streams_are_uncorrelated(first: tuple[object, ...], second: tuple[object, ...]) -> None:
    """The correlation of two streams, also with the second shifted by one, is within five standard errors of 0."""
    assert stream_of(*first) != stream_of(*second)
    x, y = filled(MANY, stream_of(*first)).double(), filled(MANY, stream_of(*second)).double()
    for left, right in [(x, y), (x[1:], y[:-1]), (x[:-1], y[1:]), (x[1:], x[:-1])]:
        correlation = float(torch.corrcoef(torch.stack([left, right]))[0, 1])
        assert abs(correlation) < 5 / MANY**0.5


@settings(max_examples=50, deadline=None, database=None)
@given(name=st.lists(st.one_of(st.integers(), st.text(max_size=9)), max_size=3))
def test_a_stream_is_two_signed_words_the_first_odd(name: list[object]) -> None:
    """Naming a stream twice gives the same pair; the multiplier is odd, so no two elements share a word."""
    multiplier, offset = stream_of(*name)
    assert (multiplier, offset) == stream_of(*name)
    assert multiplier % 2 == 1
    assert all(-(1 << 31) <= word < 1 << 31 for word in (multiplier, offset))


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.bfloat16, id="bf16"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.float64, id="fp64"),
    ],
)
def test_another_dtype_is_float32_rounded(dtype: torch.dtype) -> None:
    """A model has the same parameters in every dtype, up to one rounding."""
    stream = stream_of("w")
    assert torch.equal(filled(1999, stream, 0.3, 0.1, dtype), filled(1999, stream, 0.3, 0.1).to(dtype))


@pytest.mark.parametrize(
    "below",
    [
        pytest.param(1, id="1"),
        pytest.param(7, id="7"),
        pytest.param(50_257, id="a vocabulary"),
        pytest.param(1 << 31, id="2**31"),
    ],
)
def test_integers_are_the_high_part_of_a_product(below: int) -> None:
    """int64 numbers in [0, below), equal to the words scaled in exact arithmetic."""
    stream = stream_of("tokens")
    found = hash_integers((37, 54), stream, below, CPU)
    expected = [int(word) * below >> 32 for word in words(stream, 0, 37 * 54)]
    assert found.dtype == torch.int64 and found.shape == (37, 54)
    assert found.view(-1).tolist() == expected
    assert int(found.min()) >= 0 and int(found.max()) < below


def test_integers_are_even() -> None:
    """Each of seven values is hit a seventh of the time, within five standard errors."""
    counts = hash_integers((MANY,), stream_of("tokens"), 7, CPU).bincount(minlength=7).double()
    assert float((counts - MANY / 7).abs().max()) < 5 * (MANY / 7) ** 0.5


@pytest.mark.parametrize("shape", [pytest.param((0,), id="1-D"), pytest.param((3, 0), id="2-D")])
def test_no_integers_have_a_shape_too(shape: tuple[int, ...]) -> None:
    """An empty shape gives an empty tensor."""
    assert hash_integers(shape, stream_of("tokens"), 7, CPU).shape == shape


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, id="bf16"),
    ],
)
def test_cuda_equals_the_cpu_bit_for_bit(dtype: torch.dtype, device: torch.device) -> None:
    """The same model and the same tokens on every device."""
    stream = stream_of("w")
    on_cpu, on_device = (filled(MANY * 2, stream, 0.3, 0.1, dtype, where) for where in (CPU, device))
    assert torch.equal(on_device.cpu(), on_cpu)
    assert torch.equal(
        hash_integers((MANY,), stream, 50_257, device).cpu(), hash_integers((MANY,), stream, 50_257, CPU)
    )
