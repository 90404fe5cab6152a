"""runs/passes.py: how many tokens the passes of a configuration have, and who computes their attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lab.errors import UnavailableError
from moe_lab.models import attention_backend
from moe_lab.models.attention_backend import Call, backend_of
from moe_lab.runs import build
from moe_lab.runs import passes as runs_passes
from moe_lab.runs.passes import (
    n_tokens,
    of_all_passes,
    prefill_backends,
    prefill_passes,
    step_backends,
    tokens_at_once,
)
from tests import tiny
from tests.models.checkpoints import checkpoint

CPU = torch.device("cpu")
SIZES = ("batch=3", "seq_len=5")
PREFILL, DECODE = (*SIZES, "workload.phase=prefill"), (*SIZES, "workload.phase=decode")


@pytest.mark.parametrize(
    ("model", "more", "tokens", "at_once", "passes"),
    [
        pytest.param("decoder_moe", SIZES, 15, [15], [5], id="forward"),
        pytest.param("decoder_moe", PREFILL, 15, [15], [5], id="prefill"),
        pytest.param("decoder_moe", (*PREFILL, "workload.prefill_chunk=2"), 15, [6, 3], [2, 2, 1], id="chunks"),
        pytest.param("decoder_moe", (*PREFILL, "workload.prefill_chunk=9"), 15, [15], [5], id="a longer chunk"),
        pytest.param("decoder_moe", (*DECODE, "workload.context_len=7"), 3, [3], [7], id="decode"),
        pytest.param(
            "decoder_moe",
            (*DECODE, "workload.context_len=7", "workload.prefill_chunk=4"),
            3,
            [3],
            [4, 3],
            id="a context in chunks",
        ),
        pytest.param("minimal", ("batch=3",), 3, [3], None, id="a model without seq_len"),
    ],
)
def test_tokens_of_an_iteration_and_of_its_passes(
    model: str, more: tuple[str, ...], tokens: int, at_once: list[int], passes: list[int] | None
) -> None:
    """A decoding step has one of each sequence; a prefill all, chunk by chunk."""
    cfg = tiny.compose(model, *more)
    assert (n_tokens(cfg), tokens_at_once(cfg)) == (tokens, at_once)
    assert passes is None or [len(part) for part in prefill_passes(cfg)] == passes


def test_a_forward_pass_has_no_chunks() -> None:
    """In a sweep it may carry those of a prefill."""
    cfg = tiny.decoder_moe(*SIZES)
    cfg.workload.prefill_chunk = 2
    assert prefill_passes(cfg) == [range(5)]


_WHOLE, _CHUNKS = ("workload.phase=prefill",), ("workload.phase=prefill", "workload.prefill_chunk=5")
_STEPS = ("workload.phase=decode", "workload.window=3", "workload.context_len=9")


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        pytest.param("gpt_oss", _WHOLE, id="gpt_oss, whole"),
        pytest.param("gpt_oss", _CHUNKS, id="gpt_oss, chunks"),
        pytest.param("gpt_oss", _STEPS, id="gpt_oss, steps of several tokens"),
        pytest.param("deepseek_v3", _WHOLE, id="deepseek_v3, whole"),
        pytest.param("deepseek_v3", _CHUNKS, id="deepseek_v3, chunks"),
        pytest.param("deepseek_v3", _STEPS, id="deepseek_v3, steps of several tokens"),
        pytest.param("qwen3_next", _WHOLE, id="qwen3_next, whole"),
        pytest.param("qwen3_next", _CHUNKS, id="qwen3_next, chunks"),
    ],
)
def test_what_is_recorded_is_what_ran(
    kind: str, passes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of layers with and without windows, of latent attention, and of one layer in four with attention."""
    keys = [f"model.path={checkpoint(kind, tmp_path)}", "workload=random", "seq_len=12"]
    cfg = tiny.compose("checkpoint", *keys, *passes)
    built: Any = tiny.built(cfg).built
    calls: set[Any] = set()
    ran: set[str] = set()

    def noted(*call: Any) -> str:
        ran.add(name := backend_of(*call))
        calls.add(call)
        return name

    monkeypatch.setattr(attention_backend, "backend_of", noted)
    built.task(built.x)
    assert ran and built.implementation()["attention"] == f"torch:{'+'.join(sorted(ran))}"
    of_timed = step_backends if passes == _STEPS else prefill_backends
    looked_at: set[Any] = set()
    monkeypatch.setattr(runs_passes, "backend_of", lambda *call: looked_at.add(call) or "any")
    of_timed(cfg, built.model, CPU)
    assert looked_at == calls


@pytest.mark.parametrize("window", [pytest.param(1, id="one token"), pytest.param(3, id="several")])
def test_a_step_that_torch_cannot_compute_is_unavailable_before_anything_runs(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it can compute the context; a step of one token asks for no backend."""

    def backend(asked: str, call: Call) -> str:
        if call.kind == "mask":
            raise UnavailableError("model.attention=flash: no masks here")
        return "flash"

    monkeypatch.setattr(runs_passes, "backend_of", backend)
    steps = ("workload.phase=decode", f"workload.window={window}", "seq_len=6", "workload.context_len=5")
    cfg = tiny.decoder_moe(*steps)
    if window == 1:
        build.check_available(cfg)
        return
    for act in (build.check_available, tiny.built):
        with pytest.raises(UnavailableError, match=r"^model\.attention=flash: no masks here"):
            act(cfg)


def test_passes_that_differ_are_named_side_by_side() -> None:
    """In their order, each once, also where one pass has several; what one of them does not name is the others'."""
    full, last = {"router": "torch", "experts": "fused", "tiles": "1-2"}, {"router": "torch", "experts": "a"}
    wanted = {"router": "torch", "experts": "fused+a", "tiles": "1-2"}
    assert of_all_passes([full, last]) == of_all_passes([full, last, full]) == wanted
    assert of_all_passes([{"linear": "torch+gemv"}, {"linear": "gemv"}]) == {"linear": "torch+gemv"}


def test_what_torch_cannot_compute_here_is_unavailable_before_anything_runs() -> None:
    """For `plan` too."""
    cfg = tiny.decoder_moe("model.attention=cudnn")
    for act in (build.check_available, tiny.built):
        with pytest.raises(UnavailableError, match=r"^model\.attention=cudnn: needs device=cuda \(this run is on cpu"):
            act(cfg)
