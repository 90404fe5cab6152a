"""The piece of work that says how fast the machine is."""

from __future__ import annotations

import math

import pytest
import torch

from moe_lab.measure import probe


def test_the_probe_takes_a_time_and_computes_what_it_says(device: torch.device) -> None:
    """A positive median; a product of ones and a sum of ones, so nothing can be left out of it."""
    work = probe.Probe(device)
    assert 0 < work.ms() < math.inf
    side = probe._SIDE[device.type]
    y = work._work(torch.ones(1024, device=device)).y
    assert y.shape == (probe._STREAM_BYTES[device.type] // 4096,)
    torch.testing.assert_close(y, torch.full_like(y, 1024 + side))


@pytest.mark.parametrize("n", [pytest.param(1, id="once"), pytest.param(5, id="five")])
def test_every_repeat_is_timed(n: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work runs as often as it is asked for."""
    work = probe.Probe(device)
    calls = []
    run = work._step._forward
    monkeypatch.setattr(work._step, "_forward", lambda x: calls.append(1) or run(x))
    work.ms(n)
    assert len(calls) == n
