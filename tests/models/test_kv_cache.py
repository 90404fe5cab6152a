"""models/kv_cache.py: keys, values and states in memory that is allocated once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_lab.models.kv_cache import KVCache, LayerCache, StateCache

B, H, N, d = 3, 2, 7, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(dtype: torch.dtype = torch.float32) -> LayerCache:
    return LayerCache(torch.zeros(B, H, N, d, dtype=dtype), torch.zeros(B, H, N, d, dtype=dtype))


def cache(layers: int = 2, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache((layer(dtype) for _ in range(layers)), N)


@pytest.mark.parametrize("S", [pytest.param(s, id=f"s{s}") for s in (1, 4, N)])
def test_begin_keeps_the_first_positions_and_touches_no_other(S: int) -> None:
    """Keys and values each in their place."""
    kept, k, v = layer(), random(B, H, S, d), random(B, H, S, d, seed=1)
    kept.begin(k, v)
    assert torch.equal(kept.k_BHNd[:, :, :S], k) and torch.equal(kept.v_BHNd[:, :, :S], v)
    assert not kept.k_BHNd[:, :, S:].any() and not kept.v_BHNd[:, :, S:].any()


@pytest.mark.parametrize(("start", "S"), [pytest.param(*of, id=f"{of}") for of in ((0, 4), (1, 3), (4, 3), (6, 1))])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")])
def test_begin_behind_others_keeps_the_next_and_returns_all_so_far(start: int, S: int, dtype: torch.dtype) -> None:
    """In the same memory and the dtype of the arguments; also of some of the sequences."""
    whole, k, v = cache(dtype=dtype), random(B, H, start + S, d), random(B, H, start + S, d, seed=1)
    if start:
        whole.layers[1].begin(k[:, :, :start], v[:, :, :start])
    for part, rows in ((whole.behind(start), slice(None)), (whole.rows(1, 3).behind(start), slice(1, 3))):
        assert part.start == start and part.length == N and part.rows(0, 1).start == start
        all_k, all_v = part.layers[1].begin(k[rows, :, start:], v[rows, :, start:])
        for got, kept, want in ((all_k, whole.layers[1].k_BHNd, k), (all_v, whole.layers[1].v_BHNd, v)):
            assert got.dtype == torch.float32 and got.shape == want[rows].shape
            assert torch.equal(kept[rows, :, : start + S], want[rows].to(dtype)) and not kept[:, :, start + S :].any()
            assert torch.equal(got, want[rows] if start == 0 else want[rows].to(dtype).float())
    assert not whole.layers[0].k_BHNd.any()


@pytest.mark.parametrize("positions", [pytest.param([0], id="first"), pytest.param([N - 1], id="last")])
def test_put_keeps_one_position_and_returns_all(positions: list[int]) -> None:
    """The others stay as they were."""
    kept = layer()
    before_k, before_v = random(B, H, N, d), random(B, H, N, d, seed=1)
    kept.begin(before_k, before_v)
    k, v, at = random(B, H, 1, d, seed=2), random(B, H, 1, d, seed=3), torch.tensor(positions)
    all_k, all_v = kept.put(k, v, at)
    for before, new, after in ((before_k, k, all_k), (before_v, v, all_v)):
        want = before.clone()
        want[:, :, positions] = new
        assert torch.equal(after, want)
    assert torch.equal(all_k, kept.k_BHNd) and torch.equal(all_v, kept.v_BHNd)


def test_put_keeps_several_positions_in_any_order() -> None:
    """Position s of the arguments belongs to position_S[s]."""
    kept, k, v = layer(), random(B, H, 3, d), random(B, H, 3, d, seed=1)
    all_k, all_v = kept.put(k, v, torch.tensor([5, 0, 3]))
    assert torch.equal(all_k[:, :, [5, 0, 3]], k) and torch.equal(all_v[:, :, [5, 0, 3]], v)
    assert not all_k[:, :, [1, 2, 4, 6]].any()


def test_one_put_after_the_other_is_begin() -> None:
    """Position by position or all at once."""
    one, other, k, v = layer(), layer(), random(B, H, N, d), random(B, H, N, d, seed=1)
    one.begin(k, v)
    for t in range(N):
        other.put(k[:, :, t : t + 1], v[:, :, t : t + 1], torch.tensor([t]))
    assert torch.equal(one.k_BHNd, other.k_BHNd) and torch.equal(one.v_BHNd, other.v_BHNd)


def test_a_bf16_cache_rounds_what_is_put_and_returns_the_arguments_dtype() -> None:
    """The fp32 reference of a bf16 model reads the same cache."""
    kept, k = layer(torch.bfloat16), random(B, H, 1, d)
    all_k, all_v = kept.put(k, 2 * k, torch.tensor([2]))
    assert kept.k_BHNd.dtype == torch.bfloat16 and all_k.dtype == all_v.dtype == torch.float32
    assert torch.equal(all_k[:, :, 2:3], k.bfloat16().float())
    assert torch.equal(all_v[:, :, 2:3], (2 * k).bfloat16().float())
    kept.begin(k, k)
    assert torch.equal(kept.k_BHNd[:, :, :1], k.bfloat16())


@pytest.mark.parametrize(
    ("start", "stop"),
    [pytest.param(0, 1, id="first"), pytest.param(1, 3, id="last_two"), pytest.param(2, 9, id="past_the_end")],
)
def test_rows_are_some_sequences_in_the_same_memory(start: int, stop: int) -> None:
    """What is written into the part is in the whole, and in no other sequence."""
    whole = cache()
    part = whole.rows(start, stop)
    assert part.length == N and len(part.layers) == 2
    n = min(stop, B) - start
    part.layers[1].begin(torch.ones(n, H, 4, d), torch.full((n, H, 4, d), 2.0))
    assert whole.layers[1].k_BHNd.sum() == n * H * 4 * d and whole.layers[1].v_BHNd.sum() == 2 * n * H * 4 * d
    assert torch.equal(whole.layers[1].k_BHNd[start:stop], part.layers[1].k_BHNd)
    assert part.layers[1].k_BHNd.data_ptr() == whole.layers[1].k_BHNd[start].data_ptr()
    assert not whole.layers[0].k_BHNd.any()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=["fp32", "bf16"])
def test_bytes_per_position_are_of_all_sequences_layers_keys_and_values(dtype: torch.dtype, size: int) -> None:
    """Times the length they are what the cache takes."""
    kept = cache(layers=5, dtype=dtype)
    assert kept.bytes_per_position == 5 * 2 * B * H * d * size
    assert kept.bytes_per_position * kept.length == sum(b.untyped_storage().nbytes() for b in kept.buffers())


def test_a_cache_is_part_of_no_state() -> None:
    """It is not saved and has no parameters, and so changes no model that holds it."""
    assert not cache().state_dict() and not list(cache().parameters())


def states(batch: int = B) -> StateCache:
    """One of width d in bf16, one of 2 x d in fp32."""
    shapes = (((d,), torch.bfloat16), ((2, d), torch.float32))
    return StateCache.zeros(batch, shapes, torch.device("cpu"))


def after(position: int, batch: int = B) -> list[Tensor]:
    """The states after a position: its number plus 1 everywhere."""
    return [torch.full((batch, *shape), position + 1.0) for shape in ((d,), (2, d))]


def number(found: list[Tensor]) -> float:
    """What fills all of these states."""
    (value,) = {value for state in found for value in state.float().unique().tolist()}
    return float(value)


def test_before_anything_is_kept_a_state_is_zero() -> None:
    """A sequence without a context begins at position 0."""
    kept = states()
    assert number(kept.before(torch.tensor([0]))) == 0
    kept.put(torch.tensor([0]), *after(0))
    assert number(kept.before(torch.tensor([1]))) == 1 and number(kept.before(torch.tensor([0]))) == 0


@pytest.mark.parametrize("context", [pytest.param(c, id=f"context{c}") for c in (0, 1, 2, 5)])
def test_a_step_finds_the_state_before_it_as_often_as_it_is_taken(context: int) -> None:
    """In order, each step three times, and from the last one back to the first."""
    kept = states()
    if context:
        kept.begin(context, *after(context - 1))
    for _ in range(2):
        for position in range(context, context + 5):
            at = torch.tensor([position])
            for _ in range(3):
                assert number(kept.before(at)) == position
                kept.put(at, *after(position))


def test_several_positions_read_before_the_first_and_keep_after_the_last() -> None:
    """As a pass over some tokens does that goes on from the cache."""
    kept = states()
    kept.begin(4, *after(3))
    assert number(kept.before(torch.tensor([4, 5, 6]))) == 4
    kept.put(torch.tensor([4, 5, 6]), *after(6))
    assert number(kept.before(torch.tensor([7]))) == 7


@pytest.mark.parametrize("lengths", [pytest.param(each, id=f"{each}") for each in ([1, 1, 1], [4, 3], [3, 4, 1])])
def test_parts_of_a_prefill_find_the_state_behind_the_one_before(lengths: list[int]) -> None:
    """And steps behind it that of the last one, as often as they are taken."""
    kept, start = states(), 0
    for length in lengths:
        part = kept.behind(start)
        assert number(part.before(None)) == start
        start += length
        part.keep(length, None, *after(start - 1))
    for _ in range(2):
        for position in range(start, start + 3):
            assert number(kept.before(torch.tensor([position]))) == position
            kept.put(torch.tensor([position]), *after(position))


def test_states_keep_their_dtypes() -> None:
    """Whatever the reference puts into them."""
    kept = states()
    kept.begin(1, *after(0))
    kept.put(torch.tensor([1]), *after(1))
    assert [state.dtype for state in kept.before(torch.tensor([2]))] == [torch.bfloat16, torch.float32]


def test_rows_of_states_are_some_sequences_in_the_same_memory() -> None:
    """Also of where the context ends."""
    whole = KVCache([layer(), states()], N)
    part = whole.rows(1, 3).layers[1]
    part.begin(3, *after(2, batch=2))
    first, second = whole.layers[1].before(torch.tensor([3]))
    assert first[:, 0].tolist() == [0, 3, 3] and second[:, 0, 0].tolist() == [0, 3, 3]


def test_states_do_not_grow_with_the_number_of_positions() -> None:
    """So they stand apart from the bytes of a position, and of three places one counts."""
    kept, plain = KVCache([layer(), states()], N), KVCache([layer()], N)
    assert kept.bytes_per_position == plain.bytes_per_position > 0
    assert (kept.state_bytes, plain.state_bytes) == (B * d * 2 + B * 2 * d * 4, 0)
    assert (kept.in_order, plain.in_order) == (True, False)
