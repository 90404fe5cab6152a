"""runs/record.py: a record from plain data. Its files: tests/runs/test_run.py."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from moe_lab.errors import ExportError, MismatchError, UnavailableError
from moe_lab.measure.clocks import Block
from moe_lab.runs.record import TimedBlock, failure_of, latency_of, noise_warnings, run_log, samples_ms, throughput
from tests import quick, tiny


def timed(replicate: int, *ms: float) -> TimedBlock:
    return TimedBlock(replicate, 0, 0, Block(np.array(ms), np.zeros(len(ms))))


def test_samples_of_several_processes_are_summarised_by_process() -> None:
    """replicate_p50 in order of their numbers, whatever the order of the blocks; an unstable median is a warning."""
    run = tiny.built(quick.compose("minimal"))
    for replicate, ms in ((1, 3.0), (0, 1.0), (1, 3.0), (0, 1.0)):
        run.blocks.append(timed(replicate, *[ms] * 5))
    record = run.record()
    assert record.latency_ms is not None
    assert record.latency_ms.replicate_p50 == [1.0, 3.0]
    assert any("not stable" in warning and "20 samples" in warning for warning in record.warnings)


def test_a_stable_median_is_no_warning() -> None:
    """The same samples, with a target that their interval meets and one that it does not."""
    for target, stable in ((0.02, True), (1e-12, False)):
        latency = latency_of([timed(0, *[1.0, 1.0001] * 20)], target, cache="natural", probe_ms=[])
        assert latency is not None and latency.stable is stable
        assert len(noise_warnings(latency, target)) == (not stable)
    assert noise_warnings(None, 0.02) == []


def test_samples_stay_in_order() -> None:
    """Of all blocks; none give none."""
    assert samples_ms([timed(0, 3.0, 1.0), timed(1, 2.0)]).tolist() == [3.0, 1.0, 2.0]
    assert samples_ms([]).shape == (0,)


def test_throughput_by_hand() -> None:
    """500 tokens in 2 ms; only decoding has a time for an output token of a sequence."""
    rates = throughput(2.0, 500, window=None)
    assert rates == pytest.approx({"tokens_per_s": 250_000, "time_per_token_us": 4.0})
    assert throughput(2.0, 500, window=1) == pytest.approx({**rates, "time_per_output_token_ms": 2.0})
    assert throughput(2.0, 500, window=4) == pytest.approx({**rates, "time_per_output_token_ms": 0.5})


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        pytest.param(UnavailableError("no GPU"), "skipped", "unavailable: no GPU", id="unavailable"),
        pytest.param(KeyboardInterrupt(), "failed", "interrupted", id="interrupted"),
        pytest.param(MismatchError("layers", "off"), "failed", "mismatch: layers", id="mismatch"),
        pytest.param(MismatchError("route", "off", "ids"), "failed", "mismatch: route: ids", id="clause"),
        pytest.param(ExportError("no graph"), "failed", "error: export: no graph", id="export"),
        pytest.param(ValueError("a=1: give 2"), "failed", "error: a=1: give 2", id="mistake"),
        pytest.param(RuntimeError("first\nsecond"), "failed", "error: RuntimeError: first", id="unforeseen"),
        pytest.param(MemoryError(), "failed", "out_of_memory", id="memory"),
    ],
)
def test_every_error_has_a_status_and_a_reason(error: BaseException, status: str, reason: str) -> None:
    """The reason is one line."""
    assert failure_of(error) == (status, reason)


def test_the_log_is_appended_to_and_left_as_it_was(tmp_path: Path) -> None:
    """Only what is logged inside is in it, whatever the level was."""
    log = logging.getLogger("moe_lab")
    before = log.level, list(log.handlers)
    for text in ("first", "second"):
        with run_log(tmp_path):
            log.info(text)
        log.error("outside")
    assert [line.split()[-1] for line in (tmp_path / "run.log").read_text().splitlines()] == ["first", "second"]
    assert (log.level, list(log.handlers)) == before
