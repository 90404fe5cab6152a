"""Where the time of an eager forward pass goes, by the marks of `moe_lab.phases`."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any, Protocol

import numpy as np
import torch

from moe_lab import marks as phases
from moe_lab.measure.clocks import Step


class _Mark(Protocol):
    def elapsed_time(self, other: Any) -> float: ...


class _HostMark:
    """perf_counter with the interface of a CUDA event that was recorded."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: _HostMark) -> float:
        return (other.at - self.at) * 1e3


class _Recorder:
    """Notes the marks of one forward pass; on CUDA they are events in the stream."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.intervals: defaultdict[str, list[tuple[_Mark, _Mark]]] = defaultdict(list)
        self._open: _Mark | None = None

    def mark(self) -> _Mark:
        if not self.on_cuda:
            return _HostMark()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, name: str) -> None:
        assert self._open is None, f"phase {name} started inside another phase"
        self._open = self.mark()

    def stop(self, name: str) -> None:
        assert self._open is not None, f"phase {name} was not started"
        self.intervals[name].append((self._open, self.mark()))
        self._open = None


def measure_phases(step: Step, seconds: float, graph_p50_ms: float | None = None) -> dict[str, Any]:
    """The record's `phases_ms`: the median over eager passes of each phase's sum over the layers.

    Args:
        step: an eager step.
        seconds: how long to repeat; at least three passes.
        graph_p50_ms: the latency of the same pass as a CUDA graph; the launch gap is what the eager pass takes longer.

    Returns:
        A key per phase (milliseconds, null where the model has none), `other` for the rest, `sum_ms` for all together.
        A kernel that spans several phases stands under their joined name, and each of them is null.
    """
    passes: list[dict[str, float]] = []
    deadline = time.perf_counter() + seconds
    while len(passes) < 3 or time.perf_counter() < deadline:
        passes.append(_one_pass(step))
    median = {name: float(np.median([pass_ms[name] for pass_ms in passes])) for name in passes[0]}
    total = median.pop("total")
    named = sum(median.values())
    return {
        "execution": "eager",
        **dict.fromkeys(phases.NAMES),
        **median,
        "other": max(total - named, 0.0),
        "sum_ms": max(total, named),
        "launch_gap_ms": None if graph_p50_ms is None else total - graph_p50_ms,
        "matched": None,
    }


def _one_pass(step: Step) -> dict[str, float]:
    recorder = _Recorder(step.device)
    phases.listen(recorder)
    try:
        start = recorder.mark()
        step()
        stop = recorder.mark()
    finally:
        phases.listen(None)
    if recorder.on_cuda:
        torch.cuda.synchronize(step.device)
    sums = {name: sum(a.elapsed_time(b) for a, b in pairs) for name, pairs in recorder.intervals.items()}
    return {**sums, "total": start.elapsed_time(stop)}
