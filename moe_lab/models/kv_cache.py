"""What the layers keep of the tokens so far, in memory that is allocated once.

Attention keeps something of each position: keys and values (`LayerCache`), or latents (`LatentCache`). A convolution
and a recurrence keep a state of fixed size (`StateCache`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LayerMemory(nn.Module):
    """What one layer keeps; `start`: see `KVCache.behind`."""

    def __init__(self, start: int = 0):
        super().__init__()
        self.start = start

    def behind(self, start: int) -> LayerMemory:
        """See `KVCache.behind`."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> LayerMemory:
        """See `KVCache.rows`."""
        raise NotImplementedError

    def position_bytes(self) -> int:
        """What is kept of each position, for all positions together."""
        return 0

    def state_bytes(self) -> int:
        """What is kept of all positions together."""
        return 0


class LayerCache(LayerMemory):
    """Of attention: keys and values [B, Hkv, N, head_dim] for N positions."""

    k_BHNd: Tensor
    v_BHNd: Tensor

    def __init__(self, k_BHNd: Tensor, v_BHNd: Tensor, start: int = 0):
        super().__init__(start)
        self.register_buffer("k_BHNd", k_BHNd, persistent=False)
        self.register_buffer("v_BHNd", v_BHNd, persistent=False)

    def begin(self, k_BHSd: Tensor, v_BHSd: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the S positions from `start` on.

        Returns:
            The keys and values of all positions so far, in the dtype of the arguments.
        """
        stop = self.start + k_BHSd.shape[2]
        self._keep(k_BHSd, v_BHSd, stop)
        if self.start == 0:
            return k_BHSd, v_BHSd
        return self.k_BHNd[:, :, :stop].to(k_BHSd.dtype), self.v_BHNd[:, :, :stop].to(v_BHSd.dtype)

    def _keep(self, k_BHSd: Tensor, v_BHSd: Tensor, stop: int) -> None:
        self.k_BHNd[:, :, self.start : stop] = k_BHSd
        self.v_BHNd[:, :, self.start : stop] = v_BHSd

    def put(self, k_BHSd: Tensor, v_BHSd: Tensor, position_S: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what belongs to these positions, by a tensor on the device: nothing is read on the host.

        Returns:
            The keys and values of all N positions, in the dtype of the arguments.
        """
        k_BHNd, v_BHNd, dtype = self.k_BHNd, self.v_BHNd, k_BHSd.dtype
        if dtype == k_BHNd.dtype:  # `to` would do nothing, and take half as long as a copy
            return k_BHNd.index_copy_(2, position_S, k_BHSd), v_BHNd.index_copy_(2, position_S, v_BHSd)
        k_BHNd.index_copy_(2, position_S, k_BHSd.to(k_BHNd.dtype))
        v_BHNd.index_copy_(2, position_S, v_BHSd.to(v_BHNd.dtype))
        return k_BHNd.to(dtype), v_BHNd.to(dtype)

    def rows(self, start: int, stop: int) -> LayerCache:
        """See `KVCache.rows`."""
        return LayerCache(self.k_BHNd[start:stop], self.v_BHNd[start:stop], self.start)

    def behind(self, start: int) -> LayerCache:
        """See `KVCache.behind`."""
        return LayerCache(self.k_BHNd, self.v_BHNd, start)

    def position_bytes(self) -> int:
        """See `LayerMemory`."""
        return _bytes(self.buffers())


class LatentCache(LayerCache):
    """Of multi-head latent attention: one key [B, 1, N, rank + rope] for all heads, whose first `rank` are the value.

    So a position takes the latent and its turned key, and neither keys nor values of heads.
    """

    def __init__(self, k_BHNd: Tensor, rank: int, start: int = 0):
        LayerMemory.__init__(self, start)
        self.rank = rank
        self.register_buffer("k_BHNd", k_BHNd, persistent=False)

    @property
    def v_BHNd(self) -> Tensor:  # type: ignore[override]  # noqa: N802 -- as the buffer of the base class
        return self.k_BHNd[..., : self.rank]

    def _keep(self, k_BHSd: Tensor, v_BHSd: Tensor, stop: int) -> None:  # the value is part of the key
        self.k_BHNd[:, :, self.start : stop] = k_BHSd

    def put(self, k_BHSd: Tensor, v_BHSd: Tensor, position_S: Tensor) -> tuple[Tensor, Tensor]:
        """See `LayerCache.put`."""
        self.k_BHNd.index_copy_(2, position_S, k_BHSd.to(self.k_BHNd.dtype))
        k_BHNd = self.k_BHNd.to(k_BHSd.dtype)
        return k_BHNd, k_BHNd[..., : self.rank]

    def rows(self, start: int, stop: int) -> LatentCache:
        """See `KVCache.rows`."""
        return LatentCache(self.k_BHNd[start:stop], self.rank, self.start)

    def behind(self, start: int) -> LatentCache:
        """See `KVCache.behind`."""
        return LatentCache(self.k_BHNd, self.rank, start)


class StateCache(LayerMemory):
    """Of a convolution or a recurrence: states [B, ...] of fixed size, each as it is after a position.

    A step at position p reads the state after p - 1 and writes the one after p, each in a place of its own, so that it
    may be repeated: the states after p and p - 1 have the places p % 2 and (p - 1) % 2. What follows the first
    positions (`begin`) is also kept in a third place, which the step behind them reads, so that one can go back there.
    Other than that, steps must be taken in the order of their positions.
    """

    first_1: Tensor

    def __init__(self, *states: Tensor, first_1: Tensor | None = None, start: int = 0):
        """`states`: [3, B, ...], zeros; `first_1`: see `rows`."""
        super().__init__(start)
        self.n_states = len(states)
        for i, state in enumerate(states):
            self.register_buffer(f"state_{i}", state, persistent=False)
        if first_1 is None:
            first_1 = torch.zeros(1, dtype=torch.int64, device=states[0].device)
        self.register_buffer("first_1", first_1, persistent=False)  # the position behind those of `begin`

    @classmethod
    def zeros(
        cls, batch: int, shapes: Iterable[tuple[tuple[int, ...], torch.dtype]], device: torch.device
    ) -> StateCache:
        """Of states with these shapes and dtypes, of each sequence."""
        return cls(*(torch.zeros(3, batch, *shape, dtype=dtype, device=device) for shape, dtype in shapes))

    @property
    def states(self) -> list[Tensor]:
        return [self.get_buffer(f"state_{i}") for i in range(self.n_states)]

    def begin(self, n_positions: int, *after: Tensor) -> None:
        """Keep the states after the first `n_positions`."""
        for kept, new in zip(self.states, after, strict=True):
            kept[(n_positions - 1) % 2] = new
            kept[2] = new
        self.first_1.fill_(n_positions)

    def before(self, position_S: Tensor | None) -> list[Tensor]:
        """The states before the first of these positions, by a tensor on the device: nothing is read on the host.

        Without it those that `begin` kept last.
        """
        if position_S is None:
            return [kept[2] for kept in self.states]
        position_1 = position_S[:1]
        place_1 = torch.where(position_1 == self.first_1, 2, (position_1 - 1) % 2)
        return [kept.index_select(0, place_1).squeeze(0) for kept in self.states]

    def put(self, position_S: Tensor, *after: Tensor) -> None:
        """Keep the states after the last of these positions."""
        place_1 = position_S[-1:] % 2
        for kept, new in zip(self.states, after, strict=True):
            kept.index_copy_(0, place_1, new.to(kept.dtype).unsqueeze(0))

    def keep(self, n_positions: int, position_S: Tensor | None, *after: Tensor) -> None:
        """`put` what is after these `n_positions`, or without `position_S` `begin`."""
        if position_S is None:
            self.begin(self.start + n_positions, *after)
        else:
            self.put(position_S, *after)

    def rows(self, start: int, stop: int) -> StateCache:
        """See `KVCache.rows`."""
        return StateCache(*(kept[:, start:stop] for kept in self.states), first_1=self.first_1, start=self.start)

    def behind(self, start: int) -> StateCache:
        """See `KVCache.behind`."""
        return StateCache(*self.states, first_1=self.first_1, start=start)

    def state_bytes(self) -> int:
        """See `LayerMemory`; of one of the three places."""
        return _bytes(self.states) // 3


class KVCache(nn.Module):
    """One `LayerMemory` per layer, with room for `length` positions; `start`: see `behind`."""

    def __init__(self, layers: Iterable[LayerMemory], length: int, start: int = 0):
        super().__init__()
        self.layers, self.length, self.start = nn.ModuleList(layers), length, start

    @property
    def bytes_per_position(self) -> int:
        """Of one position of every sequence, in all layers."""
        return sum(layer.position_bytes() for layer in self._layers) // self.length

    @property
    def state_bytes(self) -> int:
        """Of every sequence, in all layers: what does not grow with the number of positions."""
        return sum(layer.state_bytes() for layer in self._layers)

    @property
    def in_order(self) -> bool:
        """Whether steps must be taken one after the other, from the first one on (`StateCache`)."""
        return any(isinstance(layer, StateCache) for layer in self.layers)

    def rows(self, start: int, stop: int) -> KVCache:
        """The part that belongs to some of the sequences; it shares the memory."""
        return KVCache((layer.rows(start, stop) for layer in self._layers), self.length, self.start)

    def behind(self, start: int) -> KVCache:
        """The same memory for a pass that begins at position `start`: those before it are there.

        Known on the host, so attention is to the keys up to the pass's own and needs no mask.
        """
        return KVCache((layer.behind(start) for layer in self._layers), self.length, start)

    @property
    def _layers(self) -> list[LayerMemory]:
        return [layer for layer in self.layers if isinstance(layer, LayerMemory)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
