"""The fastest of a few ways to call a kernel, found out at the first call with a size, outside what is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from moe_lab.errors import UnavailableError

_CALLS, _LARGER_THAN_L2 = 7, 1 << 28  # bytes


def fastest(call: Callable[..., Tensor], candidates: Sequence[Any], what: str) -> tuple[Any, float]:
    """The candidate with the shortest median of some calls, after one that compiles, and its milliseconds.

    Before each call other memory is read, so that no candidate finds weights in the L2 cache, as none does when timed.
    What the kernels refuse is left out. `what` says whose candidates they are, for the message.

    Raises:
        UnavailableError: they refuse all.
    """
    times, refusal = {}, ""
    for candidate in candidates:
        try:
            call(*candidate)
        except ValueError as error:
            refusal = " ".join(str(error).split())
            continue
        times[candidate] = median(_milliseconds(partial(call, *candidate)) for _ in range(_CALLS))
    if not times:
        raise UnavailableError(
            f"{what}: all {len(candidates)} that experts.tune=true tries are refused, the last one because {refusal}; "
            "experts.tune=false takes the default"
        )
    return min(times.items(), key=lambda item: item[1])


def _milliseconds(call: Callable[[], Tensor]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.zeros(_LARGER_THAN_L2 // 4, device="cuda").sum()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
