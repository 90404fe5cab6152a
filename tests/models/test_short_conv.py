"""models/short_conv.py: a causal convolution of each channel alone, and its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_lab.models.short_conv import ShortConv

B, C = 2, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv_of(width: int, *, bias: bool = False) -> ShortConv:
    conv = ShortConv(C, width, bias=bias).double()
    for seed, parameter in enumerate(conv.parameters(), 1):
        parameter.data.copy_(random(*parameter.shape, seed=seed))
    return conv


@pytest.mark.parametrize("bias", [pytest.param(False, id="without_bias"), pytest.param(True, id="with_bias")])
@pytest.mark.parametrize("width", [pytest.param(w, id=f"width{w}") for w in (1, 2, 4)])
@pytest.mark.parametrize("S", [pytest.param(s, id=f"s{s}") for s in (1, 3, 37)])
def test_a_token_is_the_sum_of_the_last_ones_by_the_formula(S: int, width: int, bias: bool) -> None:
    """Written out token by token and channel by channel."""
    conv, x = conv_of(width, bias=bias), random(B, S, C)
    y, state = conv(x)
    want = torch.zeros(B, S, C, dtype=torch.float64)
    for t in range(S):
        for k in range(width):
            if (source := t - width + 1 + k) >= 0:
                want[:, t] += conv.weight[:, 0, k] * x[:, source]
    torch.testing.assert_close(y, want + (conv.bias if bias else 0))
    padded = torch.cat((torch.zeros(B, width - 1, C, dtype=torch.float64), x), dim=1)
    assert state.shape == (B, *conv.state_shape) and torch.equal(state, padded[:, S:].transpose(1, 2))


@pytest.mark.parametrize("cuts", [pytest.param(c, id="_".join(map(str, c))) for c in ((1,), (2, 3), (6, 7, 8))])
def test_pieces_one_after_the_other_are_the_whole(cuts: tuple[int, ...]) -> None:
    """Each goes on from the state that the one before left; some are shorter than the convolution."""
    conv, x, state, parts = conv_of(4), random(B, 9, C), None, []
    whole, last = conv(x)
    for start, stop in zip((0, *cuts), (*cuts, 9), strict=True):
        y, state = conv(x[:, start:stop], state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert torch.equal(state, last)


def test_the_state_is_computed_in_the_dtype_of_the_tokens() -> None:
    """The reference reads in fp32 what a bf16 run has kept."""
    conv = conv_of(3).bfloat16()
    y, state = conv(random(1, 2, C).float(), random(1, C, 2).bfloat16())
    assert y.dtype == state.dtype == torch.float32
