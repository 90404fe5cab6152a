"""The fastest of a few ways to call a kernel, found out at the first call with a size, outside what is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def fastest(call: Callable[..., Tensor], candidates: Iterable[Any]) -> tuple[Any, float]:
    """The candidate with the shortest of three calls, after one that compiles; what the kernels refuse is left out."""
    times = {}
    for candidate in candidates:
        try:
            call(*candidate)
        except ValueError:
            continue
        times[candidate] = min(_milliseconds(partial(call, *candidate)) for _ in range(3))
    return min(times.items(), key=lambda item: item[1]) if times else (None, math.inf)


def _milliseconds(call: Callable[[], Tensor]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
