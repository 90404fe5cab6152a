"""A forward pass ready to be repeated, and the clock that fits the device.

On a CPU `perf_counter` around each iteration; on CUDA an event before and after each, and for a captured graph the two
events are nodes of the graph itself, so that the replay's launch is outside the interval.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch._inductor.exc
from torch import Tensor, nn

from moe_lab.errors import UnavailableError
from moe_lab.models import ForcedRouting, Output
from moe_lab.routers.base import unchecked


class Block(NamedTuple):
    """Samples of one block, in order: milliseconds, and the host's clock (s, perf_counter) after each or after all."""

    ms: np.ndarray
    stamp_s: np.ndarray


class Step:
    """One eager forward pass of `model` on `x`, by the routing `forced` if there is one; calling it runs it once."""

    fuses = False
    """Whether it computes by other kernels than the eager pass, so that it rounds otherwise in between."""

    def __init__(self, model: nn.Module, x: Tensor, forced: ForcedRouting = None):
        self.model, self.x, self.device = model, x, x.device
        self._forward: Callable[[Tensor], Output] = model if forced is None else partial(model, forced_routing=forced)
        # What goes on between two iterations and is not timed: a decode step is followed by one at the next position.
        self._advance: Callable[[], None] = getattr(model, "advance", _nothing)

    @torch.inference_mode()
    def __call__(self) -> Output:
        return self._forward(self.x)

    @torch.inference_mode()
    def time_block(self, n: int) -> Block:
        """Run `n` iterations and time each."""
        with _no_garbage_collection(), unchecked():
            return self._time_on_cuda(n) if self.device.type == "cuda" else self._time_on_cpu(n)

    def _time_on_cpu(self, n: int) -> Block:
        ms, stamp = np.empty(n), np.empty(n)
        forward, x = self._forward, self.x
        for i in range(n):
            start = time.perf_counter()
            forward(x)
            stamp[i] = stop = time.perf_counter()
            ms[i] = (stop - start) * 1e3
            self._advance()
        return Block(ms, stamp)

    def _time_on_cuda(self, n: int) -> Block:
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(n)]
        stops = [torch.cuda.Event(enable_timing=True) for _ in range(n)]
        for start, stop in zip(starts, stops, strict=True):
            start.record()
            self._forward(self.x)
            stop.record()
            self._advance()
        torch.cuda.synchronize(self.device)
        ms = np.array([start.elapsed_time(stop) for start, stop in zip(starts, stops, strict=True)])
        return Block(ms, np.full(n, time.perf_counter()))

    def peak_bytes(self) -> int:
        """Peak of the CUDA allocator over one iteration, parameters and inputs included."""
        torch.cuda.reset_peak_memory_stats(self.device)
        self()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


class CompiledStep(Step):
    """torch.compile of the whole forward pass. A graph break is an error: what broke out would run eagerly."""

    fuses = True

    def __init__(self, model: nn.Module, x: Tensor, forced: ForcedRouting = None):
        super().__init__(model, x, forced)
        self._forward = torch.compile(self._forward, fullgraph=True, dynamic=False)
        try:
            # Every model of a process compiles the same Python code: that is no sign of a shape that keeps changing.
            with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
                self()
        except torch._dynamo.exc.Unsupported as error:
            raise UnavailableError(f"execution=compile: {str(error).splitlines()[0]}") from error
        except torch._inductor.exc.InductorError as error:
            if "InvalidCxxCompiler" not in str(error):
                raise
            raise UnavailableError("execution=compile needs a C++ compiler (g++) for the CPU") from error


class GraphStep(Step):
    """The forward pass captured once as a CUDA graph and replayed."""

    def __init__(self, model: nn.Module, x: Tensor, forced: ForcedRouting = None):
        super().__init__(model, x, forced)
        if self.device.type != "cuda":
            raise UnavailableError(f"execution=cuda_graph needs device=cuda (this run is on {self.device.type})")
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(2):  # lazy initialisation of libraries may not happen while capturing
                self._forward(x)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._graph = torch.cuda.CUDAGraph()
        self._start = torch.cuda.Event(enable_timing=True, external=True)
        self._stop = torch.cuda.Event(enable_timing=True, external=True)
        with torch.inference_mode(), torch.cuda.graph(self._graph):
            self._start.record()
            self._output: Output = self._forward(x)
            self._stop.record()
        # Replays allocate nothing: what the capture took is the peak.
        self._peak_bytes = torch.cuda.max_memory_allocated(self.device)

    def __call__(self) -> Output:
        self._graph.replay()
        return self._output

    def _time_on_cuda(self, n: int) -> Block:
        ms, stamp = np.empty(n), np.empty(n)
        for i in range(n):
            self._graph.replay()
            self._stop.synchronize()
            ms[i], stamp[i] = self._start.elapsed_time(self._stop), time.perf_counter()
            self._advance()
        return Block(ms, stamp)

    def peak_bytes(self) -> int:
        return self._peak_bytes


def _nothing() -> None:
    pass


STEPS: dict[str, type[Step]] = {"eager": Step, "compile": CompiledStep, "cuda_graph": GraphStep}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
