"""Uniform numbers from an integer hash: the same on every device, in every process, for any chunking.

Element i of a stream is a function of (stream, i) alone. The mixing is the 32-bit finaliser with multipliers 0x21f0aaad
and 0x735a2d97 and shifts 16, 15, 15 (C. Wellons' hash-prospector, low bias), applied to i * odd + offset, where the
two 32-bit numbers identify the stream.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

CHUNK = 1 << 18  # elements at a time: the int32 and float32 scratch stay in a core's cache


def stream_of(*words: object) -> tuple[int, int]:
    """(odd multiplier, offset), both as signed 32-bit, identifying the stream named by `words`."""
    digest = hashlib.blake2b("\0".join(map(str, words)).encode(), digest_size=8).digest()
    multiplier, offset = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    return _signed(multiplier | 1), _signed(offset)


def of_layer(stream: tuple[int, int], layer: int) -> tuple[int, int]:
    """The stream of one layer; plain integers, which a compiled pass can follow."""
    return stream[0], _signed((stream[1] + layer * 0x9E3779B1) & 0xFFFFFFFF)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def hash_words(stream: tuple[int, int], start: int, count: int, device: torch.device) -> Tensor:
    """[count] int32 words of the stream from element `start` on; int32 arithmetic wraps."""
    assert start + count <= 1 << 31, "a stream has at most 2**31 elements"
    return _mixed(torch.arange(start, start + count, dtype=torch.int32, device=device), stream)


def _mixed(x: Tensor, stream: tuple[int, int]) -> Tensor:
    """The words of the int32 elements `x`, in place."""
    x.mul_(stream[0]).add_(stream[1])
    # >> keeps the sign: mask off what it shifted in.
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x21F0AAAD)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(0x735A2D97)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
    return x


def fill_uniform(out: Tensor, stream: tuple[int, int], bound: float, centre: float = 0.0) -> Tensor:
    """Fill `out` (contiguous, floating) with centre + uniform(-bound, bound), rounded from fp32 to its dtype.

    The top 24 bits of a word give (bits + 1/2) / 2^23 in (-1, 1), exactly in fp32; then one rounding for the bound.
    """
    flat = out.view(-1)
    for start in range(0, flat.numel(), CHUNK):
        count = min(CHUNK, flat.numel() - start)
        bits = hash_words(stream, start, count, out.device).bitwise_right_shift_(8)
        flat[start : start + count] = bits.float().add_(0.5).mul_(bound / 2**23).add_(centre)
    return out


def hash_integers(shape: tuple[int, ...], stream: tuple[int, int], below: int, device: torch.device) -> Tensor:
    """int64 numbers in [0, below) of the given shape."""
    count = int(torch.Size(shape).numel())
    words = hash_words(stream, 0, count, device).to(torch.int64).bitwise_and_(0xFFFFFFFF)
    return ((words * below) >> 32).view(shape)


def hash_scores(keys_T: Tensor, width: int, stream: tuple[int, int]) -> Tensor:
    """[T, width] float32 integers in [-2**23, 2**23), a function of (stream, key, column); keys below 2**31 / width."""
    columns_E = torch.arange(width, device=keys_T.device)
    words_TE = _mixed((keys_T.unsqueeze(1) * width + columns_E).to(torch.int32), stream)
    return words_TE.bitwise_right_shift_(8).float()
