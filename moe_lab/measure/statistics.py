"""The median of a series of latencies and how well it is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moe_lab.intervals import mean_interval, typical
from moe_lab.records.schema import Latency, Ratio

_LEAST_SAMPLES = 10


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


HOT_CALLS = 20
"""Passes in the graph whose share is a hot figure."""


def is_known(samples_ms: Sequence[float] | np.ndarray, target_ci: float) -> bool:
    """Whether the median's interval is no wider than `target_ci` of it; not by fewer than 10 samples."""
    return len(samples_ms) >= _LEAST_SAMPLES and relative_width(samples_ms) <= target_ci


def summarize(
    samples_ms: Sequence[float] | np.ndarray, target_ci: float, replicates: Sequence[np.ndarray] = ()
) -> Latency:
    """The record's `latency_ms`, from at least one sample.

    With the samples of two or more processes in `replicates` the median is the geometric mean of theirs, and the
    interval is that of this mean (Student's t of the logarithms), for samples of one process know nothing of what
    differs between processes.
    """
    ordered = np.sort(samples_ms)
    medians = [float(np.median(samples)) for samples in replicates] or [float(np.median(ordered))]
    p50 = typical(medians)
    interval = _holding(p50, mean_interval(np.log(medians)) if len(medians) > 1 else median_interval(ordered))
    p90, p99 = (float(value) for value in np.percentile(ordered, (90, 99)))
    return Latency(
        n=len(ordered),
        mean=float(np.mean(ordered)),
        p50=p50,
        p90=p90,
        p99=p99,
        ci95_low=interval[0] if interval else None,
        ci95_high=interval[1] if interval else None,
        stable=interval is not None and interval[1] - interval[0] <= target_ci * p50,
        replicate_p50=medians,
    )


def _holding(p50: float, interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """The interval with the median in it, which roundings of logarithms of equal values may leave just outside."""
    return None if interval is None else (min(interval[0], p50), max(interval[1], p50))


def ratio(rounds: Sequence[tuple[int, float]], anchor: str) -> Ratio | None:
    """Of (replicate, ratio to the anchor in one round) the median ratio and its interval; None without a round.

    One process: the median over its rounds and its interval. Several: the geometric mean of their medians, and its.
    """
    if not rounds:
        return None
    ratios = np.sort([value for _, value in rounds])
    numbers = sorted({replicate for replicate, _ in rounds})
    medians = [float(np.median([value for number, value in rounds if number == wanted])) for wanted in numbers]
    p50 = typical(medians)
    interval = _holding(p50, mean_interval(np.log(medians)) if len(medians) > 1 else median_interval(ratios))
    return Ratio(
        anchor=anchor,
        p50=p50,
        ci95_low=interval[0] if interval else None,
        ci95_high=interval[1] if interval else None,
        rounds=len(ratios),
    )
