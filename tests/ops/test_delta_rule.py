"""ops/delta_rule.py: token by token by the formula, the same chunk by chunk, and the op of an exported graph."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_lab.ops.delta_rule import CHUNK, chunked, outputs, recurrent

B, H, DK, DV = 2, 3, 5, 7
LENGTHS = (0, 1, 37, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 199)

lengths = pytest.mark.parametrize("S", [pytest.param(s, id=f"s{s}") for s in LENGTHS])


def drawn(S: int, seed: int = 0, dtype: torch.dtype = torch.float64, forgets: float = 1.0) -> tuple[Tensor, ...]:
    """q, k, v, g, beta and the state before; keys of length 1."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    k = random(B, H, S, DK)
    parts = (
        random(B, H, S, DK),
        k / k.norm(dim=3, keepdim=True).clamp(min=1e-9),
        random(B, H, S, DV),
        -forgets * random(B, H, S).abs(),
        random(B, H, S).sigmoid(),
        random(B, H, DK, DV),
    )
    return tuple(part.to(dtype) for part in parts)


@pytest.mark.parametrize("S", [pytest.param(s, id=f"s{s}") for s in (0, 1, 6)])
def test_the_recurrence_is_the_formula(S: int) -> None:
    """Written out by numbers, one head at a time."""
    q, k, v, g, beta, before = drawn(S)
    y, after = recurrent(q, k, v, g, beta, before)
    for b in range(B):
        for h in range(H):
            state = [[float(before[b, h, i, j]) for j in range(DV)] for i in range(DK)]
            for t in range(S):
                keep = math.exp(g[b, h, t])
                state = [[keep * value for value in row] for row in state]
                for j in range(DV):
                    read = sum(state[i][j] * float(k[b, h, t, i]) for i in range(DK))
                    new = float(beta[b, h, t]) * (float(v[b, h, t, j]) - read)
                    for i in range(DK):
                        state[i][j] += float(k[b, h, t, i]) * new
                    want = sum(state[i][j] * float(q[b, h, t, i]) for i in range(DK))
                    assert float(y[b, h, t, j]) == pytest.approx(want, abs=1e-12)
            torch.testing.assert_close(after[b, h], torch.tensor(state, dtype=torch.float64))


@lengths
@pytest.mark.parametrize("forgets", [pytest.param(f, id=f"forgets_{f:g}") for f in (0.0, 0.05, 1.0, 30.0)])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_chunks_give_what_the_recurrence_gives(S: int, forgets: float, seed: int) -> None:
    """In double precision, so that only the mathematics counts; a state that keeps all and one that keeps nothing."""
    parts = drawn(S, seed, forgets=forgets)
    for got, want in zip(chunked(*parts), recurrent(*parts), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [pytest.param(c, id=f"chunk{c}") for c in (1, 2, 7, 37, 50)])
def test_the_size_of_a_chunk_changes_nothing(chunk: int) -> None:
    """37 tokens: less than a chunk, a chunk, several and a rest."""
    parts = drawn(37, forgets=0.1)
    for got, want in zip(chunked(*parts, chunk=chunk), recurrent(*parts), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("S", [pytest.param(s, id=f"s{s}") for s in (CHUNK, 199)])
def test_in_single_precision_they_stay_near(S: int) -> None:
    """Also if all keys are one and nothing is forgotten, where a chunk's system is worst."""
    for same in (False, True):
        q, k, v, g, beta, state = drawn(S, forgets=0.0 if same else 0.1)
        if same:
            k, beta = k[:, :, :1].expand_as(k), torch.ones_like(beta)
        want = recurrent(q, k, v, g, beta, state)
        got = chunked(*(part.float() for part in (q, k, v, g, beta, state)))
        for part, exact in zip(got, want, strict=True):
            torch.testing.assert_close(part.double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cut", [pytest.param(c, id=f"cut{c}") for c in (1, 63, 64, 65, 100)])
def test_a_sequence_in_two_pieces_is_the_whole(cut: int) -> None:
    """The second goes on from the state that the first left; a single token by the recurrence, as in decoding."""
    q, k, v, g, beta, state = drawn(101, forgets=0.2)
    whole, last = chunked(q, k, v, g, beta, state)
    first, between = chunked(*(part[:, :, :cut] for part in (q, k, v, g, beta)), state)
    rest = [part[:, :, cut:] for part in (q, k, v, g, beta)]
    second, after = (recurrent if cut == 100 else chunked)(*rest, between)
    torch.testing.assert_close(torch.cat((first, second), dim=2), whole)
    torch.testing.assert_close(after, last)


def test_what_is_forgotten_at_once_overflows_nothing() -> None:
    """exp(c_i - c_j) of later tokens would be infinite, and infinity times 0 is NaN."""
    q, k, v, g, beta, state = drawn(70, dtype=torch.float32)
    y, after = chunked(q, k, v, g * 0 - 40, beta, state)
    assert bool(y.isfinite().all()) and bool(after.isfinite().all())
    torch.testing.assert_close(y, recurrent(q, k, v, g * 0 - 40, beta, state)[0])


@pytest.mark.parametrize("S", [pytest.param(s, id=f"s{s}") for s in (1, 5)])
def test_the_op_is_the_recurrence_from_nothing(S: int) -> None:
    """And passes opcheck."""
    *parts, state = drawn(S, dtype=torch.float32)
    assert torch.equal(outputs(*parts), recurrent(*parts, torch.zeros_like(state))[0])
    results = torch.library.opcheck(torch.ops.moe_lab.gated_delta_rule.default, tuple(parts))
    assert set(results.values()) == {"SUCCESS"}
