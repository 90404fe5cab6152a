"""workload=random: token ids (or hidden states) drawn uniformly from the seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moe_lab.ops.hash_uniform import fill_uniform, hash_integers, stream_of


def random_input(
    *, model: nn.Module, batch: int, seq_len: int, seed: int, device: torch.device, dtype: torch.dtype, phase: str
) -> Tensor:
    """The model's input, the same for every router, device and (rounded) dtype.

    Returns:
        int64 token ids in [0, vocab_size), or hidden states of mean 0 and variance 1, of `model.input_shape`.
    """
    shape: tuple[int, ...] = model.input_shape(batch, seq_len)  # type: ignore[operator]
    stream = stream_of(seed, "workload", "random")
    if model.vocab_size is not None:
        return hash_integers(shape, stream, int(model.vocab_size), device)  # type: ignore[arg-type]
    return fill_uniform(torch.empty(shape, device=device, dtype=dtype), stream, math.sqrt(3))
