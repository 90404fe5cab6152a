"""models/serving.py: prefill and decode against one pass over the whole sequence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.experts.grouped import Grouped
from moe_lab.models import Output, serving
from moe_lab.models.decoder_moe import DecoderMoE
from moe_lab.models.kv_cache import KVCache, StateCache
from moe_lab.models.parameters import initialize, reference_twin
from moe_lab.models.serving import Decode, Prefill, whole_routing
from moe_lab.models.transformer_decoder import TransformerDecoder
from moe_lab.routers.base import NO_CONTEXT, RouteContext, Router, Routing
from moe_lab.routers.softmax_topk import SoftmaxTopK
from tests import tiny
from tests.conftest import needs_cxx

VOCAB, LAYERS, E, K = 61, 3, 5, 2
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": LAYERS, "mlp_hidden_dim": 24}


class Seen(SoftmaxTopK):
    """The softmax router, which notes the contexts that it is asked with."""

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        assert ctx is not None
        CONTEXTS.append(ctx)
        return super().select(logits_TE, ctx)


CONTEXTS: list[RouteContext] = []


def decoder(dtype: torch.dtype = torch.float32, router: type[Router] = SoftmaxTopK, **options: Any) -> DecoderMoE:
    keys = {**tiny.keys_of("model", "decoder_moe"), "n_kv_heads": 2, **SIZES, "n_experts": E, "top_k": K, **options}
    router_keys = tiny.keys_of("router", "mixtral")
    model = DecoderMoE(make_router=partial(router, **router_keys), experts=Grouped(), **keys).to(dtype)
    initialize(model, 3)
    return model.eval()


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def decoding(
    model: TransformerDecoder, ids_BN: Tensor, context_len: int, window: int = 1
) -> tuple[Decode, tuple[Routing, ...]]:
    """(before its first step, the routing of the context)."""
    decode = Decode(model, model.make_cache(*ids_BN.shape), context_len, window)
    return decode, decode.fill(ids_BN)


def stepped(decode: Decode, ids_BN: Tensor) -> list[Output]:
    """All steps once, from the present one on."""
    outputs = []
    for _ in range(decode.n_steps):
        outputs.append(decode(ids_BN))
        decode.advance()
    return outputs


def logits_of(outputs: Sequence[Output]) -> Tensor:
    return torch.cat([output.y for output in outputs], dim=1)


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def same_routes(one: Routing, other: Routing) -> bool:
    return torch.equal(one.expert_ids_TK, other.expert_ids_TK) and torch.allclose(
        one.weights_TK, other.weights_TK, atol=1e-5
    )


models = pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="grouped_queries"),
        pytest.param({"n_kv_heads": 4}, id="a_key_head_per_head"),
        pytest.param({"n_kv_heads": 1, "qk_norm": "head"}, id="one_key_head"),
        pytest.param({"windows": [3, None, 5]}, id="windows"),
        pytest.param({"windows": [1, 1, 1], "n_kv_heads": 4}, id="windows_of_one"),
        pytest.param({"windows": [50, 10, None]}, id="windows_longer_than_the_sequence"),
        pytest.param({"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "qk_norm": "full"}, id="scaled_rope"),
        pytest.param({"qkv_bias": True, "o_bias": True, "clip_qkv": 0.3}, id="biases_clipped"),
        pytest.param({"n_dense_layers": 1, "shared_expert_hidden_dim": 9, "tie_embeddings": True}, id="dense_layer"),
    ],
)
contexts = pytest.mark.parametrize("context_len", [pytest.param(n, id=f"context{n}") for n in (1, 4, 9)])
batches = pytest.mark.parametrize("batch", [pytest.param(b, id=f"b{b}") for b in (1, 3)])


@pytest.mark.thinned(2)
@models
@batches
@contexts
def test_each_step_gives_the_logits_and_routes_of_the_whole_pass(
    options: dict[str, Any], batch: int, context_len: int
) -> None:
    """At every position, whatever the context."""
    model, ids_BN = decoder(**options), ids(batch, 10)
    whole = model(ids_BN)
    decode, context = decoding(model, ids_BN, context_len)
    steps = stepped(decode, ids_BN)
    assert len(steps) == decode.n_steps == 10 - context_len
    assert_close(logits_of(steps), whole.y[:, context_len:])
    assert len(context) == len(whole.routings)
    for layer, (before, want) in enumerate(zip(context, whole.routings, strict=True)):
        assert same_routes(whole_routing(before, [step.routings[layer] for step in steps], batch), want)


def test_a_decoder_without_experts_decodes_too() -> None:
    """There are no routings, and the logits are those of the whole pass."""
    model = TransformerDecoder(**{**tiny.keys_of("model", "transformer_decoder"), **SIZES})
    initialize(model, 1)
    decode, context = decoding(model, ids(2, 8), 3)
    assert context == ()
    assert_close(logits_of(stepped(decode, ids(2, 8))), model(ids(2, 8)).y[:, 3:])


@models
@batches
def test_prefill_gives_the_last_logits_of_the_whole_pass(options: dict[str, Any], batch: int) -> None:
    """And the routes of all tokens."""
    model, ids_BS = decoder(**options), ids(batch, 10)
    whole, prefilled = model(ids_BS), Prefill(model, model.make_cache(batch, 10))(ids_BS)
    assert prefilled.y.shape == (batch, 1, VOCAB)
    assert_close(prefilled.y, whole.y[:, -1:])
    assert all(same_routes(*pair) for pair in zip(prefilled.routings, whole.routings, strict=True))


@models
def test_prefill_leaves_the_cache_that_decoding_needs(options: dict[str, Any]) -> None:
    """A step after it gives the logits of the whole pass, and the cache is that of token by token."""
    model, ids_BN = decoder(**options), ids(2, 10)
    cache = model.make_cache(2, 10)
    Prefill(model, cache)(ids_BN[:, :9])
    assert all(not buffer[:, :, 9:].any() and buffer[:, :, :9].all() for buffer in cache.buffers())
    assert_close(Decode(model, cache, 9)(ids_BN).y, model(ids_BN).y[:, 9:])
    decode, _ = decoding(model, ids_BN, 1)
    stepped(decode, ids_BN)
    for one, other in zip(cache.buffers(), decode.cache.buffers(), strict=True):
        assert_close(one, other)


def test_a_longer_cache_changes_nothing_of_a_prefill() -> None:
    """Room for what comes later is not looked at."""
    model, ids_BS = decoder(windows=[3, None, 2]), ids(2, 6)
    short, long = (Prefill(model, model.make_cache(2, length))(ids_BS).y for length in (6, 40))
    assert torch.equal(short, long)


@contexts
def test_going_round_gives_the_same_steps_again(context_len: int) -> None:
    """From the last step back to the first: what later steps left in the cache is not seen. Bit for bit."""
    model, ids_BN = decoder(windows=[None, 4, 1]), ids(2, 10)
    decode, _ = decoding(model, ids_BN, context_len)
    first = logits_of(stepped(decode, ids_BN))
    assert int(decode.position_g) == context_len
    assert torch.equal(logits_of(stepped(decode, ids_BN)), first)


@pytest.mark.parametrize(("context_len", "length"), [(1, 2), (1, 6), (5, 6), (3, 11)])
def test_advance_visits_each_position_after_the_context_in_turn(context_len: int, length: int) -> None:
    """Twice round, in place: the tensor stays the one that a graph has captured."""
    decode = Decode(decoder(), decoder().make_cache(1, length), context_len)
    position_g = decode.position_g
    visited = []
    for _ in range(2 * decode.n_steps):
        visited.append(int(position_g))
        decode.advance()
    assert visited == 2 * list(range(context_len, length))
    assert decode.position_g is position_g and position_g.dtype == torch.int64


@pytest.mark.thinned(1)
@models
@pytest.mark.parametrize(
    ("window", "by_kernels"),
    [
        pytest.param(2, False, id="window2"),
        pytest.param(3, False, id="window3"),
        pytest.param(3, True, id="window3 by kernels", marks=pytest.mark.slow),
        pytest.param(6, False, id="window6"),
    ],
)
def test_a_step_of_several_tokens_is_the_same_as_of_one(options: dict[str, Any], window: int, by_kernels: bool) -> None:
    """The logits and routes of the whole pass at each of its tokens, twice round, and from any step on."""
    model, ids_BN = decoder(**options), ids(3, 10)
    whole = model(ids_BN)
    for block in model.layers:
        block.attention.fuses = by_kernels
    decode, context = decoding(model, ids_BN, 4, window)
    steps = stepped(decode, ids_BN)
    assert len(steps) == decode.n_steps == 6 // window and steps[0].y.shape == (3, window, VOCAB)
    assert_close(logits_of(steps), whole.y[:, 4:])
    for layer, (before, want) in enumerate(zip(context, whole.routings, strict=True)):
        assert same_routes(whole_routing(before, [step.routings[layer] for step in steps], 3), want)
    assert_close(logits_of(stepped(decode, ids_BN)), whole.y[:, 4:])
    decode.seek(decode.n_steps - 1)
    assert decode.position_g.tolist() == list(range(10 - window, 10))
    assert_close(decode(ids_BN).y, whole.y[:, 10 - window :])


def test_what_keeps_states_takes_one_token() -> None:
    """A step of a recurrence reads the state before its one token."""
    cache = KVCache([StateCache.zeros(1, [((3,), torch.float32)], torch.device("cpu"))], 6)
    Decode(decoder(), cache, 2)
    with pytest.raises(UnavailableError, match=r"workload\.window=2: this model keeps states.*workload\.window=1"):
        Decode(decoder(), cache, 2, 2)


def test_seek_goes_to_any_step() -> None:
    """Steps count from the context's end; once all are in the cache, in any order."""
    model, ids_BN = decoder(), ids(2, 9)
    decode, _ = decoding(model, ids_BN, 4)
    logits = logits_of(stepped(decode, ids_BN))
    for step in (3, 0, 4, 1):
        decode.seek(step)
        assert int(decode.position_g) == 4 + step
        assert torch.equal(decode(ids_BN).y, logits[:, step : step + 1])


def test_a_step_sees_the_past_and_not_the_future() -> None:
    """Another token later changes nothing; one before it, in the cache, does."""
    model, ids_BN = decoder(), ids(1, 8)
    later_BN, earlier_BN = ids_BN.clone(), ids_BN.clone()
    later_BN[:, 6] = (later_BN[:, 6] + 1) % VOCAB
    earlier_BN[:, 2] = (earlier_BN[:, 2] + 1) % VOCAB
    one, later, earlier = (decoding(model, each, 5)[0](each).y for each in (ids_BN, later_BN, earlier_BN))
    assert torch.equal(one, later)
    assert float((one - earlier).abs().max()) > 1e-3


def test_a_sequence_does_not_see_those_beside_it() -> None:
    """Each of three gives what it gives alone."""
    model, ids_BN = decoder(), ids(3, 8)
    together = logits_of(stepped(decoding(model, ids_BN, 3)[0], ids_BN))
    for row in range(3):
        alone_1N = ids_BN[row : row + 1]
        alone = logits_of(stepped(decoding(model, alone_1N, 3)[0], alone_1N))
        assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("at_once", [pytest.param(n, id=f"tokens{n}") for n in (1, 4, 8, 11, 12)])
def test_a_context_filled_in_parts_is_the_same(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some sequences at a time: cache, routing and steps, for parts that divide the batch and that do not."""
    model, ids_BN = decoder(), ids(5, 7)
    want, want_context = decoding(model, ids_BN, 4)
    monkeypatch.setattr(serving, "_TOKENS_AT_ONCE", at_once)
    got, got_context = decoding(model, ids_BN, 4)
    assert all(same_routes(*pair) for pair in zip(got_context, want_context, strict=True))
    for one, other in zip(got.cache.buffers(), want.cache.buffers(), strict=True):
        assert_close(one, other)
    assert_close(logits_of(stepped(got, ids_BN)), logits_of(stepped(want, ids_BN)))


def test_a_context_is_filled_in_as_many_parts_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass has more tokens than allowed, unless one sequence has."""
    model, ids_BN = decoder(router=Seen), ids(5, 7)
    for at_once, want in ((4, [4] * 5), (11, [8, 8, 4]), (100, [20])):
        monkeypatch.setattr(serving, "_TOKENS_AT_ONCE", at_once)
        CONTEXTS.clear()
        decoding(model, ids_BN, 4)
        tokens = [len(ctx.token_ids_T) for ctx in CONTEXTS if ctx.layer == 0 and ctx.token_ids_T is not None]
        assert tokens == want
    monkeypatch.setattr(serving, "_TOKENS_AT_ONCE", 11)
    CONTEXTS.clear()
    Decode(model, model.make_cache(5, 7), 4, chunk=2).fill(ids_BN)  # of as many sequences as without chunks
    tokens = [len(ctx.token_ids_T) for ctx in CONTEXTS if ctx.layer == 0 and ctx.token_ids_T is not None]
    assert tokens == [4, 4, 4, 4, 2, 2]


def test_routers_are_told_phase_layer_and_tokens() -> None:
    """The context in prefill, a step in decode, a plain pass in forward; in each the tokens at hand."""
    model, ids_BN = decoder(router=Seen), ids(2, 6)
    decode, _ = decoding(model, ids_BN, 4)
    CONTEXTS.clear()
    decode.seek(1)
    decode(ids_BN)
    Prefill(model, model.make_cache(2, 6))(ids_BN)
    model(ids_BN)
    assert [ctx.layer for ctx in CONTEXTS] == 3 * list(range(LAYERS))
    assert [ctx.phase for ctx in CONTEXTS[::LAYERS]] == ["decode", "prefill", "forward"]
    step, whole = CONTEXTS[0], CONTEXTS[LAYERS]
    assert step.token_ids_T is not None and torch.equal(step.token_ids_T, ids_BN[:, 5])
    assert step.seq_start_B1 is not None and step.seq_start_B1.tolist() == [0, 1, 2]
    assert whole.token_ids_T is not None and torch.equal(whole.token_ids_T, ids_BN.flatten())
    assert whole.seq_start_B1 is not None and whole.seq_start_B1.tolist() == [0, 6, 12]


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.__name__) for kind in (Prefill, Decode)])
def test_forced_with_its_own_routing_a_phase_computes_the_same(kind: type) -> None:
    """And with another routing something else."""
    model, ids_BN = decoder(), ids(3, 6)
    task = decoding(model, ids_BN, 5)[0] if kind is Decode else Prefill(model, model.make_cache(3, 6))
    free = task(ids_BN)
    assert torch.equal(task(ids_BN, forced_routing=free.routings).y, free.y)
    moved = [routing._replace(expert_ids_TK=(routing.expert_ids_TK + 1) % E) for routing in free.routings]
    assert float((task(ids_BN, forced_routing=moved).y - free.y).abs().max()) > 1e-3


def test_on_another_decoder_a_phase_has_the_same_cache_and_position() -> None:
    """The fp32 reference of a bf16 model takes the same step: the cache stays bf16 and is read in fp32."""
    model, ids_BN = decoder(torch.bfloat16), ids(2, 9)
    decode, _ = decoding(model, ids_BN, 4)
    twin = decode.on(reference_twin(model))
    assert twin.cache is decode.cache and twin.position_g is decode.position_g
    decode.advance()
    assert int(twin.position_g) == 5 and twin.n_steps == decode.n_steps
    assert twin(ids_BN).y.dtype == torch.float32 and decode(ids_BN).y.dtype == torch.bfloat16
    assert all(buffer.dtype == torch.bfloat16 for buffer in decode.cache.buffers())
    prefill = Prefill(model, decode.cache)
    assert prefill.on(twin.decoder).cache is decode.cache
    assert prefill.on(twin.decoder)(ids_BN).y.dtype == torch.float32
    later = decode.on(twin.decoder)
    later.advance()
    assert int(decode.position_g) == 6


def test_on_the_same_decoder_a_phase_is_the_same() -> None:
    """Of the class, with equal logits."""
    model, ids_BN = decoder(), ids(2, 9)
    decode, _ = decoding(model, ids_BN, 4)
    assert torch.equal(decode.on(model)(ids_BN).y, decode(ids_BN).y)
    prefill = Prefill(model, model.make_cache(2, 9))
    assert torch.equal(prefill.on(model)(ids_BN).y, prefill(ids_BN).y)


def test_a_bf16_model_keeps_a_bf16_cache() -> None:
    """Its steps are its whole pass up to bf16's rounding."""
    model, ids_BN = decoder(torch.bfloat16), ids(2, 9)
    whole = model(ids_BN)
    decode, _ = decoding(model, ids_BN, 4)
    assert all(buffer.dtype == torch.bfloat16 for buffer in decode.cache.buffers())
    for step in range(decode.n_steps):
        at = torch.arange(2) * 9 + 4 + step
        forced = [Routing(r.expert_ids_TK[at], r.weights_TK[at]) for r in whole.routings]
        decode.seek(step)
        error = (decode(ids_BN, forced).y - whole.y[:, 4 + step : 5 + step]).float().norm()
        assert float(error / whole.y[:, 4 + step].float().norm()) < 0.05


def test_cached_bytes_are_what_a_pass_reads_and_writes() -> None:
    """A step: every position up to its own; a prefill: all."""
    model = decoder()
    cache = model.make_cache(3, 10)
    per_position = LAYERS * 2 * 3 * 2 * 8 * 4
    decode = Decode(model, cache, 4)
    assert decode.cached_bytes() == 5 * per_position
    decode.seek(5)
    assert decode.cached_bytes() == 10 * per_position
    assert Prefill(model, cache).cached_bytes() == 10 * per_position


def test_a_cache_is_reserved_with_its_tables_for_the_models_sizes() -> None:
    """Of the key heads, in the parameters' dtype, empty."""
    model = decoder(torch.bfloat16)
    cache = model.make_cache(3, 10)
    assert len(cache.layers) == LAYERS and cache.length == 10
    assert all(buffer.shape == (3, 2, 10, 8) and not buffer.any() for buffer in cache.buffers())
    assert {buffer.dtype for buffer in cache.buffers()} == {torch.bfloat16}
    assert model.ropes[0].tables_2Nd is not None and model.ropes[0].tables_2Nd.shape[1] == 10


LATENT = {"nope_dim": 5, "rope_dim": 6, "v_dim": 7, "kv_rank": 9, "q_rank": 8, "bias": False, "growth": (0.3, 4)}
DELTA_NET = {"kind": "delta_net", "n_heads": 2, "head_dim": 8, "n_value_heads": 4, "value_dim": 6, "conv_width": 4}
SHORT_CONV = {"kind": "short_conv", "width": 3, "bias": True}
all_models = pytest.mark.parametrize(
    "options",
    [
        *models.args[1],
        pytest.param({"sinks": True, "windows": [4, None, 50]}, id="sinks"),
        pytest.param({"latent": LATENT, "head_dim": 6}, id="latent"),
        pytest.param({"mixers": [DELTA_NET, None, DELTA_NET]}, id="delta_net"),
        pytest.param({"mixers": [SHORT_CONV, SHORT_CONV, None]}, id="short_conv"),
    ],
)
LENGTH = 41
chunked = pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(chunk, id=f"chunk{chunk}", marks=[] if chunk in (7, LENGTH) else pytest.mark.slow)
        for chunk in (1, 7, 37, LENGTH, LENGTH + 1)
    ],
)


def same_caches(one: KVCache, other: KVCache) -> None:
    for kept, wanted in zip(one.buffers(), other.buffers(), strict=True):
        assert_close(kept, wanted)


@pytest.mark.thinned(1)
@all_models
@chunked
def test_a_prefill_in_chunks_is_the_whole(options: dict[str, Any], chunk: int) -> None:
    """Logits, routes, what the cache holds and the step behind it; the last chunk may be shorter, or there is one."""
    model, ids_BN = decoder(**options), ids(2, LENGTH + 1)
    ids_BS = ids_BN[:, :LENGTH]
    whole, cut = (Prefill(model, model.make_cache(2, LENGTH + 1), size) for size in (None, chunk))
    want, got = whole(ids_BS), cut(ids_BS)
    assert got.y.shape == (2, 1, VOCAB)
    assert_close(got.y, want.y)
    assert all(same_routes(*pair) for pair in zip(got.routings, want.routings, strict=True))
    assert_close(Decode(model, cut.cache, LENGTH)(ids_BN).y, Decode(model, whole.cache, LENGTH)(ids_BN).y)
    if not cut.cache.in_order:  # places of states before the last one depend on the cut
        same_caches(cut.cache, whole.cache)


@pytest.mark.thinned(1)
@all_models
@chunked
def test_a_context_in_chunks_is_the_whole(options: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of decoding: its routes and every step; some sequences at a time, too."""
    model, ids_BN = decoder(**options), ids(3, LENGTH + 3)
    want, want_context = decoding(model, ids_BN, LENGTH)
    steps = stepped(want, ids_BN)
    for at_once in (1, 1 << 14):
        monkeypatch.setattr(serving, "_TOKENS_AT_ONCE", at_once)
        got = Decode(model, model.make_cache(3, LENGTH + 3), LENGTH, chunk=chunk)
        context = got.fill(ids_BN)
        assert all(same_routes(*pair) for pair in zip(context, want_context, strict=True))
        assert_close(logits_of(stepped(got, ids_BN)), logits_of(steps))


@pytest.mark.parametrize(
    ("length", "chunk", "sizes"),
    [
        pytest.param(9, None, [9], id="whole"),
        pytest.param(9, 4, [4, 4, 1], id="shorter last"),
        pytest.param(8, 4, [4, 4], id="divides"),
        pytest.param(3, 4, [3], id="longer"),
    ],
)
def test_no_pass_has_more_tokens_than_a_chunk(length: int, chunk: int | None, sizes: list[int]) -> None:
    """Of each sequence, one after the other; a router is asked pass by pass, and told the tokens at hand."""
    assert [len(part) for part in serving.chunks(length, chunk)] == sizes
    model, ids_BS = decoder(router=Seen), ids(2, length)
    CONTEXTS.clear()
    Prefill(model, model.make_cache(2, length), chunk)(ids_BS)
    asked = [ctx for ctx in CONTEXTS if ctx.layer == 0]
    tokens = [ctx.token_ids_T.view(2, -1) for ctx in asked if ctx.token_ids_T is not None]
    assert [part.shape[1] for part in tokens] == sizes and torch.equal(torch.cat(tokens, 1), ids_BS)
    assert {ctx.phase for ctx in asked} == {"prefill"}


def test_logits_are_computed_of_the_last_position_alone() -> None:
    """Of a prefill, whole or in chunks; of a context none."""
    model, ids_BN, rows = decoder(), ids(2, 9), []
    model.head.register_forward_pre_hook(lambda _, given: rows.append(tuple(given[0].shape)))
    for chunk in (None, 4):
        Prefill(model, model.make_cache(2, 9), chunk)(ids_BN)
        Decode(model, model.make_cache(2, 9), 8, chunk=chunk).fill(ids_BN)
    assert rows == [(2, 1, 32)] * 2


@pytest.mark.parametrize("chunk", [pytest.param(None, id="whole"), pytest.param(4, id="chunk4")])
def test_a_forced_routing_goes_to_the_tokens_that_it_is_of(chunk: int | None) -> None:
    """Each chunk has its own part: another routing of one token changes the logits as it does in the whole."""
    model, ids_BS = decoder(), ids(3, 9)
    prefill = Prefill(model, model.make_cache(3, 9), chunk)
    free = prefill(ids_BS)
    assert_close(prefill(ids_BS, free.routings).y, free.y)
    for token in (0, 8, 13, 26):  # of the first, second and third sequence
        moved = [Routing(routing.expert_ids_TK.clone(), routing.weights_TK) for routing in free.routings]
        for routing in moved:
            routing.expert_ids_TK[token] = (routing.expert_ids_TK[token] + 1) % E
        want = model(ids_BS, moved).y[:, -1:]
        assert_close(prefill(ids_BS, moved).y, want)
        assert float((want - free.y)[token // 9].abs().max()) > 1e-4


def marked(rows: Sequence[tuple[int, int]], width: int) -> Routing:
    """A routing whose ids tell (sequence, position), with weights that follow from them."""
    ids_TK = torch.tensor([[100 * b + t] * width for b, t in rows], dtype=torch.int32)
    return Routing(ids_TK, ids_TK.float() / 7)


@pytest.mark.parametrize("widths", list(itertools.product((1, 2, 3), repeat=2)), ids=str)
@batches
def test_whole_routing_goes_by_sequence_and_position(widths: tuple[int, int], batch: int) -> None:
    """Contexts come by sequence, steps by step; rows as wide as the widest, unused slots -1 and 0."""
    context = marked([(b, t) for b in range(batch) for t in range(3)], widths[0])
    steps = [marked([(b, t) for b in range(batch)], widths[1]) for t in (3, 4)]
    whole, width = whole_routing(context, steps, batch), max(widths)
    assert whole.expert_ids_TK.shape == whole.weights_TK.shape == (5 * batch, width)
    assert whole.expert_ids_TK.dtype == torch.int32 and whole.weights_TK.dtype == torch.float32
    assert whole.expert_ids_TK[:, 0].tolist() == [100 * b + t for b in range(batch) for t in range(5)]
    for row in range(5 * batch):
        used = widths[0] if row % 5 < 3 else widths[1]
        ids_K, weights_K = whole.expert_ids_TK[row], whole.weights_TK[row]
        assert ids_K[:used].eq(ids_K[0]).all() and torch.equal(weights_K[:used], ids_K[:used].float() / 7)
        assert ids_K[used:].eq(-1).all() and weights_K[used:].eq(0).all()


class Uneven(SoftmaxTopK):
    """One expert per token in passes of an odd number of tokens, else K: parts of a context may differ in width."""

    def select(self, logits_TE: Tensor, ctx: RouteContext = NO_CONTEXT) -> Routing:
        routing = super().select(logits_TE, ctx)
        width = 1 if len(logits_TE) % 2 else self.top_k
        return Routing(routing.expert_ids_TK[:, :width].contiguous(), routing.weights_TK[:, :width].contiguous())


def test_parts_of_a_context_may_differ_in_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrower one is filled up with unused slots."""
    monkeypatch.setattr(serving, "_TOKENS_AT_ONCE", 6)
    for routing in decoding(decoder(router=Uneven), ids(3, 4), 3)[1]:
        assert routing.expert_ids_TK.shape == (9, K)
        assert routing.expert_ids_TK[:6].ge(0).all() and routing.expert_ids_TK[6:, 0].ge(0).all()
        assert routing.expert_ids_TK[6:, 1:].eq(-1).all() and routing.weights_TK[6:, 1:].eq(0).all()


@needs_cxx
@pytest.mark.slow
def test_a_step_compiles_as_one_graph_and_for_all_positions() -> None:
    """torch.compile without a break: the position is read on the device, so one graph serves every step."""
    model, ids_BN = decoder(windows=[None, 4, None]), ids(2, 8)
    decode, _ = decoding(model, ids_BN, 3)
    with torch.inference_mode():
        want = logits_of(stepped(decode, ids_BN))
        compiled = torch.compile(decode, fullgraph=True)
        got = []
        with torch.compiler.set_stance("default"):
            got.append(compiled(ids_BN).y)
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(decode.n_steps - 1):
                decode.advance()
                got.append(compiled(ids_BN).y)
    assert_close(torch.cat(got, dim=1), want)
