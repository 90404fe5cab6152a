"""A cache that compares instead of keeping: what a run cached against what the reference computes."""

from __future__ import annotations

import math

from torch import Tensor

from moe_lab.models.kv_cache import KVCache, LayerCache


class _ComparedLayer(LayerCache):
    """Instead of keeping keys and values, compares them with those that are there."""

    def __init__(self, kept: LayerCache):
        super().__init__(kept.k_BHNd, kept.v_BHNd)
        self.error = 0.0
        """Of the worst token's keys or values, over all heads; infinite if anything is not finite."""

    def begin(self, k_BHSd: Tensor, v_BHSd: Tensor) -> None:
        """See `LayerCache.begin`."""
        for kept_BHNd, wanted_BHSd in ((self.k_BHNd, k_BHSd), (self.v_BHNd, v_BHSd)):
            off = (kept_BHNd[:, :, : wanted_BHSd.shape[2]].float() - wanted_BHSd).square().sum((1, 3))
            size = wanted_BHSd.square().sum((1, 3))
            error = float((off / size.clamp(min=1e-30)).max().sqrt()) if bool(off.isfinite().all()) else math.inf
            self.error = max(self.error, error)


class ComparedCache(KVCache):
    """Stands in for a cache in a cacheless pass of the reference, and is compared with what that computes."""

    def __init__(self, cache: KVCache):
        super().__init__(_ComparedLayer(layer) for layer in cache.layers if isinstance(layer, LayerCache))

    def error(self) -> float:
        """Of the worst layer."""
        return max((layer.error for layer in self.layers if isinstance(layer, _ComparedLayer)), default=0.0)
