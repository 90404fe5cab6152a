"""A cache that compares instead of keeping: what a run cached against what the reference computes."""

from __future__ import annotations

import math

from torch import Tensor

from moe_lab.models.kv_cache import KVCache, LayerCache, StateCache


class _ComparedLayer(LayerCache):
    """Instead of keeping keys and values, compares them with those that are there."""

    def __init__(self, kept: LayerCache):
        super().__init__(kept.k_BHNd, kept.v_BHNd)
        self.error = 0.0
        """Of the worst token's keys or values, over all heads; infinite if anything is not finite."""

    def begin(self, k_BHSd: Tensor, v_BHSd: Tensor) -> tuple[Tensor, Tensor]:
        """See `LayerCache.begin`."""
        for kept_BHNd, wanted_BHSd in ((self.k_BHNd, k_BHSd), (self.v_BHNd, v_BHSd)):
            off = (kept_BHNd[:, :, : wanted_BHSd.shape[2]].float() - wanted_BHSd).square().sum((1, 3))
            size = wanted_BHSd.square().sum((1, 3))
            self.error = max(self.error, _worst(off, size))
        return k_BHSd, v_BHSd


class _ComparedStates(StateCache):
    """Instead of keeping states, compares them with those that are there."""

    def __init__(self, kept: StateCache):
        super().__init__(*kept.states, first_1=kept.first_1)
        self.error = 0.0
        """Of the worst sequence's state; infinite if anything is not finite."""

    def begin(self, n_positions: int, *after: Tensor) -> None:
        """See `StateCache.begin`."""
        for kept, wanted in zip(self.states, after, strict=True):
            off = kept[(n_positions - 1) % 2].float() - wanted
            self.error = max(self.error, _worst(off.flatten(1).square().sum(1), wanted.flatten(1).square().sum(1)))


def _worst(off: Tensor, size: Tensor) -> float:
    """The largest relative error, from squares; infinite if anything is not finite."""
    return float((off / size.clamp(min=1e-30)).max().sqrt()) if bool(off.isfinite().all()) else math.inf


class ComparedCache(KVCache):
    """Stands in for a cache in a cacheless pass of the reference, and is compared with what that computes."""

    def __init__(self, cache: KVCache):
        layers: list[_ComparedLayer | _ComparedStates] = []
        for layer in cache.layers:
            if isinstance(layer, LayerCache):
                layers.append(_ComparedLayer(layer))
            else:
                assert isinstance(layer, StateCache)
                layers.append(_ComparedStates(layer))
        super().__init__(layers, cache.length)

    def error(self) -> float:
        """Of the worst layer."""
        return max(
            (layer.error for layer in self.layers if isinstance(layer, _ComparedLayer | _ComparedStates)), default=0.0
        )
