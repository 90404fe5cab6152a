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

Part = tuple[range, KVCache]
"""Positions that a pass takes, and the cache behind those before them."""

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
    """All tokens, from the first on; their keys and values go into the cache.

    With a `chunk`, so many positions of every sequence are one pass, on what those before left in the cache. So a pass
    needs less memory beside the cache; who computes attention decides whether it still grows with the sequences
    (docs/prefill.md). A router sees the tokens of one pass.
    """

    def __init__(self, decoder: TransformerDecoder, cache: KVCache, chunk: int | None = None):
        super().__init__(decoder, cache)
        self.chunk, self._parts = chunk, _parts_of(cache, cache.length, chunk)

    def on(self, decoder: TransformerDecoder) -> Prefill:
        return Prefill(decoder, self.cache, self.chunk)

    def cached_bytes(self) -> int:
        """See `Serving.cached_bytes`: all is written."""
        return self.cache.bytes_per_position * self.cache.length + self.cache.state_bytes

    def forward(self, ids_BS: Tensor, forced_routing: ForcedRouting = None) -> Output:
        """ids [B, S] -> logits [B, 1, V]."""
        return _pass_by_pass(self.decoder, self._parts, ids_BS, forced_routing, last=1)


class Decode(Serving):
    """One step: the next token of every sequence, on the keys and values of those before it.

    Of ids [B, N] the first `context_len` are in the cache (`fill`); a step takes the token at `position_g`, a tensor on
    the device, so that a captured graph may be replayed at each position. `advance` goes on to the next, and from the
    last back to the first step, which overwrites what it finds in the cache.

    With a `window` of g > 1 a step takes the next g tokens of every sequence, as speculative decoding verifies them.
    `chunk` is that of `Prefill`, for the context.
    """

    position_g: Tensor

    def __init__(
        self,
        decoder: TransformerDecoder,
        cache: KVCache,
        context_len: int,
        window: int = 1,
        position_g: Tensor | None = None,
        chunk: int | None = None,
    ):
        super().__init__(decoder, cache)
        assert (cache.length - context_len) % window == 0, "the last step would be shorter"
        if cache.in_order and window > 1:
            raise UnavailableError(
                f"workload.window={window}: this model keeps states, and a step of theirs takes one token; "
                "use workload.window=1"
            )
        self.context_len, self.window, self.chunk, self._step = context_len, window, chunk, 0
        positions_N = torch.arange(context_len, cache.length, device=decoder.embed.weight.device)
        self.register_buffer("_positions_Sg", positions_N.view(-1, window), persistent=False)
        if position_g is None:
            position_g = positions_N[:window].clone()
        self.register_buffer("position_g", position_g, persistent=False)

    @property
    def n_steps(self) -> int:
        """From the end of the context to the end of the cache."""
        return (self.cache.length - self.context_len) // self.window

    def on(self, decoder: TransformerDecoder) -> Decode:
        twin = Decode(decoder, self.cache, self.context_len, self.window, self.position_g, self.chunk)
        twin._step = self._step
        return twin

    def cached_bytes(self) -> int:
        """See `Serving.cached_bytes`: what came before is read, the step's positions and the states written.

        Looks at the host.
        """
        return self.cache.bytes_per_position * (int(self.position_g[-1]) + 1) + 2 * self.cache.state_bytes

    @torch.inference_mode()
    def fill(self, ids_BN: Tensor) -> tuple[Routing, ...]:
        """Compute the context and keep it in the cache, some sequences at a time; its routing, layer by layer."""
        B, C = len(ids_BN), self.context_len
        rows = max(1, _TOKENS_AT_ONCE // C)  # with a chunk too: latents make the keys of all before it
        passes = []
        for a in range(0, B, rows):
            parts = _parts_of(self.cache.rows(a, a + rows), C, self.chunk)
            passes.append(_pass_by_pass(self.decoder, parts, ids_BN[a : a + rows, :C]).routings)
        return tuple(joined(of_layer) for of_layer in zip(*passes, strict=True))

    def seek(self, step: int) -> None:
        """Go to a step, counted from 0; where `cache.in_order`, to the first one or to the next."""
        assert not self.cache.in_order or step in (0, self._step, self._step + 1), "the state before it is not there"
        assert 0 <= step < self.n_steps, "a step is one of 0 to n_steps - 1"
        self._go_to(step)

    def advance(self) -> None:
        """Go to the next step, without a look at the host."""
        self._go_to((self._step + 1) % self.n_steps)

    def _go_to(self, step: int) -> None:
        """One small copy on the device."""
        self._step = step
        self.position_g.copy_(self.get_buffer("_positions_Sg")[step])

    def forward(self, ids_BN: Tensor, forced_routing: ForcedRouting = None) -> Output:
        """ids [B, N] -> logits [B, window, V] of the present step."""
        ids_Bg = ids_BN.index_select(1, self.position_g)
        return self.decoder(  # type: ignore[no-any-return]
            ids_Bg, forced_routing, cache=self.cache, position_S=self.position_g
        )


def chunks(length: int, chunk: int | None) -> list[range]:
    """The positions of each pass over `length` of them, `chunk` at a time; the last may have fewer."""
    size = min(chunk or length, length)
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def _parts_of(cache: KVCache, length: int, chunk: int | None) -> list[Part]:
    """The passes over the first `length` positions."""
    return [(part, cache.behind(part.start) if part.start else cache) for part in chunks(length, chunk)]


def _pass_by_pass(
    decoder: TransformerDecoder, parts: Sequence[Part], ids_BS: Tensor, forced: ForcedRouting = None, last: int = 0
) -> Output:
    """The logits of the `last` positions, and the routing of all tokens as one pass over them would order it."""
    B, S = ids_BS.shape
    parts = [part for part in parts if part[0].start < S]
    if len(parts) == 1:
        return decoder(ids_BS, forced, cache=parts[0][1], last=last)  # type: ignore[no-any-return]
    outputs: list[Output] = []
    for positions, cache in parts:
        place = slice(positions.start, positions.stop)
        routings = None if forced is None else [_at_positions(routing, place, B) for routing in forced]
        wanted = last if positions.stop >= S else 0
        outputs.append(decoder(ids_BS[:, place], routings, cache=cache, last=wanted))
    by_layer = zip(*(output.routings for output in outputs), strict=True)
    return Output(outputs[-1].y, tuple(joined(routings, B) for routings in by_layer))


def _at_positions(routing: Routing, place: slice, batch: int) -> Routing:
    """Of the tokens of whole sequences those at some positions."""
    parts = (part.unflatten(0, (batch, -1))[:, place].flatten(0, 1) for part in routing[:2])
    return Routing(*parts)


def joined(routings: Sequence[Routing], batch: int = 1) -> Routing:
    """The tokens of several routings, as wide as the widest, by (sequence, position).

    Each has tokens of the same `batch` sequences, sequence by sequence: the positions behind those of the one before.
    """
    K = max(routing.expert_ids_TK.shape[1] for routing in routings)
    ids = [_widened(routing.expert_ids_TK, K, -1).unflatten(0, (batch, -1)) for routing in routings]
    weights = [_widened(routing.weights_TK, K, 0).unflatten(0, (batch, -1)) for routing in routings]
    return Routing(torch.cat(ids, 1).flatten(0, 1), torch.cat(weights, 1).flatten(0, 1))


def _widened(values_TK: Tensor, width: int, unused: int) -> Tensor:
    more = width - values_TK.shape[1]
    return F.pad(values_TK, (0, more), value=unused) if more else values_TK


def whole_routing(context: Routing, steps: Sequence[Routing], batch: int) -> Routing:
    """The routing of whole sequences, from that of their contexts and of each step after."""
    return joined([context, *steps], batch)
