"""A forward pass ready to be repeated, and the clock that fits the device.

On a CPU `perf_counter` around each iteration; on CUDA an event before and after each, and for a captured graph the two
events are nodes of the graph itself, so that the replay's launch is outside the interval.

What the caches hold before an iteration is what the one before left (`natural`), nothing of it (`cold`: the L2 cache is
filled with other lines outside the interval), or all that fits (`hot`: 20 calls in one graph, one after the other, and
their time over 20, in which the graph's own start counts little: for kernels of some microseconds).
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
from torch import Tensor, nn

from moe_lab.errors import MismatchError, UnavailableError
from moe_lab.measure.statistics import HOT_CALLS
from moe_lab.models import ForcedRouting, Output
from moe_lab.routers.base import unchecked

_FASTEST_CLOCK_HZ = 2e9  # of a GPU: a sleep of so many cycles lasts at least as long as it is meant to


class Block(NamedTuple):
    """Samples of one block, in order: milliseconds, and the host's clock (s, perf_counter) after each or after all."""

    ms: np.ndarray
    stamp_s: np.ndarray


class Step:
    """One eager forward pass of `model` on `x`, by the routing `forced` if there is one; calling it runs it once."""

    fuses = False
    """Whether it computes by other kernels than the eager pass, so that it rounds otherwise in between."""
    calls = 1
    """Passes of one iteration; its time is divided by them."""

    def __init__(self, model: nn.Module, x: Tensor, forced: ForcedRouting = None):
        self.model, self.x, self.device, self.is_forced = model, x, x.device, forced is not None
        self._forward: Callable[[Tensor], Output] = model if forced is None else partial(model, forced_routing=forced)
        # What goes on between two iterations and is not timed: a decode step is followed by one at the next position.
        self._advance: Callable[[], None] = getattr(model, "advance", _nothing)
        self.prepare: Callable[[], None] = _nothing
        """Called before each iteration on CUDA, outside the interval."""

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
            self.prepare()
            start.record()
            self._forward(self.x)
            stop.record()
            self._advance()
        torch.cuda.synchronize(self.device)
        ms = np.array([start.elapsed_time(stop) for start, stop in zip(starts, stops, strict=True)])
        return Block(ms, np.full(n, time.perf_counter()))

    @torch.inference_mode()
    def busy_ms(self, repeats: int = 5) -> float:
        """Milliseconds that a GPU computes in one iteration: the median with all launches waiting when it begins.

        The GPU sleeps while the host launches ahead, so what is timed has no gaps in which it waits for the host. A
        pass that reads on the host, or has more launches than the driver's queue takes (1024), keeps some gaps.
        """
        host_s = float(np.median(self.time_block(3).ms)) / 1e3 + 1e-3
        cycles = int(2 * host_s * _FASTEST_CLOCK_HZ)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        with _no_garbage_collection(), unchecked():
            for _ in range(repeats):
                torch.cuda._sleep(cycles)
                self.prepare()
                start.record()
                self._forward(self.x)
                stop.record()
                self._advance()
                torch.cuda.synchronize(self.device)
                times.append(start.elapsed_time(stop))
        return float(np.median(times))

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
        from torch._inductor.exc import InductorError  # here: plans and lists do without its second and a half

        super().__init__(model, x, forced)
        self._forward = torch.compile(self._forward, fullgraph=True, dynamic=False)
        try:
            # Every model of a process compiles the same Python code: that is no sign of a shape that keeps changing.
            with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
                self()
        except torch._dynamo.exc.Unsupported as error:
            raise UnavailableError(f"execution=compile: {str(error).splitlines()[0]}") from error
        except InductorError as error:
            if "InvalidCxxCompiler" not in str(error):
                raise
            raise UnavailableError("execution=compile needs a C++ compiler on a CPU; install g++") from error


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
        gc.collect()  # a graph or a kernel that is unloaded during the capture would end it
        # A graph keeps the address of cuBLAS's workspace. One that was there before lies in memory of others, which go.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.reset_peak_memory_stats(self.device)
        self._graph = torch.cuda.CUDAGraph()
        self._start = torch.cuda.Event(enable_timing=True, external=True)
        self._stop = torch.cuda.Event(enable_timing=True, external=True)
        with _no_garbage_collection(), torch.inference_mode(), torch.cuda.graph(self._graph):
            self._start.record()
            for _ in range(self.calls):
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
            self.prepare()
            self._graph.replay()
            self._stop.synchronize()
            ms[i], stamp[i] = self._start.elapsed_time(self._stop) / self.calls, time.perf_counter()
            self._advance()
        return Block(ms, stamp)

    def peak_bytes(self) -> int:
        return self._peak_bytes


class HotGraphStep(GraphStep):
    """Twenty passes in one graph."""

    calls = HOT_CALLS

    @torch.inference_mode()
    def check(self) -> None:
        """Poison the outputs, replay, and look whether they come back: what was timed is what computes them.

        Raises:
            MismatchError: they do not.
        """
        computed = () if self.is_forced else self._output.routings  # else the pass reads them
        tensors = [self._output.y, *(ids for ids, *_ in computed)]
        self._graph.replay()
        before = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.fill_(torch.nan if tensor.is_floating_point() else -7)
        self._graph.replay()
        # Sums that are made in no fixed order may round otherwise, and in a deep model send a token elsewhere.
        y, *ids = (then.double() for then in tensors)
        was, *ids_were = (tensor.double() for tensor in before)
        same_y = bool((y - was).norm() <= 1e-2 * was.norm())
        same_ids = all(
            bool((now == then).double().mean() > 0.99) for now, then in zip(ids, ids_were, strict=True) if now.numel()
        )
        if not (same_y and same_ids):
            raise MismatchError("replay", "the timed CUDA graph did not write its outputs.")


class _FlushL2:
    """Reads three times the size of the device's L2 cache.

    It writes nothing: lines that were written would go to memory within the interval, beside what is timed there.
    """

    def __init__(self, device: torch.device):
        n_bytes = 3 * torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.zeros(n_bytes // 4, dtype=torch.int32, device=device)
        self._sum = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._sum)


def _nothing() -> None:
    pass


STEPS: dict[str, type[Step]] = {"eager": Step, "compile": CompiledStep, "cuda_graph": GraphStep}


def make_step(execution: str, cache: str, model: nn.Module, x: Tensor, forced: ForcedRouting = None) -> Step:
    """A step of one of `STEPS`, the caches in the state `cache`: natural, cold (on CUDA) or hot (of a CUDA graph)."""
    if cache == "hot":
        assert execution == "cuda_graph", execution
        return HotGraphStep(model, x, forced)
    step = STEPS[execution](model, x, forced)
    if cache == "cold":
        step.prepare = _FlushL2(x.device)
    return step


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
