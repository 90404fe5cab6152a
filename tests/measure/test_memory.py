"""measure/memory.py: the peak of one iteration."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe_lab.measure import memory
from moe_lab.measure.clocks import Step
from moe_lab.models import Output
from tests import tiny

MB = 1_000_000
needs_high_water_mark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK) or memory.resident_peak_bytes() is None,
    reason="this kernel does not reset the resident high-water mark",
)


class Hungry(nn.Module):
    """Takes `megabytes` for a moment in each forward pass and gives them back before it returns."""

    def __init__(self, megabytes: int):
        super().__init__()
        self.megabytes = megabytes

    def forward(self, x: Tensor) -> Output:
        taken = torch.ones(self.megabytes * MB // 4, device=x.device)
        y = x + taken[:1]
        del taken
        return Output(y)


@needs_high_water_mark
def test_200_mb_taken_and_given_back_within_the_step_stand_in_the_peak() -> None:
    """The peak is seen although nothing is left of it after the step."""
    quiet = memory.peak_bytes(Step(Hungry(1), torch.zeros(1)))
    hungry = memory.peak_bytes(Step(Hungry(200), torch.zeros(1)))
    assert quiet is not None and hungry is not None
    assert 190 * MB < hungry - quiet < 230 * MB


@needs_high_water_mark
def test_the_peak_of_one_step_does_not_stand_in_the_next() -> None:
    """The high-water mark is reset before each look."""
    hungry = memory.peak_bytes(Step(Hungry(200), torch.zeros(1)))
    quiet = memory.peak_bytes(Step(Hungry(1), torch.zeros(1)))
    assert hungry is not None and quiet is not None
    assert hungry - quiet > 150 * MB


def test_a_peak_that_cannot_be_known_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the kernel has no such file (or does not let us write it) nothing is guessed."""
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "no folder" / "clear_refs")
    assert memory.peak_bytes(Step(Hungry(1), torch.zeros(1))) is None


@needs_high_water_mark
def test_a_run_records_more_at_its_peak_than_its_parameters_take() -> None:
    """memory.peak_mb is of the process on a CPU, so it holds at least the model."""
    run = tiny.built(tiny.decoder_moe())
    run.verify()
    recorded = run.record().memory
    assert recorded is not None and recorded["peak_mb"] is not None and recorded["parameters_mb"] is not None
    assert recorded["peak_mb"] > recorded["parameters_mb"] > 0


@pytest.mark.gpu
def test_200_mb_taken_within_the_step_stand_in_the_allocators_peak() -> None:
    """On CUDA the allocator counts, so the difference is exact to its rounding."""
    x = torch.zeros(1, device="cuda")
    quiet, hungry = (memory.peak_bytes(Step(Hungry(size), x)) for size in (1, 200))
    assert quiet is not None and hungry is not None
    assert abs(hungry - quiet - 199 * MB) < 4 * MB
