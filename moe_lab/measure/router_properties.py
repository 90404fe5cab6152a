"""Whether a router has the properties that it declares, on a run's own logits in float32, of some layers.

causal           prefixes of a sequence select as they do within the whole
batch_invariant  sequences alone and in another order select as they do side by side; where nothing says where a
                 sequence starts, tokens do
static_k         every token has an expert in each slot, and each selection has as many slots

All tokens of the run are in the selection that others are compared with; what is compared with it are some sequences
and prefixes. A property that is declared False, or not declared, promises nothing, so it is not looked at. Near-ties do
not count.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.errors import MismatchError
from moe_lab.measure.layer_probe import differing_tokens, scored_selection
from moe_lab.measure.tolerances import TOLERANCES
from moe_lab.models.moe_layer import MoELayer, hooked, indexed_moe_layers, moe_layers
from moe_lab.records.schema import DOES_NOT_HOLD, VERIFIED
from moe_lab.routers.base import RouteContext, Router, Routing
from moe_lab.routers.contract import check_contract

# So many layers and, of each, prefixes and what is selected alone, so that it takes milliseconds.
_LAYERS, _SEQUENCES, _PREFIXES = 4, 4, 6
_ALONE = 32  # tokens, where these are what is looked at alone
_SHORT = 256  # of the prefixes all but one have fewer tokens
_REORDERED, _COMPARED = 1024, 4096  # tokens


@dataclass
class Findings:
    """What was found of the declared properties, by name; the first that does not hold."""

    found: dict[str, str] = field(default_factory=dict)
    """`verified`, `does not hold`, or `not verified:` and what was not there to look at."""
    mismatch: MismatchError | None = None


@contextmanager
def declared_properties(model: nn.Module, twin: nn.Module, *, forced: bool) -> Iterator[Findings]:
    """Inside, the first pass of the fp32 reference `twin` shows some layers' logits to the routers of `model`.

    Where the run's routing was `forced`, that is not what a router selected.
    """
    findings = Findings()
    layers = list(zip(indexed_moe_layers(model), moe_layers(twin), strict=True))
    n = min(_LAYERS, len(layers))
    chosen = [layers[round(i * (len(layers) - 1) / max(n - 1, 1))] for i in range(n)]
    waiting = {id(reference): (index, layer.router) for (index, layer), reference in chosen}

    def look(layer: MoELayer, arguments: tuple[Any, ...], result: tuple[Tensor, Routing]) -> None:
        if findings.mismatch is not None or (asked := waiting.pop(id(layer), None)) is None:
            return
        index, router = asked
        ran = None if forced else result[1]
        try:
            logits_TE, ctx = layer.logits(arguments[0]).float(), layer.with_guess(arguments[1])
            check_properties(router, logits_TE, ctx, index, ran, findings.found)
        except MismatchError as error:
            findings.mismatch = error

    with hooked([reference for _, reference in chosen], look):
        yield findings


def check_properties(
    router: Router,
    logits_TE: Tensor,
    ctx: RouteContext,
    layer: int,
    ran: Routing | None = None,
    found: dict[str, str] | None = None,
) -> dict[str, str]:
    """`found` with what was found of each property that `router` declares; `ran` is a routing that it selected before.

    Raises:
        MismatchError: one does not hold; `where` is its name.
        ValueError: the router does not say what it ranked.
    """
    run = _OfRun(router, logits_TE, ctx, layer)
    found = {} if found is None else found
    looks: dict[str, Callable[[], str]] = {
        "causal": run.prefixes,
        "batch_invariant": run.batches,
        "static_k": partial(run.slots, ran),
    }
    for name in looks:
        if getattr(router, name):
            try:
                found[name] = looks[name]() if len(logits_TE) else "not verified: no token"
            except MismatchError:
                found[name] = DOES_NOT_HOLD
                raise
    return found


Batch = Sequence[range]
"""The tokens of each sequence."""


def _some(units: Batch, most: int) -> Batch:
    """The first ones and the last."""
    return units if len(units) <= most else [*units[: most - 1], units[-1]]


class _OfRun:
    """A layer's logits of a run, as sequences; where nothing says where one starts, all tokens are one."""

    def __init__(self, router: Router, logits_TE: Tensor, ctx: RouteContext, layer: int):
        self.router, self.logits_TE, self.ctx, self.layer = router, logits_TE, ctx, layer
        starts_B1, T = ctx.seq_start_B1, len(logits_TE)
        bounds = [0, T] if starts_B1 is None else starts_B1.tolist()
        self.sequences = [range(a, b) for a, b in itertools.pairwise(bounds) if a < b]
        self.knows_sequences = starts_B1 is not None

    def prefixes(self) -> str:
        """`causal`. Each sequence is looked at by itself: what others do to it is a matter of `batch_invariant`."""
        long = _some([sequence for sequence in self.sequences if len(sequence) > 1], _SEQUENCES)
        for sequence in long:
            n = min(len(sequence), _SHORT)
            cuts = {1 + i * (n - 2) // (_PREFIXES - 1) for i in range(_PREFIXES)} | {len(sequence) - 1}
            words = "a prefix of a sequence selects otherwise than within the whole"
            self._compare("causal", words, [sequence], [[sequence[:cut]] for cut in sorted(cuts)])
        return VERIFIED if long else "not verified: no sequence of two tokens"

    def batches(self) -> str:
        """`batch_invariant`."""
        kind, most = ("sequence", _SEQUENCES) if self.knows_sequences else ("token", _ALONE)
        units = self.sequences if self.knows_sequences else [range(t, t + 1) for t in range(len(self.logits_TE))]
        if len(units) < 2:
            return f"not verified: one {kind} only"
        words = f"a {kind} alone or in another order selects otherwise than beside others"
        some = units[: max(2, _REORDERED // len(units[0]))]
        self._compare("batch_invariant", words, units, [*([unit] for unit in _some(units, most)), some[::-1]])
        return VERIFIED

    def slots(self, ran: Routing | None) -> str:
        """`static_k`, of many tokens, of one, and of the run's own."""
        looked = [self._select(self.sequences), self._select([range(1)]), *([] if ran is None else [ran])]
        unused = max(int((routing.expert_ids_TK < 0).any(-1).sum()) for routing in looked)
        widths = sorted({routing.expert_ids_TK.shape[1] for routing in looked})
        if unused or len(widths) > 1:
            what = (
                f"{unused} tokens have an unused slot"
                if unused
                else f"tokens have {' or '.join(map(str, widths))} slots"
            )
            raise self._mismatch("static_k", what)
        return VERIFIED

    def _tokens(self, batch: Batch) -> Tensor:
        """[N]: of these sequences, side by side."""
        return torch.cat([torch.arange(a.start, a.stop, device=self.logits_TE.device) for a in batch])

    def _select(self, batch: Batch) -> Routing:
        """What the router selects for these sequences side by side, and how it ranked."""
        tokens_N = self._tokens(batch)
        starts = [0, *itertools.accumulate(map(len, batch))]
        starts_B1 = torch.tensor(starts, dtype=torch.int32, device=tokens_N.device) if self.knows_sequences else None
        names = ("token_ids_T", "valid_T", "previous_TD", "guess_TE")
        of_tokens = {name: values_T[tokens_N] for name in names if (values_T := getattr(self.ctx, name)) is not None}
        ctx = self.ctx._replace(seq_start_B1=starts_B1, **of_tokens)
        routing = scored_selection(self.router, self.logits_TE[tokens_N], ctx)
        check_contract(routing, len(tokens_N), self.logits_TE.shape[1], self.layer)
        return routing

    def _compare(self, name: str, words: str, whole: Batch, parts: Sequence[Batch]) -> None:
        """Raise `MismatchError` if a token of `parts` selects otherwise than in `whole`."""
        every, E = self._select(whole), self.logits_TE.shape[1]
        for batch in parts:
            tokens_N = self._tokens(batch)
            rows_N = torch.arange(len(tokens_N), device=tokens_N.device)
            if len(rows_N) > _COMPARED:  # of many tokens the first and the last, in a fraction of the memory
                rows_N = torch.cat([rows_N[: _COMPARED // 2], rows_N[-_COMPARED // 2 :]])
            tokens_N = tokens_N[rows_N]
            got, wanted = _rows(self._select(batch), rows_N), _rows(every, tokens_N - whole[0].start)
            logits_NE = self.logits_TE[tokens_N]
            given_NK = self.router.weigh(logits_NE, got.expert_ids_TK)
            differs_N = differing_tokens(got, wanted, E, TOLERANCES[torch.float32], given_NK, logits_NE)
            if bool(differs_N.any()):
                first = int(differs_N.nonzero()[0, 0])
                have, want = (sorted(routing.expert_ids_TK[first].tolist()) for routing in (got, wanted))
                instead = f"experts {have} instead of {want}" if have != want else f"other weights for experts {have}"
                raise self._mismatch(name, f"{words} (first: token {int(tokens_N[first])}, {instead})")

    def _mismatch(self, name: str, what: str) -> MismatchError:
        kind = type(self.router).__name__
        return MismatchError(name, f"layer {self.layer}: {kind} declares {name}, but {what}")


def _rows(routing: Routing, rows_N: Tensor) -> Routing:
    assert routing.scores_TE is not None
    ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
    return Routing(ids_TK[rows_N], weights_TK[rows_N], scores_TE=routing.scores_TE[rows_N])
