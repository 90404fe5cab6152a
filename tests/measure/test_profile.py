"""measure/profile.py: real profiles, of the CPU's operations and of a GPU's kernels."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import moe_lab
from moe_lab import marks
from moe_lab.marks import NAMES
from moe_lab.measure.clocks import GraphStep, Step
from moe_lab.measure.profile import STEPS, Profile, has_used_cupti, phases_from
from moe_lab.models import Output
from moe_lab.records.fields import PROFILE, names
from moe_lab.records.schema import Record
from tests import quick, tiny

LARGE = (
    *("device=cuda", "dtype=bf16", "model.d_model=1024", "model.n_heads=8", "model.mlp_hidden_dim=2048"),
    *("model.n_layers=4", "model.n_experts=16", "batch=16", "seq_len=1024"),
)
"""Kernels of more than a few microseconds, so that gaps between them are little."""


@pytest.mark.slow
def test_operations_of_a_real_pass_have_their_phases() -> None:
    """Every phase of a decoder with grouped experts; own times add up to less than the pass takes."""
    run = tiny.built(tiny.decoder_moe("experts=grouped"))
    found = Profile(step := Step(run.built.model, run.built.x))
    assert len(found.steps) == STEPS and found.matched == [] and not has_used_cupti()
    phases = {kernel.phase for kernel in found.kernels()}
    assert phases == {*NAMES, None} and phases_from(step, found) == "marks around the launches"
    assert len({tuple(kernel.name for kernel in one) for one in found.steps}) == 1
    sums = [sum(kernel.duration_us for kernel in one) for one in [*found.steps, found.kernels()]]
    assert sums[-1] == sorted(sums[:-1])[STEPS // 2]
    attention = [kernel for kernel in found.steps[0] if "scaled_dot_product_flash" in kernel.name]
    assert [kernel.phase for kernel in attention] == ["attention"] * 2  # of two layers
    assert marks._listener is None


def test_nobody_listens_after_a_profile_that_failed() -> None:
    """A failing pass leaves no listener behind."""

    class Failing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> None:
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        Profile(Step(Failing(), torch.zeros(2)))
    assert marks._listener is None


@pytest.mark.slow
def test_a_run_leaves_a_timeline_and_its_ten_longest_operations(tmp_path: Path) -> None:
    """The file is what ui.perfetto.dev reads; another run without a profile takes it away."""
    record = moe_lab.run(quick.compose("decoder_moe", "measure.profile=true"), tmp_path)
    found = record.profile
    assert found is not None and set(names(PROFILE)) <= {*found, "phases_ms", "implementations_ms"}
    assert (found["execution"], found["steps"], found["ncu"], found["timeline_left_out"]) == ("eager", STEPS, None, 0)
    assert len(found["top"]) == 10
    assert sum(found["phases_ms"].values()) == pytest.approx(found["kernels_ms"])
    assert sum(found["implementations_ms"].values()) == pytest.approx(found["kernels_ms"])
    assert {"router=torch", "experts=grouped"} <= found["implementations_ms"].keys()
    timeline = json.loads(gzip.decompress((tmp_path / "timeline.json.gz").read_bytes()))
    assert sum(event.get("cat") == "cpu_op" for event in timeline["traceEvents"]) >= found["launches"] * STEPS
    plain = moe_lab.run(quick.compose("decoder_moe"), tmp_path)
    assert (plain.profile, plain.cell_id, plain.env_id) == (None, record.cell_id, record.env_id)
    assert not (tmp_path / "timeline.json.gz").exists()


def on_the_gpu(folder: Path, *overrides: str) -> Record:
    record = moe_lab.run(
        quick.compose("decoder_moe", "device=cuda", "measure.max_time_s=1", *overrides, device="cuda"), folder
    )
    assert record.status == "ok", record.reason
    return record


@pytest.mark.gpu
def test_the_kernels_of_a_profile_sum_to_the_busy_time(tmp_path: Path) -> None:
    """Within 5 %, of a pass whose kernels are long beside the gaps between them."""
    record = on_the_gpu(tmp_path, *LARGE, "measure.profile=true")
    assert record.profile is not None and record.gpu_busy_ms is not None
    assert record.profile["kernels_ms"] == pytest.approx(record.gpu_busy_ms, rel=0.05)
    assert record.profile["ncu"].startswith("ncu --set full --kernel-name ")
    assert {row["phase"] for row in record.profile["top"]} & set(NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("phase", [pytest.param(name, id=name) for name in ("forward", "decode")])
def test_phases_of_a_graph_are_those_of_its_replay(phase: str, tmp_path: Path) -> None:
    """Its kernels are those of the eager pass, in order; where they are long they sum to the latency."""
    more = ("workload.phase=decode", "workload.context_len=64", "seq_len=32") if phase == "decode" else ()
    record = on_the_gpu(tmp_path, *LARGE, "execution=cuda_graph", *more)
    phases, shares, latency = record.phases_ms, record.phases_share, record.latency_ms
    assert phases is not None and shares is not None and latency is not None
    assert not [text for text in record.warnings if "phases_ms" in text]
    assert phases["execution"] == "cuda_graph" and phases["matched"] >= 0.95
    assert shares["router"] and shares["attention"]
    assert sum(share for share in shares.values() if share) == pytest.approx(1)
    if phase == "forward":
        assert phases["sum_ms"] == pytest.approx(latency.p50, rel=0.2)


class Two(torch.nn.Module):
    """Two kernels, in a phase each; the second is that of the function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Output:
        with marks.phase("router"):
            y = x + 1
        with marks.phase("experts"):
            return Output(self.function(y))


@pytest.mark.gpu
def test_a_graph_has_the_phases_of_an_eager_pass_of_the_same_kernels_alone() -> None:
    """Of another model none, and it is said where they part."""
    x = torch.randn(1 << 20, device="cuda")
    step = GraphStep(Two(torch.exp), x)
    same, other = Profile(step, Step(Two(torch.exp), x)), Profile(step, Step(Two(partial(torch.sum, dim=0)), x))
    assert [kernel.phase for kernel in same.steps[0]] == [None, None]  # of a replay alone nothing is known
    assert [kernel.phase for kernel in same.kernels()] == ["router", "experts"]
    assert not other.has_phases and {kernel.phase for kernel in other.kernels()} == {None}
    assert "eagerly" in other.difference() and phases_from(step, other).startswith("not known: ")
