"""torch.profiler (CUPTI on CUDA) around some steps, in a pass of its own."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from moe_lab import marks
from moe_lab.measure import kernels
from moe_lab.measure.clocks import CompiledStep, GraphStep, Step
from moe_lab.measure.kernels import EAGER, PHASE, STEP, Event, Kernel, Matched
from moe_lab.routers.base import unchecked

STEPS = 5
_FIRST = "first"  # a step that is not counted: the profiler and the caches get ready
_has_used_cupti = False


def has_used_cupti() -> bool:
    """Whether this process has: what CUPTI leaves behind may slow down every later launch."""
    return _has_used_cupti


class _PhaseRanges:
    """Ranges of the phases, for the profiler."""

    def __init__(self) -> None:
        self._open: Any = None

    def start(self, name: str) -> None:
        self._open = record_function(PHASE + name)
        self._open.__enter__()

    def stop(self, name: str) -> None:
        self._open.__exit__(None, None, None)


@contextmanager
def _phases() -> Iterator[None]:
    marks.listen(_PhaseRanges())
    try:
        yield
    finally:
        marks.listen(None)


class Profile:
    """The events of `STEPS` steps, and what they say.

    Attributes:
        events: as of a Chrome trace.
        steps: the kernels (CUDA) or operations (CPU) of each step, in their order.
        matched: of a replayed graph, each step beside an eager pass; else empty.
    """

    def __init__(self, step: Step, eager: Step | None = None):
        """Run and profile them. A replay (`GraphStep`) needs `eager`, a step of the same model.

        Raises:
            RuntimeError: the profiler saw nothing.
        """
        self.events = _trace(step, eager)
        found = kernels.launched(self.events) if step.device.type == "cuda" else kernels.operations(self.events)
        of_step = kernels.by_step(found)
        self.steps: list[list[Kernel]] = [of_step[name] for index in range(STEPS) if (name := str(index)) in of_step]
        if not self.steps:
            raise RuntimeError("the profiler saw no kernels of the steps (is CUPTI there?)")
        self.matched: list[Matched] = []
        if eager is not None:
            self.matched = [kernels.matched(replay, of_step.get(EAGER, [])) for replay in self.steps]

    @property
    def has_phases(self) -> bool:
        """Of a replayed graph: whether it has the kernels of the eager pass."""
        return bool(self.matched) and all(one.is_known for one in self.matched)

    def kernels(self) -> list[Kernel]:
        """Of the step in which they took the median time; of a replay with the phases of the eager pass, if known."""
        steps = [one.kernels for one in self.matched] if self.has_phases else self.steps
        return sorted(steps, key=lambda step: sum(kernel.duration_us for kernel in step))[len(steps) // 2]

    def phases_ms(self) -> dict[str, Any]:
        """The record's `phases_ms` of a replayed graph; assumes `has_phases`."""
        median = kernels.median_phases_ms(one.kernels for one in self.matched)
        share = min(one.share for one in self.matched)
        return {"execution": "cuda_graph", **dict.fromkeys(marks.NAMES), **median, "matched": share}

    def difference(self) -> str:
        """Where the replay and the eager pass part, for people."""
        worst = min(self.matched, key=lambda one: one.share)
        return f"{worst.share:.0%} of the replay's time is in kernels of an eager pass; {worst.difference}"


def phases_from(step: Step, found: Profile) -> str:
    """How the phases of its kernels are known, for the record."""
    if isinstance(step, CompiledStep):
        return "not known: compiled kernels span phases"
    if not isinstance(step, GraphStep):
        return "marks around the launches"
    if found.has_phases:
        return "the kernels of an eager pass in the same order"
    return f"not known: {found.difference()}"


@torch.inference_mode()
def _trace(step: Step, eager: Step | None) -> list[Event]:
    global _has_used_cupti
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print when it starts and stops
    on_cuda = step.device.type == "cuda"
    _has_used_cupti |= on_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler, unchecked():
        for name in (_FIRST, *map(str, range(STEPS))):
            _one(step, name)
        if eager is not None:
            for name in (_FIRST, EAGER):
                _one(eager, name)
    with tempfile.TemporaryDirectory(prefix="moe-lab-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[Event] = json.loads(path.read_bytes())["traceEvents"]
    return events


def _one(step: Step, name: str) -> None:
    """One step in a range of its own. A replay has no marks, and to listen would have compiled code compiled anew."""
    step.prepare()
    if type(step) is Step:
        with record_function(STEP + name), _phases():
            step()
    else:
        with record_function(STEP + name):
            step()
    if step.device.type == "cuda":
        torch.cuda.synchronize(step.device)
