"""The fastest of a few ways to call a kernel, found out at the first call with a size, outside what is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_lab.errors import UnavailableError


def fastest(call: Callable[..., Tensor], candidates: Sequence[Any], what: str) -> tuple[Any, float]:
    """The candidate with the shortest of three calls, after one that compiles, and its milliseconds.

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
        times[candidate] = min(_milliseconds(partial(call, *candidate)) for _ in range(3))
    if not times:
        raise UnavailableError(
            f"{what}: all {len(candidates)} that experts.tune=true tries are refused, the last one because {refusal}; "
            "experts.tune=false takes the default"
        )
    return min(times.items(), key=lambda item: item[1])


def _milliseconds(call: Callable[[], Tensor]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
