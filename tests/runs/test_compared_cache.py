"""runs/compared_cache.py: instead of keeping keys and values, it says how far those that are there are off."""

from __future__ import annotations

import math

import pytest
import torch

from moe_lab.models.kv_cache import KVCache, LayerCache, StateCache
from moe_lab.runs.compared_cache import ComparedCache


def filled(n_layers: int = 2) -> KVCache:
    """B = 2 sequences, 3 heads of width 4, 5 positions."""
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(n_layers, 2, 2, 3, 5, 4, generator=generator)
    return KVCache((LayerCache(keys, values) for keys, values in tensors), 5)


def compared(kept: KVCache, wanted: KVCache, positions: int = 5) -> ComparedCache:
    """The cache after a pass that computes `wanted` in the first positions."""
    cache = ComparedCache(kept)
    for layer, other in zip(cache.layers, wanted.layers, strict=True):
        layer.begin(other.k_BHNd[:, :, :positions], other.v_BHNd[:, :, :positions])
    return cache


def test_equal_caches_have_no_error() -> None:
    """Before anything is compared, too."""
    assert ComparedCache(filled()).error() == compared(filled(), filled()).error() == 0.0


@pytest.mark.parametrize("part", ["k_BHNd", "v_BHNd"])
def test_the_error_is_that_of_the_worst_token(part: str) -> None:
    """Over all heads of one token, as a share of what it should be; other tokens are not averaged in."""
    kept, wanted = filled(), filled()
    getattr(kept.layers[1], part)[1, :, 3] *= 1.25
    getattr(kept.layers[0], part)[0, :, 2] *= 1.125
    assert compared(kept, wanted).error() == pytest.approx(0.25, rel=1e-5)


def test_positions_behind_those_computed_are_not_looked_at() -> None:
    """They hold nothing yet."""
    kept = filled()
    kept.layers[0].k_BHNd[:, :, 3:] = math.nan
    assert compared(kept, filled(), positions=3).error() == 0.0
    assert compared(kept, filled(), positions=4).error() == math.inf


def test_what_was_kept_is_not_changed() -> None:
    """Only compared."""
    kept, other = filled(), filled()
    for layer in other.layers:
        layer.k_BHNd.mul_(2)
    assert compared(kept, other).error() == pytest.approx(0.5)
    assert all(torch.equal(layer.k_BHNd, same.k_BHNd) for layer, same in zip(kept.layers, filled().layers, strict=True))


@pytest.mark.parametrize("steps", [pytest.param(s, id=f"{s}_steps") for s in (0, 1, 2)])
@pytest.mark.parametrize("wrong", [pytest.param(0, id="first_state"), pytest.param(1, id="second_state")])
def test_the_last_state_is_compared_by_sequence(wrong: int, steps: int) -> None:
    """After a context of 3 positions, or after steps behind it; one wrong sequence is not averaged in."""
    generator = torch.Generator().manual_seed(1)
    wanted = [torch.randn(2, 3, generator=generator), torch.randn(2, 2, 3, generator=generator)]
    found = [state.clone() for state in wanted]
    found[wrong][1] *= 1.25
    kept = StateCache.zeros(2, (((3,), torch.float32), ((2, 3), torch.float32)), torch.device("cpu"))
    kept.begin(3, *(wanted if steps else found))
    for position in range(3, 3 + steps):
        kept.put(torch.tensor([position]), *found)
    cache = ComparedCache(KVCache([kept], 3 + steps))
    cache.layers[0].begin(3 + steps, *wanted)
    assert cache.error() == pytest.approx(0.25, rel=1e-5)
    cache.layers[0].begin(3 + steps, wanted[0] * math.nan, wanted[1])
    assert cache.error() == math.inf
