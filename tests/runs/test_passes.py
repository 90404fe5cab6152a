"""runs/passes.py: how many tokens the passes of a configuration have, and who computes their attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lab.errors import UnavailableError
from moe_lab.models import attention_backend
from moe_lab.models.attention_backend import backend_of
from moe_lab.runs import build
from moe_lab.runs.passes import attention_backends, n_tokens, n_tokens_at_once, prefill_passes
from tests import tiny
from tests.models.checkpoints import checkpoint

CPU = torch.device("cpu")
SIZES = ("batch=3", "seq_len=5")
PREFILL, DECODE = (*SIZES, "workload.phase=prefill"), (*SIZES, "workload.phase=decode")


@pytest.mark.parametrize(
    ("model", "more", "tokens", "at_once", "passes"),
    [
        pytest.param("decoder_moe", SIZES, 15, 15, [5], id="forward"),
        pytest.param("decoder_moe", PREFILL, 15, 15, [5], id="prefill"),
        pytest.param("decoder_moe", (*PREFILL, "workload.prefill_chunk=2"), 15, 6, [2, 2, 1], id="chunks"),
        pytest.param("decoder_moe", (*PREFILL, "workload.prefill_chunk=9"), 15, 15, [5], id="a longer chunk"),
        pytest.param("decoder_moe", (*DECODE, "workload.context_len=7"), 3, 3, [7], id="decode"),
        pytest.param(
            "decoder_moe",
            (*DECODE, "workload.context_len=7", "workload.prefill_chunk=4"),
            3,
            3,
            [4, 3],
            id="a context in chunks",
        ),
        pytest.param("minimal", ("batch=3",), 3, 3, None, id="a model without seq_len"),
    ],
)
def test_tokens_of_an_iteration_and_of_its_passes(
    model: str, more: tuple[str, ...], tokens: int, at_once: int, passes: list[int] | None
) -> None:
    """A decoding step has one of each sequence; a prefill all, chunk by chunk."""
    cfg = tiny.compose(model, *more)
    assert (n_tokens(cfg), n_tokens_at_once(cfg)) == (tokens, at_once)
    assert passes is None or [len(part) for part in prefill_passes(cfg)] == passes


def test_a_forward_pass_has_no_chunks() -> None:
    """In a sweep it may carry those of a prefill."""
    cfg = tiny.decoder_moe(*SIZES)
    cfg.workload.prefill_chunk = 2
    assert prefill_passes(cfg) == [range(5)]


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in ("gpt_oss", "deepseek_v3", "qwen3_next")])
@pytest.mark.parametrize("chunk", [pytest.param("null", id="whole"), pytest.param("5", id="chunks")])
def test_what_is_recorded_is_what_ran(kind: str, chunk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers with and without windows, of latent attention, and of one layer in four with attention."""
    keys = [f"model.path={checkpoint(kind, tmp_path)}", "workload=random", "workload.phase=prefill", "seq_len=12"]
    cfg = tiny.compose("checkpoint", *keys, f"workload.prefill_chunk={chunk}")
    built: Any = tiny.built(cfg).built
    ran: set[str] = set()

    def noted(*call: Any) -> str:
        ran.add(name := backend_of(*call))
        return name

    monkeypatch.setattr(attention_backend, "backend_of", noted)
    built.task(built.x)
    assert ran and attention_backends(cfg, built.model, CPU) == sorted(ran)


def test_what_torch_cannot_compute_here_is_unavailable_before_anything_runs() -> None:
    """For `plan` too."""
    cfg = tiny.decoder_moe("model.attention=cudnn")
    for act in (build.check_available, tiny.built):
        with pytest.raises(UnavailableError, match=r"^model\.attention=cudnn: needs device=cuda \(this run is on cpu"):
            act(cfg)
