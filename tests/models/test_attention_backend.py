"""models/attention_backend.py: every backend that torch has here computes the definition, and the one that is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.config.schemas import ATTENTIONS
from moe_lab.errors import UnavailableError
from moe_lab.measure.roofline import count_flops
from moe_lab.models import attention_backend
from moe_lab.models.attention import Attention, attend
from moe_lab.models.attention_backend import (
    BACKENDS,
    Call,
    backend_of,
    best_first,
    kind_of,
    softmax_product,
    why_not,
)
from moe_lab.models.latent_attention import LatentAttention
from moe_lab.models.parameters import initialize, reference_twin
from moe_lab.models.rope import rope_tables
from tests.conftest import needs_cxx

CPU = torch.device("cpu")
LENGTHS = [pytest.param(*lengths, id="{} of {}".format(*lengths)) for lengths in ((37, 37), (5, 37), (36, 37), (2, 2))]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def defined(q: Tensor, k: Tensor, v: Tensor, seen_SN: Tensor | None = None) -> Tensor:
    """In float64, all scores made; without a mask the queries are the last of the keys."""
    (S, N), shared = (q.shape[2], k.shape[2]), q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(shared, 1), v.double().repeat_interleave(shared, 1)
    if seen_SN is None:
        seen_SN = torch.arange(N, device=q.device) <= torch.arange(N - S, N, device=q.device).unsqueeze(1)
    scores = (q.double() @ k.mT * q.shape[3] ** -0.5).masked_fill(~seen_SN, -torch.inf)
    return scores.softmax(-1) @ v


def call(device: torch.device = CPU, dtype: torch.dtype = torch.float32, **changed: Any) -> Call:
    sizes = {"heads": 4, "key_heads": 2, "width": 16, "value_width": 16, "kind": "causal"}
    return Call(device, dtype, **{**sizes, **changed})


@pytest.mark.parametrize(("S", "N"), LENGTHS)
@pytest.mark.parametrize("key_heads", [pytest.param(n, id=f"kv{n}") for n in (1, 2, 4)])
@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in ("auto", "flash", "math")])
@pytest.mark.parametrize("masked", [pytest.param(False, id="causal"), pytest.param(True, id="mask")])
def test_a_backend_computes_the_definition(name: str, key_heads: int, S: int, N: int, masked: bool) -> None:
    """Queries that are all of the keys or the last of them, and any mask; keys of a longer cache, which are strided."""
    q, k, v = (random(3, heads, n, 16, seed=heads + n) for heads, n in ((4, S), (key_heads, 50), (key_heads, 50)))
    k, v = k[:, :, :N], v[:, :, :N]
    seen_SN = (random(S, N) > 0).index_fill(1, torch.tensor([0]), True) if masked else None
    got = softmax_product(q, k, v, seen_SN, None, name)
    torch.testing.assert_close(got.double(), defined(q, k, v, seen_SN), rtol=1e-5, atol=1e-5)


def on_cuda(
    dtype: torch.dtype, key_heads: int, width: int, S: int, N: int, *, masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """(q, k, v, a mask or none, what is to come out)."""
    device = torch.device("cuda", 0)
    q, k, v = (
        random(2, heads, n, width, seed=n).to(device, dtype) for heads, n in ((4, S), (key_heads, 50), (key_heads, 50))
    )
    k, v = k[:, :, :N], v[:, :, :N]
    seen_SN = torch.ones(S, N, dtype=torch.bool, device=device).tril(N - S).triu(-3) if masked else None
    return q, k, v, seen_SN, defined(q, k, v, seen_SN)


@pytest.mark.gpu
@pytest.mark.parametrize(("S", "N"), LENGTHS)
@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=str(dtype)) for dtype in (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize(("heads", "width"), [(4, 64), (2, 128), (4, 72), (4, 12)], ids=str)
@pytest.mark.parametrize("masked", [pytest.param(False, id="causal"), pytest.param(True, id="mask")])
@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in ("auto", *BACKENDS)])
def test_a_backend_computes_the_definition_on_cuda(
    name: str, heads: int, width: int, dtype: torch.dtype, S: int, N: int, masked: bool
) -> None:
    """What can, and what says why it cannot; eager and in a captured graph."""
    q, k, v, seen_SN, want = on_cuda(dtype, heads, width, S, N, masked=masked)
    kind = "mask" if masked else kind_of(S, N, None)
    asked = call(q.device, dtype, key_heads=heads, width=width, value_width=width, kind=kind)
    if name != "auto" and why_not(name, asked) is not None:
        with pytest.raises(UnavailableError, match=f"^model.attention={name}: .*use model.attention=auto"):
            softmax_product(q, k, v, seen_SN, None, name)
        return
    close = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 5e-3, "atol": 5e-3}
    torch.testing.assert_close(softmax_product(q, k, v, seen_SN, None, name).double(), want, **close)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = softmax_product(q, k, v, seen_SN, None, name)
    graph.replay()
    torch.testing.assert_close(y.double(), want, **close)


@pytest.mark.gpu
@pytest.mark.parametrize("S", [pytest.param(37, id="whole"), pytest.param(5, id="from a cache")])
@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in ("auto", *BACKENDS)])
def test_a_compiled_pass_computes_the_definition_on_cuda(name: str, S: int) -> None:
    """By the same backend."""
    torch.compiler.reset()  # one function is compiled only so often
    q, k, v, _, want = on_cuda(torch.bfloat16, 4, 64, S, 37, masked=False)
    compiled = torch.compile(softmax_product, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(q, k, v, None, None, name).double(), want, rtol=0.02, atol=0.02)


@pytest.mark.gpu
def test_cudnn_and_flash_compute_a_prefill_in_bf16() -> None:
    """So neither is lost without a word; in fp32 there is the efficient one, for shared keys too."""
    device = torch.device("cuda", 0)
    half = call(device, torch.bfloat16, heads=16, key_heads=16, width=128, value_width=128)
    assert why_not("flash", half) is None and why_not("cudnn", half) is None
    assert backend_of("auto", half) == best_first(half)[0]
    assert backend_of("auto", half._replace(kind="lower_right")) == "flash"
    for kind in ("causal", "lower_right", "mask"):
        assert backend_of("auto", call(device, torch.float32, kind=kind)) == "efficient"


def test_what_is_not_here_is_unavailable_with_the_reason() -> None:
    """The device, or what torch itself says of the sizes."""
    for name in ("cudnn", "efficient"):
        wanted = rf"^model\.attention={name}: needs device=cuda \(this run is on cpu\); use model\.attention=auto"
        with pytest.raises(UnavailableError, match=wanted):
            backend_of(name, call())
    with pytest.raises(UnavailableError, match=r"^model\.attention=flash: Flash attention requires .* 16.* 8 instead"):
        backend_of("flash", call(value_width=8))
    assert backend_of("math", call(value_width=8)) == "math"


def test_what_is_tried_is_not_counted_with_a_pass() -> None:
    """A pass has as many operations when its backend is known already."""
    q, k = random(1, 4, 9, 16), random(1, 2, 9, 16, seed=1)
    why_not.cache_clear()
    first, second = (count_flops(lambda: softmax_product(q, k, k, None, None, "auto"))[1] for _ in range(2))  # type: ignore[arg-type, return-value]
    assert first == second > 0


def test_memory_that_is_full_is_no_reason_against_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through, and is not remembered."""

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    asked = call(width=24, value_width=24)
    monkeypatch.setattr(attention_backend, "_product", full)
    with pytest.raises(torch.OutOfMemoryError):
        backend_of("flash", asked)
    monkeypatch.undo()
    assert why_not("flash", asked) is None


def test_the_mask_of_torchs_kernels_is_that_of_its_causal_bias() -> None:
    """Its number is written here, because the module that has it is slow to import."""
    from torch.nn.attention.bias import CausalVariant

    assert int(CausalVariant.LOWER_RIGHT) == attention_backend._LOWER_RIGHT


def test_the_configuration_knows_every_backend() -> None:
    """Its own list, for it imports no torch."""
    assert {"auto", *BACKENDS} == {*ATTENTIONS}


def test_auto_is_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU flash, else math."""
    assert backend_of("auto", call()) == "flash"
    assert backend_of("auto", call(value_width=8)) == "math"
    monkeypatch.setattr(attention_backend, "why_not", lambda name, _: None if name == "math" else "broken")
    assert backend_of("auto", call()) == "math"


@pytest.mark.parametrize(
    ("capability", "kind", "first"),
    [
        pytest.param((9, 0), "causal", "cudnn", id="Hopper"),
        pytest.param((10, 0), "mask", "cudnn", id="Blackwell"),
        pytest.param((9, 0), "lower_right", "flash", id="Hopper, from a cache"),
        pytest.param((8, 0), "causal", "flash", id="Ampere"),
    ],
)
def test_what_is_tried_first_depends_on_the_gpu(
    capability: tuple[int, int], kind: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has all four, and ends with the one that always can."""
    monkeypatch.setattr(attention_backend, "capability", lambda _: capability)
    order = best_first(call(torch.device("cuda", 0), kind=kind))
    assert order[0] == first and order[-1] == "math" and set(order) == set(BACKENDS)


def test_torch_computes_by_what_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all backends only that one is on inside, and afterwards all are as before."""
    product, on = F.scaled_dot_product_attention, []

    def looking(*arguments: Any, **options: Any) -> Tensor:
        on.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
        return product(*arguments, **options)

    x = random(1, 4, 5, 16)
    for name in ("flash", "math"):
        softmax_product(x, x, x, None, None, name)  # tries it
        monkeypatch.setattr(F, "scaled_dot_product_attention", looking)
        softmax_product(x, x, x, None, None, name)
        monkeypatch.undo()
    assert on == [(True, False), (False, True)]
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


@needs_cxx
@pytest.mark.parametrize("N", [pytest.param(9, id="whole"), pytest.param(13, id="from a cache")])
def test_a_compiled_pass_has_the_same_backend(N: int) -> None:
    """The choice is a constant of the graph."""
    q, k = random(1, 4, 9, 16), random(1, 2, N, 16, seed=1)
    on = []

    class Noting(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is F.scaled_dot_product_attention:
                on.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
            return super().call_function(target, args, kwargs)

    compiled = torch.compile(softmax_product, fullgraph=True, dynamic=False, backend=lambda graph, _: Noting(graph).run)
    for name in ("auto", "math"):
        torch.testing.assert_close(compiled(q, k, k, None, None, name), softmax_product(q, k, k, None, None, name))
    assert on == [(True, False), (False, True)]


@pytest.mark.parametrize("window", [pytest.param(w, id=f"window {w}") for w in (None, 1, 4, 12, 13)])
@pytest.mark.parametrize("sinks", [pytest.param(False, id="plain"), pytest.param(True, id="sinks")])
@pytest.mark.parametrize("S", [pytest.param(S, id=f"{S} queries") for S in (1, 2, 5, 12, 13)])
def test_queries_that_are_the_last_attend_as_within_the_whole(S: int, window: int | None, sinks: bool) -> None:
    """A chunk's rows of the whole product, with shared keys."""
    q, k, v = (random(2, heads, 13, 8, seed=heads) for heads in (4, 2, 2))
    sinks_H = random(4) if sinks else None
    want = attend(q, k, v, None, window, None, sinks_H)[:, :, 13 - S :]
    got = attend(q[:, :, 13 - S :], k, v, None, window, None, sinks_H)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def attentions() -> dict[str, tuple[torch.nn.Module, int]]:
    """Each with the width of its rotation."""
    plain: dict[str, Any] = {"d_model": 24, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "qk_norm": "none"}
    latent = LatentAttention(24, 3, nope_dim=5, rope_dim=6, v_dim=7, kv_rank=9, q_rank=None, scale=1.0, bias=False)
    found: dict[str, torch.nn.Module] = {
        "plain": Attention(**plain, norm_eps=1e-6),
        "window": Attention(**plain, norm_eps=1e-6, window=5),
        "sinks": Attention(**plain, norm_eps=1e-6, sinks=True, output_gate=True),
        "latent": latent,
    }
    return {name: (attention, 6) for name, attention in found.items()}


@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in attentions()])
def test_an_attention_says_what_it_asks_torch_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole pass and of one that goes on from the cache: what it is recorded by is what it does."""
    attention, width = attentions()[name]
    initialize(attention, 1)
    asked: list[Call] = []

    def noted(name: str, call: Call) -> str:
        asked.append(call)
        return backend_of(name, call)

    monkeypatch.setattr(attention_backend, "backend_of", noted)
    cache: Any = attention.make_cache(2, 13)  # type: ignore[operator]
    cos, sin = rope_tables(13, width, 100.0, CPU)
    x = random(2, 13, 24)
    attention(x[:, :9], cos[:9], sin[:9], cache)
    attention(x[:, 9:], cos[9:], sin[9:], cache.behind(9))
    assert asked == [attention.call(9, 9, CPU), attention.call(4, 13, CPU)]  # type: ignore[operator]
    assert [one.kind for one in asked] == (["mask"] * 2 if name == "window" else ["causal", "lower_right"])


def test_the_reference_has_its_own_choice() -> None:
    """Of fp32, whatever the run was asked to use."""
    for attention, _ in attentions().values():
        attention.backend = "cudnn"  # type: ignore[assignment]
        twin = reference_twin(attention)
        assert twin.backend == "auto" and attention.backend == "cudnn"
