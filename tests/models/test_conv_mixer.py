"""models/conv_mixer.py: LFM2's short convolution, at once and token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_lab.models.conv_mixer import ConvMixer

D, WIDTH = 6, 3


def mixer(width: int = WIDTH, bias: bool = True) -> ConvMixer:
    made = ConvMixer(D, width=width, bias=bias)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def random(B: int, S: int) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(S))


NO_ANGLES = torch.empty(0)


def by_hand(made: ConvMixer, x_BSD: Tensor) -> Tensor:
    """The formula for one token and channel after the other, in float64."""
    linear = torch.nn.functional.linear
    into, out, conv = (
        [None if part.bias is None else part.bias.double(), part.weight.double()]
        for part in (made.into, made.out, made.conv)
    )
    y_BSD = torch.zeros_like(x_BSD, dtype=torch.float64)
    for b in range(len(x_BSD)):
        before, gate, u = linear(x_BSD[b].double(), into[1], into[0]).split(D, dim=1)
        inner, width = before * u, conv[1].shape[2]
        for t in range(len(inner)):
            mixed = sum(conv[1][:, 0, k] * inner[t - width + 1 + k] for k in range(width) if t - width + 1 + k >= 0)
            mixed = mixed if conv[0] is None else mixed + conv[0]
            y_BSD[b, t] = linear(gate[t] * mixed, out[1], out[0])
    return y_BSD


@pytest.mark.parametrize("bias", [pytest.param(True, id="bias"), pytest.param(False, id="plain")])
@pytest.mark.parametrize("width", [pytest.param(n, id=f"width={n}") for n in (1, 3, 9)])
@pytest.mark.parametrize("S", [pytest.param(S, id=f"S={S}") for S in (1, 2, 7)])
def test_it_is_the_formula(S: int, width: int, bias: bool) -> None:
    """Whatever is longer, the sequence or the convolution."""
    made, x_BSD = mixer(width, bias), random(2, S)
    torch.testing.assert_close(made(x_BSD, NO_ANGLES, NO_ANGLES).double(), by_hand(made, x_BSD), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context_len", [pytest.param(n, id=f"context={n}") for n in (1, 2, 5)])
@pytest.mark.parametrize("width", [pytest.param(n, id=f"width={n}") for n in (1, 3, 9)])
def test_token_by_token_it_is_the_same(width: int, context_len: int) -> None:
    """Also where a step is repeated."""
    made, x_BSD = mixer(width), random(2, 8)
    want = made(x_BSD, NO_ANGLES, NO_ANGLES)
    cache = made.make_cache(2, 8)
    first = made(x_BSD[:, :context_len], NO_ANGLES, NO_ANGLES, cache)
    torch.testing.assert_close(first, want[:, :context_len])
    for position in range(context_len, 8):
        for _ in range(2):
            step = made(x_BSD[:, position : position + 1], NO_ANGLES, NO_ANGLES, cache, torch.tensor([position]))
            torch.testing.assert_close(step, want[:, position : position + 1])


def test_its_state_does_not_grow_with_the_positions() -> None:
    """`width` - 1 tokens of each sequence, in the dtype of the parameters."""
    cache = mixer().to(torch.bfloat16).make_cache(5, 1000)
    assert (cache.position_bytes(), cache.state_bytes()) == (0, 5 * D * (WIDTH - 1) * 2)
