"""Keys and values of the tokens so far, in memory that is allocated once."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class LayerCache(nn.Module):
    """Of one layer: keys and values [B, Hkv, N, head_dim] for N positions."""

    k_BHNd: Tensor
    v_BHNd: Tensor

    def __init__(self, k_BHNd: Tensor, v_BHNd: Tensor):
        super().__init__()
        self.register_buffer("k_BHNd", k_BHNd, persistent=False)
        self.register_buffer("v_BHNd", v_BHNd, persistent=False)

    def begin(self, k_BHSd: Tensor, v_BHSd: Tensor) -> None:
        """Keep the first S positions."""
        S = k_BHSd.shape[2]
        self.k_BHNd[:, :, :S] = k_BHSd
        self.v_BHNd[:, :, :S] = v_BHSd

    def put(self, k_BHSd: Tensor, v_BHSd: Tensor, position_S: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what belongs to these positions, by a tensor on the device: nothing is read on the host.

        Returns:
            The keys and values of all N positions, in the dtype of the arguments.
        """
        self.k_BHNd.index_copy_(2, position_S, k_BHSd.to(self.k_BHNd.dtype))
        self.v_BHNd.index_copy_(2, position_S, v_BHSd.to(self.v_BHNd.dtype))
        return self.k_BHNd.to(k_BHSd.dtype), self.v_BHNd.to(v_BHSd.dtype)

    def rows(self, start: int, stop: int) -> LayerCache:
        """See `KVCache.rows`."""
        return LayerCache(self.k_BHNd[start:stop], self.v_BHNd[start:stop])


class LatentCache(LayerCache):
    """Of multi-head latent attention: one key [B, 1, N, rank + rope] for all heads, whose first `rank` are the value.

    So a position takes the latent and its turned key, and neither keys nor values of heads.
    """

    def __init__(self, k_BHNd: Tensor, rank: int):
        nn.Module.__init__(self)
        self.rank = rank
        self.register_buffer("k_BHNd", k_BHNd, persistent=False)

    @property
    def v_BHNd(self) -> Tensor:  # type: ignore[override]  # noqa: N802 -- as the buffer of the base class
        return self.k_BHNd[..., : self.rank]

    def begin(self, k_BHSd: Tensor, v_BHSd: Tensor) -> None:
        """See `LayerCache.begin`; the value is part of the key."""
        self.k_BHNd[:, :, : k_BHSd.shape[2]] = k_BHSd

    def put(self, k_BHSd: Tensor, v_BHSd: Tensor, position_S: Tensor) -> tuple[Tensor, Tensor]:
        """See `LayerCache.put`."""
        self.k_BHNd.index_copy_(2, position_S, k_BHSd.to(self.k_BHNd.dtype))
        k_BHNd = self.k_BHNd.to(k_BHSd.dtype)
        return k_BHNd, k_BHNd[..., : self.rank]

    def rows(self, start: int, stop: int) -> LatentCache:
        """See `KVCache.rows`."""
        return LatentCache(self.k_BHNd[start:stop], self.rank)


class KVCache(nn.Module):
    """One `LayerCache` per layer."""

    def __init__(self, layers: Iterable[LayerCache]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def length(self) -> int:
        """N, for how many positions there is room."""
        return int(self._layers[0].k_BHNd.shape[2])

    @property
    def bytes_per_position(self) -> int:
        """Of one position of every sequence, in all layers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers()) // self.length

    def rows(self, start: int, stop: int) -> KVCache:
        """The part that belongs to some of the sequences; it shares the memory."""
        return KVCache(layer.rows(start, stop) for layer in self._layers)

    @property
    def _layers(self) -> list[LayerCache]:
        return [layer for layer in self.layers if isinstance(layer, LayerCache)]
