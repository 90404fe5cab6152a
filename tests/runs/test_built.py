"""runs/built.py: what a step computes and who computes it."""

from __future__ import annotations

import pytest
import torch

from moe_lab.errors import UnavailableError
from moe_lab.experts import grouped
from moe_lab.models import layers
from moe_lab.models.attention import Attention
from moe_lab.models.layers import Linear
from moe_lab.ops import extension, one_token_attention
from moe_lab.routers.selection import SelectionRouter
from moe_lab.runs import build
from moe_lab.runs.built import Built
from tests import tiny

STEPS = 7


@pytest.mark.parametrize(
    ("most", "positions"),
    [
        pytest.param(None, (0, 1, 2, 3, 4, 5, 6), id="all"),
        pytest.param(3, (0, 2, 4), id="some"),
        pytest.param(99, (0, 1, 2, 3, 4, 5, 6), id="more than there are"),
    ],
)
def test_outputs_of_decoding_are_evenly_spread_steps(most: int | None, positions: tuple[int, ...]) -> None:
    """Each is what the step at that position computes."""
    built = tiny.built(tiny.decoder_moe("workload.phase=decode", f"seq_len={STEPS}", "workload.context_len=2")).built
    every = [output.y.clone() for output in built.outputs()]
    chosen = [output.y.clone() for output in built.outputs(most)]
    assert len(every) == STEPS and len(chosen) == len(positions)
    assert all(torch.equal(y, every[position]) for y, position in zip(chosen, positions, strict=True))


def test_a_pass_is_one_output() -> None:
    """Whatever is asked for."""
    built = tiny.built(tiny.decoder_moe()).built
    (output,) = built.outputs(3)
    assert torch.equal(output.y, built.model(built.x).y)


def test_who_computes_what() -> None:
    """Each part once; a model without experts has neither router nor experts, and no properties of a router."""
    experts = tiny.built(tiny.decoder_moe("experts=loop")).built
    assert experts.implementation().items() >= {"router": "torch", "experts": "loop"}.items()
    assert experts.router_properties() is not None
    dense = tiny.built(tiny.transformer_decoder()).built
    assert (
        dense.implementation() == {"add_rms_norm": "torch", "attention": "torch:flash"}
        and dense.router_properties() is None
    )
    forced = tiny.built(tiny.decoder_moe("workload.load=balanced")).built
    assert forced.implementation()["router"] == "forced: balanced"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        pytest.param(("batch=1",), True, id="one sequence"),
        pytest.param(("batch=2",), False, id="two sequences"),
        pytest.param(("batch=1", "workload.load=balanced"), False, id="forced"),
    ],
)
def test_who_norms_for_the_router(more: tuple[str, ...], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's kernels are named where they do the norm of a decoding step; the other norms keep theirs."""
    built = tiny.built(tiny.decoder_moe("experts=loop", "workload.phase=decode", *more)).built
    monkeypatch.setattr(SelectionRouter, "multiplies_gate", lambda *_: True)
    monkeypatch.setattr(SelectionRouter, "norms_input", lambda _, n_tokens, *__: n_tokens == 1)
    assert "mlp_norm" not in built.implementation()  # torch norms
    for block in built.model.layers:
        block.mlp_norm.implementation = "triton"
    assert built.implementation().get("mlp_norm") == ("torch" if expected else None)


@pytest.mark.parametrize(
    ("window", "by"),
    [
        pytest.param(1, "triton", id="one"),
        pytest.param(2, "triton", id="few"),
        pytest.param(600, "torch:flash", id="many"),
    ],
)
def test_who_attends_on_the_cache_depends_on_the_window(window: int, by: str) -> None:
    """A kernel takes a few new tokens of a sequence, too, and not many; elsewhere it is torch."""
    sizes = (f"seq_len={window}", "workload.context_len=3", f"workload.window={window}")
    built = Built.of(tiny.decoder_moe("workload.phase=decode", *sizes), torch.device("cpu"))
    assert built.implementation()["attention"] == ("torch" if window == 1 else "torch:flash")
    for module in built.model.modules():
        if isinstance(module, Attention):
            module.fuses = True
    assert built.implementation()["attention"] == by


@pytest.mark.parametrize(
    ("execution", "first", "by"),
    [
        pytest.param("eager", True, "cuda_ext:cpp", id="at-once"),
        pytest.param("compile", True, "triton", id="compiled"),
        pytest.param("eager", False, "cuda_ext:cpp+torch", id="layers-differ"),
    ],
)
def test_who_attends_in_one_launch(execution: str, first: bool, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled pass has Triton's kernels; all that layers have are named."""
    shape = ("model.n_heads=2", "model.n_kv_heads=2", "model.head_dim=64", "dtype=fp16", f"execution={execution}")
    cfg = tiny.decoder_moe("workload.phase=decode", "seq_len=2", "workload.context_len=3", *shape)
    built = Built.of(cfg, torch.device("cpu"))
    monkeypatch.setattr(one_token_attention, "is_faster", lambda device: True)
    found = [module for module in built.model.modules() if isinstance(module, Attention)]
    for module in found:
        module.fuses = module is not found[0] or first
    assert built.implementation()["attention"] == by


def test_joined_norms_are_not_named_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a few rows' projections do all norms, no other kernel stands in the record; with nine rows one does."""
    monkeypatch.setattr(layers.gemv, "is_faster", lambda device: True)
    for batch, expected in ((1, None), (8, None), (9, "triton")):
        words = ("workload.phase=decode", "seq_len=2", "workload.context_len=3", "dtype=fp16", f"batch={batch}")
        built = Built.of(tiny.decoder_moe(*words), torch.device("cpu"))
        for block in built.model.layers:
            block.attention_norm.implementation = "triton"
            block.mlp.norms_input = lambda x_TD, _: len(x_TD) <= 8
        built.model.norm.implementation = "triton"
        monkeypatch.setattr(SelectionRouter, "implementation", lambda _: "cuda_ext:sm_90")
        assert built.implementation().get("add_rms_norm") == expected


@pytest.mark.parametrize(
    ("more", "flagged", "kernel"),
    [
        pytest.param(("workload.phase=decode", "batch=1"), "all", "gemv", id="decode"),
        pytest.param(("workload.phase=decode", "batch=1"), "none", None, id="elsewhere"),
        pytest.param(("workload.phase=decode", "batch=1"), "head", "torch+gemv", id="one-of-them"),
        pytest.param(("workload.phase=decode", "batch=8"), "all", "gemv", id="eight-rows"),
        pytest.param(("workload.phase=decode", "batch=9"), "all", None, id="nine-rows"),
        pytest.param(("workload.phase=decode", "batch=2", "workload.window=2"), "all", "gemv", id="window"),
        pytest.param(("workload.phase=decode", "batch=5", "workload.window=2"), "all", None, id="long-window"),
        pytest.param(("workload.phase=decode", "batch=1", "dtype=fp32"), "all", None, id="fp32"),
        pytest.param(("workload.phase=decode", "batch=1", "execution=compile"), "all", None, id="compiled"),
        pytest.param(("workload.phase=prefill", "batch=3"), "head", "torch+gemv", id="prefill-head"),
        pytest.param(("workload.phase=prefill", "batch=3"), "blocks", None, id="prefill-blocks"),
        pytest.param(("batch=3",), "all", None, id="pass"),
        pytest.param(("batch=2",), "all", "gemv", id="short-pass"),
        pytest.param(
            ("workload.phase=prefill", "batch=3", "seq_len=10", "workload.prefill_chunk=8"),
            "blocks",
            "torch+gemv",
            id="a short last chunk",
        ),
    ],
)
def test_a_kernel_of_few_rows_is_named(
    more: tuple[str, ...], flagged: str, kernel: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it computes something: the modules say which, and how many rows each reads."""
    monkeypatch.setattr(layers.gemv, "is_faster", lambda device: flagged != "none")
    words = ["dtype=bf16", "seq_len=4", *(["workload.context_len=2"] if "workload.phase=decode" in more else []), *more]
    cfg = tiny.decoder_moe(*{word.partition("=")[0]: word for word in words}.values())
    built = Built.of(cfg, torch.device("cpu"))
    for name, module in built.model.named_modules():
        if isinstance(module, Linear):
            module.uses_gemv = flagged in ("all", "head" if name == "head" else "blocks")
    assert built.implementation().get("linear") == kernel


@pytest.mark.parametrize(
    ("chunk", "gate"),
    [
        pytest.param(8, "torch+torch-kernels", id="the last chunk"),
        pytest.param(2, "torch-kernels", id="all chunks"),
        pytest.param(10, None, id="none"),
    ],
)
def test_a_router_that_multiplies_the_gate_of_few_tokens_is_named(
    chunk: int, gate: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside torch, if that multiplies in other chunks."""
    monkeypatch.setattr(SelectionRouter, "multiplies_gate", lambda _, n_tokens, *__: n_tokens <= 6)
    monkeypatch.setattr(SelectionRouter, "implementation", lambda _: "torch-kernels")
    more = ("workload.phase=prefill", "batch=3", "seq_len=10", f"workload.prefill_chunk={chunk}", "experts=loop")
    assert tiny.built(tiny.decoder_moe(*more)).built.implementation().get("gate") == gate


@pytest.mark.parametrize("execution", [pytest.param(name, id=name) for name in ("eager", "compile")])
def test_a_compiled_pass_is_asked_who_sorts_few_tokens(execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU only an eager one sorts them in Python; the record and a plan say the same."""
    monkeypatch.setattr(extension, "sorts", lambda device, n: True)
    monkeypatch.setattr(extension, "computes", lambda device: True)
    cfg = tiny.decoder_moe("experts=grouped", "batch=2", "seq_len=3", f"execution={execution}")
    by = Built.of(cfg, torch.device("cpu")).implementation()
    sorts = {"dispatch", "combine"} & set(by)
    assert sorts == {"dispatch", "combine"} & set(build.check_available(cfg)[1])
    assert sorts == ({"dispatch", "combine"} if execution == "compile" else set())


@pytest.mark.parametrize(
    ("more", "attention"),
    [
        pytest.param((), "torch:flash", id="auto"),
        pytest.param(("model.attention=math",), "torch:math", id="named"),
        pytest.param(("model.attention=math", "workload.phase=prefill"), "torch:math", id="prefill"),
        pytest.param(("workload.phase=prefill", "workload.prefill_chunk=3"), "torch:flash", id="chunks"),
        pytest.param(("workload.phase=prefill", "seq_len=1"), None, id="one token"),
        pytest.param(("workload.phase=decode",), "torch", id="decode"),
        pytest.param(("workload.phase=decode", "workload.window=2", "seq_len=4"), "torch:flash", id="window"),
        pytest.param(
            ("workload.phase=decode", "workload.window=2", "seq_len=4", "model.attention=math"),
            "torch:math",
            id="window, named",
        ),
    ],
)
def test_who_computes_attention(more: tuple[str, ...], attention: str | None) -> None:
    """Of many tokens torch's backend; one token has no choice."""
    assert tiny.built(tiny.decoder_moe(*more)).built.implementation().get("attention") == attention


def test_a_shorter_last_chunk_may_be_computed_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record and a plan name both, and look at both."""
    monkeypatch.setattr(grouped, "_takes_few_tokens", lambda x_TD: len(x_TD) < 6)
    chunks = ("workload.phase=prefill", "batch=2", "seq_len=7", "experts=grouped")
    for chunk, experts in ((3, "grouped+grouped:few_tokens"), (4, "grouped"), (2, "grouped:few_tokens")):
        cfg = tiny.decoder_moe(*chunks, f"workload.prefill_chunk={chunk}")
        built = Built.of(cfg, torch.device("cpu"))
        assert built.implementation()["experts"] == build.check_available(cfg)[1]["experts"] == experts
        assert ("segment_mm" in built.implementation()) == (chunk != 2)

    def refuse(x_TD: torch.Tensor) -> bool:
        if len(x_TD) == 2:
            raise UnavailableError("not so few tokens")
        return False

    monkeypatch.setattr(grouped, "_takes_few_tokens", refuse)
    with pytest.raises(UnavailableError, match=r"^experts=grouped: not so few tokens"):
        build.check_available(tiny.decoder_moe(*chunks, "workload.prefill_chunk=3"))
