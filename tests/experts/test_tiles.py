"""experts/tiles.py: the tiles of the kernels of experts=fused, and the model that chooses them."""

from __future__ import annotations

from itertools import pairwise
from math import ceil
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_lab.errors import UnavailableError
from moe_lab.experts import tiles as module
from moe_lab.experts.table import Choice, Shape
from moe_lab.experts.tiles import (
    DEPTH,
    KINDS,
    ONE_TOKEN,
    PIECES,
    Tiles,
    candidates,
    gpu_of,
    predicted_s,
    ranked,
    require_offered_for,
    takes_one_token,
    tiles_for,
)
from tests import tiny

H200 = gpu_of("NVIDIA H200", 132)
SHAPES = {
    "demo": Shape(8, 2, 512, 2048),
    "olmoe": Shape(64, 8, 2048, 1024),
    "qwen3": Shape(128, 8, 2048, 768),
    "mixtral": Shape(8, 2, 4096, 14336),
    "deepseek_v3": Shape(256, 8, 7168, 2048),
}
REAL = pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in SHAPES.items()])
WIDTHS = st.integers(1, 900).map(lambda n: 16 * n)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    E = draw(st.integers(1, 512))
    return Shape(E, draw(st.integers(1, min(E, 32))), draw(WIDTHS), draw(WIDTHS))


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes(),
    T=st.integers(0, 1 << 17),
    multiprocessors=st.integers(1, 160),
    name=st.sampled_from(["NVIDIA H200", "NVIDIA H20", "NVIDIA H200 MIG 1g.18gb", ""]),
    dtype=st.sampled_from(["bf16", "fp16"]),
)
def test_tiles_are_valid_for_any_shape(shape: Shape, T: int, multiprocessors: int, name: str, dtype: str) -> None:
    """Sizes that the kernels have; no piece of the sum over F is empty."""
    found = tiles_for(name, multiprocessors, dtype, T, *shape)
    if found == ONE_TOKEN:
        assert T == 1 and takes_one_token(shape)
        return
    assert found.up_tokens in KINDS[found.up_rows].tokens and found.down_tokens in KINDS[found.down_rows].tokens
    assert found.pieces == 1 or (found.pieces in PIECES and KINDS[found.down_rows].splits)
    steps = ceil(shape.F / DEPTH)
    of_a_piece = ceil(steps / found.pieces)
    assert (found.pieces - 1) * of_a_piece < steps <= found.pieces * of_a_piece


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), T=st.integers(1, 1 << 15), tiles=st.sampled_from(candidates(4096)), more=st.integers(2, 4))
@example(shape=Shape(E=1, K=1, D=48, F=64), T=5, tiles=Tiles(128, 16, 128, 16, 1), more=4)
def test_more_work_never_takes_less_time(shape: Shape, T: int, tiles: Tiles, more: int) -> None:
    """Of the model: more tokens, wider matrices; a GPU that is faster at both, or nothing to do."""
    seconds = predicted_s(H200, shape, T, tiles)
    # Whole waves and padding make small steps back, which in the smallest layers are up to 0.2 us.
    allowed = 0.9 * seconds - 2e-7
    assert 0 < seconds < float("inf")
    assert predicted_s(H200, shape, more * T, tiles) >= allowed
    assert predicted_s(H200, shape._replace(D=more * shape.D), T, tiles) >= allowed
    assert predicted_s(H200, shape._replace(F=more * shape.F), T, tiles) >= allowed
    faster = H200._replace(bytes_s=more * H200.bytes_s, flop_s=more * H200.flop_s)
    assert predicted_s(faster, shape, T, tiles) <= seconds
    assert predicted_s(H200, shape, 0, tiles) == 0


@settings(max_examples=60, deadline=None)
@given(E=st.integers(1, 300), K=st.integers(1, 300), T=st.integers(0, 30000))
@example(E=7, K=7, T=3)
@example(E=7, K=7, T=0)
def test_tokens_are_expected_where_they_go(E: int, K: int, T: int) -> None:
    """Over all experts T * K tokens, at as many experts as random choices reach."""
    K = min(K, E)
    counts = module._counts(T, K, E)
    assert sum(count * experts for count, experts in counts) == pytest.approx(T * K, rel=1e-5)
    assert sum(experts for _, experts in counts) == pytest.approx(E * (1 - (1 - K / E) ** T), rel=1e-5)
    for most in (16, 48, 64, 192):
        widths = list(module._widths(Shape(E, K, 16, 16), T, most))
        assert all(16 <= width <= most and width % 16 == 0 for width, _ in widths)
        assert sum(width * number for width, number in widths) >= T * K * (1 - 1e-5)


def test_an_expert_is_dealt_out_evenly() -> None:
    """All 300 tokens at one expert: two tiles of 160 where 192 fit, three of 112 where 128 do."""
    shape = Shape(1, 1, 64, 64)
    assert list(module._widths(shape, 300, 192)) == [(160, 2.0)]
    assert list(module._widths(shape, 300, 128)) == [(112, 3.0)]
    assert list(module._widths(shape, 300, 16)) == [(16, 19.0)]


@REAL
def test_one_token_costs_the_weights_of_its_experts(shape: Shape) -> None:
    """Hardly more than reading them, but for the small layer, which cannot occupy the GPU; no kernel sorts."""
    best = ranked(H200, shape, 1, candidates(shape.F))[0]
    floor_s = shape.K * 3 * shape.D * shape.F * 2 / H200.bytes_s
    assert best.down_tokens == 16 and best.down_rows < 256 and best.up_tokens == KINDS[best.up_rows].tokens[0]
    assert 1 <= predicted_s(H200, shape, 1, best) / floor_s < (2.2 if shape == SHAPES["demo"] else 1.3)


@REAL
def test_many_tokens_cost_their_products(shape: Shape) -> None:
    """At 16,384 tokens wide tiles are best, within a third of the peak's time."""
    best = ranked(H200, shape, 16384, candidates(shape.F))[0]
    floor_s = 16384 * shape.K * 6 * shape.D * shape.F / H200.flop_s
    assert min(best.up_tokens, best.down_tokens) >= 128
    assert 1 <= predicted_s(H200, shape, 16384, best) / floor_s < 1.33


def test_a_narrow_output_is_cut_into_more_tiles() -> None:
    """The demo's down projection has 512 rows: two tiles of 256 an expert leave most multiprocessors idle."""
    demo, mixtral = SHAPES["demo"], SHAPES["mixtral"]
    assert ranked(H200, demo, 512, candidates(demo.F))[0].pieces > 1
    assert ranked(H200, mixtral, 512, candidates(mixtral.F))[0].pieces == 1


def test_fewer_multiprocessors_want_fewer_pieces() -> None:
    """A slice of a GPU is full sooner."""
    demo = SHAPES["demo"]
    pieces = [ranked(gpu_of("slice", n), demo, 64, candidates(demo.F))[0].pieces for n in (132, 8)]
    assert pieces[0] > pieces[1] == 1


def test_a_gpu_is_known_by_its_name_or_taken_for_a_part_of_an_h100() -> None:
    """Half as many multiprocessors reach half of both rates."""
    assert gpu_of("NVIDIA H100 80GB HBM3", 132) == pytest.approx(gpu_of("NVIDIA Unheard Of", 132))
    assert gpu_of("NVIDIA Unheard Of", 66)[:3] == pytest.approx([rate / 2 for rate in gpu_of("?", 132)[:3]])
    assert gpu_of("NVIDIA H20", 78).flop_s < 0.2 * gpu_of("NVIDIA H200", 132).flop_s


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that knows the demo's shape at 8 and at 512 tokens, with choices that the model would not make."""
    from moe_lab.experts import table

    choices = [Choice(8, "grouped", (256, 192, 256, 16, 1)), Choice(512, "fused", (128, 16, 256, 192, 8))]
    key = ("bf16", SHAPES["demo"])
    monkeypatch.setattr(table, "_choices", lambda name: {key: choices} if name == "NVIDIA H200" else {})
    tiles_for.cache_clear()
    yield
    tiles_for.cache_clear()


@pytest.mark.usefixtures("measured")
def test_the_table_comes_before_the_model() -> None:
    """At its T's what it says, even where grouped is faster; between them one of both; beyond them the model."""
    demo = SHAPES["demo"]

    def at(T: int, name: str = "NVIDIA H200", dtype: str = "bf16") -> Tiles:
        return tiles_for(name, 132, dtype, T, *demo)

    few, many = Tiles(256, 192, 256, 16, 1), Tiles(128, 16, 256, 192, 8)
    assert (at(8), at(512)) == (few, many)
    assert at(9) == min(few, many, key=lambda tiles: predicted_s(H200, demo, 9, tiles))
    assert at(511) == min(few, many, key=lambda tiles: predicted_s(H200, demo, 511, tiles))
    for T, name, dtype in ((7, "NVIDIA H200", "bf16"), (513, "NVIDIA H200", "bf16"), (8, "NVIDIA H200", "fp16")):
        assert at(T, name, dtype) == ranked(H200, demo, T, candidates(demo.F))[0] not in (few, many)
    other = gpu_of("NVIDIA H100 NVL", 132)
    assert at(8, "NVIDIA H100 NVL") == ranked(other, demo, 8, candidates(demo.F))[0]


def test_the_ranking_is_that_of_the_prediction() -> None:
    """All candidates, the fastest first."""
    shape = SHAPES["qwen3"]
    order = ranked(H200, shape, 512, candidates(shape.F))
    assert sorted(order) == sorted(candidates(shape.F))
    seconds = [predicted_s(H200, shape, 512, tiles) for tiles in order]
    assert all(one <= other for one, other in pairwise(seconds))


def test_another_dtype_is_not_chosen_for() -> None:
    """The kernels have two."""
    with pytest.raises(AssertionError, match="fp32"):
        tiles_for("NVIDIA H200", 132, "fp32", 8, *SHAPES["demo"])


def test_the_choice_needs_no_torch() -> None:
    """It stands in plans, which load none."""
    code = (
        "import sys\nfrom moe_lab.experts.table import Shape, fastest\nfrom moe_lab.experts.tiles import tiles_for\n"
        "chosen = fastest('NVIDIA H200', 'bf16', Shape(8, 2, 512, 2048), 7)\n"
        "print(chosen, len(tiles_for('NVIDIA H200', 132, 'bf16', 7, 8, 2, 512, 2048)), 'torch' in sys.modules)"
    )
    assert tiny.python(code).split() == ["fused", "5", "False"]


def times(shape: Shape, T: int, *choices: Any) -> list[float]:
    return [predicted_s(H200, shape, T, Tiles(*choice)) for choice in choices]


def test_pieces_are_paid_for() -> None:
    """Where all multiprocessors are busy anyway, their partial sums only cost."""
    whole, split = times(SHAPES["olmoe"], 16384, (256, 192, 128, 64, 1), (256, 192, 128, 64, 4))
    assert split > 1.05 * whole


def test_one_tile_more_than_multiprocessors_is_a_wave_more() -> None:
    """133 tiles of long products take nearly twice as long as 132."""
    full, over = (module._up_s(H200, Shape(1, 1, 16384, 128 * number), 192, 256, 192) for number in (132, 133))
    assert over > 1.7 * full


def test_more_blocks_hide_the_stores_that_one_shows() -> None:
    """With short sums tiles of 128 rows are faster than those of 256 with as many tokens, with long ones slower."""
    short, long = Shape(8, 2, 8192, 64), Shape(8, 2, 8192, 8192)
    (wide, narrow), (wide_long, narrow_long) = (
        times(shape, 4096, (256, 192, 256, 64, 1), (256, 192, 128, 64, 1)) for shape in (short, long)
    )
    assert narrow < wide and narrow_long > wide_long


def test_few_slots_are_sorted_by_those_who_multiply() -> None:
    """At 1024 slots tiles of 256 rows need one kernel more; at 1025 all do."""
    few, many = (times(Shape(8, 1, 64, 64), T, (128, 64, 128, 64, 1), (128, 64, 256, 64, 1)) for T in (1024, 1025))
    assert few[1] - few[0] == pytest.approx(many[1] - many[0] + H200.sort_s, abs=1e-7)


def test_a_block_beside_others_draws_its_part_alone() -> None:
    """66 tiles of 128 rows take as long as 132, for half of the blocks stay away; 66 of 256 rows do not."""
    narrow = [module._up_s(H200, Shape(1, 1, 16384, 64 * number), 1, 128, 16) for number in (66, 132)]
    wide = [module._up_s(H200, Shape(1, 1, 16384, 128 * number), 1, 256, 64) for number in (66, 132)]
    assert narrow[1] < 1.1 * narrow[0] and wide[1] > 1.5 * wide[0]


def test_one_token_has_a_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As measured; where nobody measured, if it may; never for two tokens, whatever was measured for one."""
    shape = SHAPES["olmoe"]
    assert tiles_for("unknown", 132, "bf16", 1, *shape) == ONE_TOKEN
    for large in (shape._replace(K=33), shape._replace(D=50_016), shape._replace(K=8, F=6256)):
        assert tiles_for("unknown", 132, "bf16", 1, *large) != ONE_TOKEN
        with pytest.raises(UnavailableError, match="tiles=1-1-1-1-1: is for one token"):
            require_offered_for(ONE_TOKEN, large, 1)
    with pytest.raises(UnavailableError, match="not T=2, K=8"):
        require_offered_for(ONE_TOKEN, shape, 2)
    require_offered_for(ONE_TOKEN, shape, 1)
    wide = Tiles(256, 64, 256, 64, 1)
    tables = {"of one": [Choice(1, "fused", ONE_TOKEN), Choice(8, "fused", wide)], "wide": [Choice(1, "fused", wide)]}
    monkeypatch.setattr(module, "neighbours", lambda name, dtype, shape, T: tables[name][: 1 if T == 1 else 2])
    tiles_for.cache_clear()
    found = [tiles_for(name, 132, "bf16", T, *shape) for name, T in (("of one", 1), ("of one", 4), ("wide", 1))]
    tiles_for.cache_clear()
    assert found == [ONE_TOKEN, wide, wide]
