"""The median of a series of latencies and how well it is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moe_lab.records.schema import Latency


def median_interval(ordered: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the median of sorted samples, from order statistics; None below 6 samples.

    The count of samples below the true median is binomial(n, 1/2), whatever the distribution; [x_(r), x_(n+1-r)] is
    missed with probability 2 P(count < r). Assumes independent samples (David & Nagaraja, Order Statistics, 7.1).
    """
    n = len(ordered)
    if n < 6:
        return None
    if n <= 200:
        tail, r = 0.0, 0
        while tail + math.comb(n, r) / 2**n <= 0.025:
            tail += math.comb(n, r) / 2**n
            r += 1
    else:  # the normal approximation with continuity correction is exact enough here, and comb(n, r) large
        r = max(math.floor((n - 1.959964 * math.sqrt(n)) / 2), 1)
    return float(ordered[r - 1]), float(ordered[n - r])


def relative_width(samples_ms: Sequence[float] | np.ndarray) -> float:
    """Width of the median's interval as a share of the median; infinite below 6 samples."""
    ordered = np.sort(samples_ms)
    interval = median_interval(ordered)
    return math.inf if interval is None else (interval[1] - interval[0]) / float(np.median(ordered))


def summarize(samples_ms: Sequence[float] | np.ndarray, target_ci: float) -> Latency:
    """The record's `latency_ms`, from at least one sample."""
    ordered = np.sort(samples_ms)
    interval = median_interval(ordered)
    p50, p90, p99 = (float(value) for value in np.percentile(ordered, (50, 90, 99)))
    return Latency(
        n=len(ordered),
        mean=float(np.mean(ordered)),
        p50=p50,
        p90=p90,
        p99=p99,
        ci95_low=interval[0] if interval else None,
        ci95_high=interval[1] if interval else None,
        stable=bool(relative_width(ordered) <= target_ci),
    )
