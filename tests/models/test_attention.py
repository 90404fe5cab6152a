"""models/attention.py: attention re-derived in float64, and the properties of rotary positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.models.attend import attend
from moe_lab.models.attention import Attention
from moe_lab.models.layers import project_together
from moe_lab.models.parameters import initialize, reference_twin, shareable
from moe_lab.models.rope import rope_tables
from moe_lab.ops.library import HAS_TRITON
from moe_lab.ops.rotate import rotate
from moe_lab.runs.build import build_model
from tests import tiny

CPU = torch.device("cpu")
THETA = 10000.0


def attention_of(
    d_model: int = 24, n_heads: int = 4, n_kv_heads: int = 4, head_dim: int = 6, qk_norm: str = "none", **more: Any
) -> Attention:
    attention = Attention(d_model, n_heads, n_kv_heads, head_dim, qk_norm, 1e-6, **more)
    initialize(attention, seed=2)
    return attention


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turned(vector: Tensor, position: int) -> Tensor:
    """RoPE by its definition: dimension i with i + d/2, by the angle position * theta^(-2i/d)."""
    d = len(vector)
    result = vector.clone()
    for i in range(d // 2):
        angle = position * THETA ** (-2 * i / d)
        a, b = vector[i], vector[i + d // 2]
        result[i] = a * math.cos(angle) - b * math.sin(angle)
        result[i + d // 2] = a * math.sin(angle) + b * math.cos(angle)
    return result


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rederived(attention: Attention, x_BSD: Tensor) -> Tensor:
    """One sequence, one head, one query at a time, in float64."""
    x = x_BSD.double()
    d, qk_norm = attention.head_dim, attention.qk_norm
    q, k, v = (x @ projection.weight.double().T for projection in (attention.q, attention.k, attention.v))
    if qk_norm == "full":
        q, k = normed(q, attention.q_norm.weight.double()), normed(k, attention.k_norm.weight.double())
    B, S, _ = x.shape
    q, k, v = (part.view(B, S, -1, d) for part in (q, k, v))
    if qk_norm == "head":
        q, k = normed(q, attention.q_norm.weight.double()), normed(k, attention.k_norm.weight.double())
    heads, shared_by = q.shape[2], q.shape[2] // k.shape[2]
    y = torch.zeros(B, S, heads, d, dtype=torch.float64)
    for b in range(B):
        for h in range(heads):
            kv = h // shared_by
            for s in range(S):
                scores = torch.stack(
                    [turned(q[b, s, h], s) @ turned(k[b, t, kv], t) / math.sqrt(d) for t in range(s + 1)]
                )
                y[b, s, h] = scores.softmax(0) @ v[b, : s + 1, kv]
    return y.flatten(2) @ attention.o.weight.double().T


@pytest.mark.parametrize("shared", [pytest.param(False, id="values"), pytest.param(True, id="values_are_keys")])
def test_values_may_be_normed_and_be_the_keys(shared: bool) -> None:
    """Each head without weights; the keys as they are projected, before their norm and rotation."""
    attention = Attention(24, 4, 2, 6, "head", 1e-6, qkv_bias=True, value_norm=True, values_are_keys=shared)
    usual = Attention(24, 4, 2, 6, "head", 1e-6, qkv_bias=True)
    initialize(usual, seed=2)
    assert (attention.v is None) == shared
    if shared:
        usual.v.load_state_dict(usual.k.state_dict())
    attention.load_state_dict({key: value for key, value in usual.state_dict().items() if not (shared and "v." in key)})
    x_BSD, turns = random(2, 5, 24), rope_tables(5, 6, THETA, CPU)
    projected = usual.v.forward
    usual.v.forward = lambda x: normed(projected(x).unflatten(2, (2, 6)), torch.ones(6)).flatten(2)
    torch.testing.assert_close(attention(x_BSD, *turns), usual(x_BSD, *turns))


@pytest.mark.parametrize("qk_norm", [pytest.param(kind, id=kind) for kind in ("none", "head", "full")])
@pytest.mark.parametrize("n_kv_heads", [pytest.param(n, id=f"kv{n}") for n in (1, 2, 4)])
def test_attention_is_its_definition_in_float64(qk_norm: str, n_kv_heads: int) -> None:
    """Projections, norms, rotation, causal softmax of each head, output projection."""
    attention, x_BSD = attention_of(n_kv_heads=n_kv_heads, qk_norm=qk_norm), random(2, 5, 24)
    y_BSD = attention(x_BSD, *rope_tables(5, 6, THETA, CPU))
    torch.testing.assert_close(y_BSD.double(), rederived(attention, x_BSD), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")])
@pytest.mark.parametrize("window", [pytest.param(w, id=f"window={w}") for w in (None, 1, 3, 50)])
@pytest.mark.parametrize("n_kv_heads", [pytest.param(n, id=f"kv{n}") for n in (1, 2, 4)])
@pytest.mark.parametrize("scale", [pytest.param(None, id="plain"), pytest.param(0.7, id="scaled")])
def test_sinks_take_their_share_of_every_softmax(
    scale: float | None, n_kv_heads: int, window: int | None, dtype: torch.dtype
) -> None:
    """A column more for each head, which is dropped: of all tokens at once, and of some that go on from a cache."""
    d, S = 6, 9
    q, k, v = (random(2, n, S, d, seed=n).to(dtype) for n in (4, n_kv_heads, n_kv_heads))
    v, sinks_H = v + 1, random(4, seed=9).to(dtype)
    scores = q.double() @ k.double().repeat_interleave(4 // n_kv_heads, 1).mT * (scale or d**-0.5)
    at_S1, key_S = torch.arange(S).view(-1, 1), torch.arange(S)
    seen_SS = (key_S <= at_S1) & (key_S > at_S1 - (window or S))
    columns = torch.cat(
        [scores.masked_fill(~seen_SS, -torch.inf), sinks_H.double().view(1, 4, 1, 1).expand(2, 4, S, 1)], -1
    )
    want = columns.softmax(-1)[..., :-1] @ v.double().repeat_interleave(4 // n_kv_heads, 1)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(attend(q, k, v, None, window, scale, sinks_H).double(), want, **close)
    for positions in ([4], [0], [8], [2, 3, 4]):
        y = attend(q[:, :, positions], k, v, torch.tensor(positions), window, scale, sinks_H)
        torch.testing.assert_close(y.double(), want[:, :, positions], **close)


def test_head_width_need_not_divide_the_model_width() -> None:
    """An explicit head_dim, as in Qwen3."""
    attention, x_BSD = attention_of(d_model=10, n_heads=3, n_kv_heads=3, head_dim=8), random(1, 4, 10)
    y_BSD = attention(x_BSD, *rope_tables(4, 8, THETA, CPU))
    torch.testing.assert_close(y_BSD.double(), rederived(attention, x_BSD), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_kv_heads", [pytest.param(n, id=f"kv{n}") for n in (1, 2)])
def test_shared_key_heads_are_full_attention_with_them_repeated(n_kv_heads: int) -> None:
    """Grouped queries: head h reads key head h // (heads / kv_heads)."""
    few, full = attention_of(n_kv_heads=n_kv_heads), attention_of(n_kv_heads=4)
    for name in ("k", "v"):
        weight_HdD = getattr(few, name).weight.view(n_kv_heads, 6, 24)
        getattr(full, name).weight.copy_(weight_HdD.repeat_interleave(4 // n_kv_heads, 0).reshape(24, 24))
    x_BSD, rope = random(2, 7, 24), rope_tables(7, 6, THETA, CPU)
    torch.testing.assert_close(few(x_BSD, *rope), full(x_BSD, *rope), rtol=1e-5, atol=1e-6)


def test_a_token_sees_no_later_token() -> None:
    """Changing token t changes nothing before t, and t itself."""
    attention, x_BSD, rope = attention_of(), random(1, 6, 24), rope_tables(6, 6, THETA, CPU)
    before = attention(x_BSD, *rope)
    changed_BSD = x_BSD.clone()
    changed_BSD[:, 3] += 1
    after = attention(changed_BSD, *rope)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any(-1).all()


def test_a_single_token_attends_to_itself_alone() -> None:
    """B = S = 1: the output is o(v(x)), whatever the queries."""
    attention, x_BSD = attention_of(), random(1, 1, 24)
    want = attention.o(attention.v(x_BSD))
    torch.testing.assert_close(attention(x_BSD, *rope_tables(1, 6, THETA, CPU)), want, rtol=1e-5, atol=1e-6)


def test_only_the_distance_of_positions_matters() -> None:
    """Positions 40 .. 46 give what positions 0 .. 6 give."""
    attention, x_BSD = attention_of(), random(2, 7, 24)
    cos_Sd, sin_Sd = rope_tables(47, 6, THETA, CPU)
    torch.testing.assert_close(
        attention(x_BSD, cos_Sd[40:], sin_Sd[40:]), attention(x_BSD, cos_Sd[:7], sin_Sd[:7]), rtol=1e-4, atol=1e-5
    )


def test_positions_matter() -> None:
    """The last token of a sequence tells an order of the others from another."""
    attention, x_BSD, rope = attention_of(), random(1, 4, 24), rope_tables(4, 6, THETA, CPU)
    swapped_BSD = x_BSD[:, [1, 0, 2, 3]]
    difference = attention(x_BSD, *rope)[:, 3] - attention(swapped_BSD, *rope)[:, 3]
    assert float(difference.abs().max()) > 1e-3


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="plain"),
        pytest.param({"qkv_bias": True}, id="biases"),
        pytest.param({"qk_norm": "full"}, id="norm of all"),
        pytest.param({"qk_norm": "head", "turn_first": True}, id="norm after the turn"),
        pytest.param({"output_gate": True}, id="output_gate"),
    ],
)
def test_one_product_and_one_turn_are_the_same(more: dict[str, Any], device: torch.device) -> None:
    """With the kernels, and without: the projections lie together until something moves them."""
    with torch.device(device):
        attention = attention_of(**more)
    x_BSD = random(2, 7, 24).to(device)
    rope = rope_tables(7, 6, THETA, device)
    want = attention(x_BSD, *rope)
    attention.fuses = True
    torch.testing.assert_close(attention(x_BSD, *rope), want, rtol=1e-5, atol=1e-5)


def test_the_projections_of_every_model_lie_together() -> None:
    """Of one that is filled, of one that shares its parameters, and of the reference: each is one product."""
    cfg = tiny.decoder_moe("dtype=bf16")
    first = build_model(cfg)
    for model in (first, build_model(cfg, donor=shareable(first)), reference_twin(first)):
        attentions = [module for module in model.modules() if isinstance(module, Attention)]
        assert len(attentions) == tiny.LAYERS
        for attention in attentions:
            parts = project_together(random(2, tiny.D), attention.q, attention.k, attention.v)
            assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


def test_kernels_compute_where_they_can_and_never_the_reference() -> None:
    """Decided by the device."""
    attention = attention_of()
    for device, dtype, fuses, joins in (
        ("cuda", torch.float32, HAS_TRITON, HAS_TRITON),
        ("cpu", torch.float32, False, False),
        ("cpu", torch.bfloat16, False, True),
    ):
        attention.to(dtype).compute_on(torch.device(device))
        assert (attention.fuses, attention.joins) == (fuses, joins)
    attention.compute_on(torch.device("cuda"))
    attention.use_reference()
    assert not attention.fuses and not attention.joins


def test_a_step_on_a_cpu_has_one_product_for_queries_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which gives what three do."""
    linear, calls = F.linear, []
    monkeypatch.setattr(F, "linear", lambda *arguments: calls.append(arguments) or linear(*arguments))
    attention, x_B1D = attention_of(), random(2, 1, 24)
    rope, position_1 = rope_tables(1, 6, THETA, torch.device("cpu")), torch.tensor([3])
    ys, products = [], []
    for joins in (False, True):
        attention.joins = joins
        calls.clear()
        ys.append(attention(x_B1D, *rope, attention.make_cache(2, 5), position_1))
        products.append(len(calls))
    torch.testing.assert_close(ys[1], ys[0], rtol=1e-5, atol=1e-6)
    assert products == [4, 2]


@pytest.mark.parametrize("qk_norm", [pytest.param(kind, id=kind) for kind in ("head", "full")])
def test_normed_queries_and_keys_forget_their_size(qk_norm: str) -> None:
    """Attention weights stay when q and k grow tenfold; without the norm they do not."""
    x_BSD, rope = random(1, 5, 24), rope_tables(5, 6, THETA, CPU)
    changes = {}
    for kind in (qk_norm, "none"):
        attention = attention_of(qk_norm=kind)
        before = attention(x_BSD, *rope)
        attention.q.weight.mul_(10)
        attention.k.weight.mul_(10)
        changes[kind] = float((attention(x_BSD, *rope) - before).abs().max())
    assert changes[qk_norm] < 1e-4 < 1e-2 < changes["none"]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), position=st.integers(0, 500), distance=st.integers(0, 500))
def test_a_product_of_turned_vectors_depends_on_their_distance_alone(seed: int, position: int, distance: int) -> None:
    """<R(m) q, R(n) k> = <R(m - n) q, k>, and a turn keeps the length."""
    q, k = random(2, 8, seed=seed).double()
    cos_Sd, sin_Sd = rope_tables(1001, 8, THETA, CPU)

    def turn(x: Tensor, at: int) -> Tensor:
        return rotate(x.float().view(1, 1, 1, 8), cos_Sd[at : at + 1], sin_Sd[at : at + 1]).flatten().double()

    product = turn(q, position + distance) @ turn(k, position)
    assert float(product) == pytest.approx(float(turn(q, distance) @ turn(k, 0)), abs=2e-3)
    assert float(turn(q, position).norm()) == pytest.approx(float(q.norm()), rel=1e-5)
    assert torch.equal(turn(k, 0), k)


@pytest.mark.parametrize("position", [pytest.param(p, id=f"p{p}") for p in (0, 1, 17)])
def test_turning_pairs_a_dimension_with_that_half_the_width_further(position: int) -> None:
    """The layout of Llama's checkpoints, against the definition one pair at a time."""
    x = random(10)
    cos_Sd, sin_Sd = rope_tables(18, 10, THETA, CPU)
    at = slice(position, position + 1)
    got = rotate(x.view(1, 1, 1, 10), cos_Sd[at], sin_Sd[at]).flatten()
    torch.testing.assert_close(got.double(), turned(x.double(), position), rtol=1e-5, atol=1e-5)


def test_turning_is_done_in_fp32_and_returned_in_the_inputs_dtype() -> None:
    """A bf16 product with a bf16 cosine would lose a far position."""
    x = random(1, 2, 900, 8).bfloat16()
    tables = rope_tables(900, 8, THETA, CPU)
    assert rotate(x, *tables).dtype == torch.bfloat16
    assert torch.equal(rotate(x, *tables), rotate(x.float(), *tables).bfloat16())


def test_tables_of_a_longer_sequence_begin_with_those_of_a_shorter() -> None:
    """A position's angle does not depend on the length."""
    for long, short in zip(rope_tables(50, 6, THETA, CPU), rope_tables(7, 6, THETA, CPU), strict=True):
        assert torch.equal(long[:7], short)
        assert long.dtype == torch.float32


def test_a_larger_base_turns_slower() -> None:
    """theta is the base of the wavelengths: all but the first pair turn less."""
    slow, fast = (rope_tables(2, 8, theta, CPU)[1][1, :4] for theta in (1e6, 1e2))
    assert slow[0] == fast[0]
    assert (slow[1:] < fast[1:]).all()


@pytest.mark.parametrize("n_kv_heads", [pytest.param(n, id=f"kv{n}") for n in (1, 4)])
def test_the_gate_of_the_output_is_a_sigmoid_of_further_rows(n_kv_heads: int) -> None:
    """Of each dimension of each head, before the last projection."""
    plain = attention_of(n_kv_heads=n_kv_heads)
    gated = Attention(24, 4, n_kv_heads, 6, "none", 1e-6, output_gate=True)
    initialize(gated, seed=2)
    for name in ("k", "v", "o"):
        getattr(gated, name).weight.copy_(getattr(plain, name).weight)
    gated.q.weight[:24].copy_(plain.q.weight)
    x, tables = random(2, 5, 24), rope_tables(5, 6, THETA, CPU)
    heads: list[Tensor] = []
    handle = plain.o.register_forward_pre_hook(lambda _, given: heads.append(given[0]))
    plain(x, *tables)
    handle.remove()
    want = (heads[0] * (x @ gated.q.weight[24:].T).sigmoid()) @ plain.o.weight.T
    torch.testing.assert_close(gated(x, *tables), want)
