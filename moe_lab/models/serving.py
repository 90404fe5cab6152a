"""The two phases of serving a decoder, each as a module that is called like a model: prefill and decode.

forward(ids, forced_routing=None) -> Output with the logits of the last position [B, 1, V], or of each of a step
on(decoder)                       the same with another decoder, on the same cache
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.errors import UnavailableError
from moe_lab.models import ForcedRouting, Output
from moe_lab.models.kv_cache import KVCache
from moe_lab.models.transformer_decoder import TransformerDecoder
from moe_lab.routers.base import Routing

_TOKENS_AT_ONCE = 1 << 14  # of a context, so that computing it needs little memory beside the cache


class Serving(nn.Module):
    """A decoder and its cache."""

    def __init__(self, decoder: TransformerDecoder, cache: KVCache):
        super().__init__()
        self.decoder, self.cache = decoder, cache

    @property
    def layers(self) -> nn.ModuleList:
        """Those of the decoder."""
        return self.decoder.layers

    def cached_bytes(self) -> int:
        """What any implementation of the present pass reads of the cache and writes into it."""
        raise NotImplementedError


class Prefill(Serving):
    """All tokens at once, from the first on; their keys and values go into the cache."""

    def on(self, decoder: TransformerDecoder) -> Prefill:
        return Prefill(decoder, self.cache)

    def cached_bytes(self) -> int:
        """See `Serving.cached_bytes`: all is written."""
        return self.cache.bytes_per_position * self.cache.length + self.cache.state_bytes

    def forward(self, ids_BS: Tensor, forced_routing: ForcedRouting = None) -> Output:
        """ids [B, S] -> logits [B, 1, V]."""
        return self.decoder(ids_BS, forced_routing, cache=self.cache, last=1)  # type: ignore[no-any-return]


class Decode(Serving):
    """One step: the next token of every sequence, on the keys and values of those before it.

    Of ids [B, N] the first `context_len` are in the cache (`fill`); a step takes the token at `position_g`, a tensor on
    the device, so that a captured graph may be replayed at each position. `advance` goes on to the next, and from the
    last back to the first step, which overwrites what it finds in the cache.

    With a `window` of g > 1 a step takes the next g tokens of every sequence, as speculative decoding verifies them.
    """

    position_g: Tensor

    def __init__(
        self,
        decoder: TransformerDecoder,
        cache: KVCache,
        context_len: int,
        window: int = 1,
        position_g: Tensor | None = None,
    ):
        super().__init__(decoder, cache)
        assert (cache.length - context_len) % window == 0, "the last step would be shorter"
        if cache.in_order and window > 1:
            raise UnavailableError(
                f"workload.window={window}: this model keeps states, and a step of theirs takes one token; "
                "use workload.window=1"
            )
        self.context_len, self.window, self._step = context_len, window, 0
        self.register_buffer("_offset_g", torch.arange(window, device=decoder.embed.weight.device), persistent=False)
        if position_g is None:
            position_g = context_len + self.get_buffer("_offset_g")
        self.register_buffer("position_g", position_g, persistent=False)

    @property
    def n_steps(self) -> int:
        """From the end of the context to the end of the cache."""
        return (self.cache.length - self.context_len) // self.window

    def on(self, decoder: TransformerDecoder) -> Decode:
        return Decode(decoder, self.cache, self.context_len, self.window, self.position_g)

    def cached_bytes(self) -> int:
        """See `Serving.cached_bytes`: what came before is read, the step's positions and the states written.

        Looks at the host.
        """
        return self.cache.bytes_per_position * (int(self.position_g[-1]) + 1) + 2 * self.cache.state_bytes

    @torch.inference_mode()
    def fill(self, ids_BN: Tensor) -> tuple[Routing, ...]:
        """Compute the context and keep it in the cache, some sequences at a time; its routing, layer by layer."""
        B, C = len(ids_BN), self.context_len
        rows = max(1, _TOKENS_AT_ONCE // C)
        passes = [
            self.decoder(ids_BN[a : a + rows, :C], cache=self.cache.rows(a, a + rows), last=1).routings
            for a in range(0, B, rows)
        ]
        return tuple(joined(of_layer) for of_layer in zip(*passes, strict=True))

    def seek(self, step: int) -> None:
        """Go to a step, counted from 0; where `cache.in_order`, to the first one or to the next."""
        assert not self.cache.in_order or step in (0, self._step, self._step + 1), "the state before it is not there"
        self._step = step
        self.position_g.copy_(self.get_buffer("_offset_g") + (self.context_len + step * self.window))

    def advance(self) -> None:
        """Go to the next step, without a look at the host."""
        self._step = (self._step + 1) % self.n_steps
        n_positions = self.n_steps * self.window
        self.position_g.sub_(self.context_len - self.window).remainder_(n_positions).add_(self.context_len)

    def forward(self, ids_BN: Tensor, forced_routing: ForcedRouting = None) -> Output:
        """ids [B, N] -> logits [B, window, V] of the present step."""
        ids_Bg = ids_BN.index_select(1, self.position_g)
        return self.decoder(  # type: ignore[no-any-return]
            ids_Bg, forced_routing, cache=self.cache, position_S=self.position_g
        )


def joined(routings: Sequence[Routing]) -> Routing:
    """The tokens of several routings one after the other, as wide as the widest."""
    K = max(routing.expert_ids_TK.shape[1] for routing in routings)
    ids = [F.pad(routing.expert_ids_TK, (0, K - routing.expert_ids_TK.shape[1]), value=-1) for routing in routings]
    weights = [F.pad(routing.weights_TK, (0, K - routing.weights_TK.shape[1])) for routing in routings]
    return Routing(torch.cat(ids), torch.cat(weights))


def whole_routing(context: Routing, steps: Sequence[Routing], batch: int) -> Routing:
    """The routing of whole sequences, by (sequence, position), from that of their contexts and of each step after."""
    ids_TK, weights_TK, *_ = joined([context, *steps])
    C = len(context.expert_ids_TK) // batch

    def ordered(values_TK: Tensor) -> Tensor:
        before, after = values_TK[: batch * C], values_TK[batch * C :]
        of_steps = after.view(len(steps), batch, -1, values_TK.shape[1]).transpose(0, 1).flatten(1, 2)
        sequences = (before.view(batch, C, -1), of_steps)
        return torch.cat(sequences, dim=1).flatten(0, 1)

    return Routing(ordered(ids_TK), ordered(weights_TK))
