"""workloads/forced.py: a forced load on the layers of a model, in every phase."""

from __future__ import annotations

import pytest
import torch

from moe_lab.runs import build
from moe_lab.workloads import forced as forced_loads
from tests import tiny

CPU = torch.device("cpu")


def test_a_forced_load_gives_the_counts_that_were_asked_for() -> None:
    """In every layer; the weights are those of the native pass."""
    cfg = tiny.decoder_moe("workload.load=balanced", "batch=4", "seq_len=25")
    model = build.build_model(cfg, CPU)
    x = build.build_input(cfg, model, CPU)
    forced = forced_loads.force_load(cfg, model, x)
    assert forced is not None and len(forced) == 2
    for routing, native in zip(forced, model(x).routings, strict=True):
        counts_E = routing.expert_ids_TK.flatten().bincount(minlength=5)
        assert counts_E.tolist() == [40] * 5
        assert torch.equal(routing.weights_TK, native.weights_TK)
    assert forced_loads.load_difference(cfg, model, forced) == pytest.approx(0.0)
    assert forced_loads.force_load(tiny.decoder_moe(), model, x) is None


@pytest.mark.parametrize("phase", [pytest.param(phase, id=phase) for phase in ("prefill", "decode")])
def test_a_forced_load_is_that_of_the_phase(phase: str) -> None:
    """One routing a layer for the tokens of a pass: in decode, one for each sequence."""
    cfg = tiny.decoder_moe(f"workload.phase={phase}", "workload.load=one_hot", "batch=5")
    decoder = build.build_model(cfg, CPU)
    x = build.build_input(cfg, decoder, CPU)
    task, _ = build.build_task(cfg, decoder, x)
    forced = forced_loads.force_load(cfg, task, x)
    assert forced is not None and len(forced) == 2
    tokens = 5 if phase == "decode" else 35
    for routing in forced:
        assert routing.expert_ids_TK.flatten().bincount(minlength=5).max() == tokens
    assert forced_loads.load_difference(cfg, decoder, forced) == pytest.approx(0.0, abs=0.15)
