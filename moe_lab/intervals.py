"""What the medians of fresh processes (replicates) say: an interval, a ratio of two sets, a verdict. No pandas.

Latencies are compared by their logarithms: noise between processes is a factor, and B/A then mirrors A/B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_CONFIDENCE = 0.95


def t_quantile(probability: float, df: float) -> float:
    """The t with P(T < t) = `probability`, 0.5 or more, for Student's distribution of `df` >= 1 degrees of freedom.

    Newton's method from 0: right of 0 the distribution function is concave, so each step stays left of the answer.
    """
    assert 0.5 <= probability < 1 and df >= 1
    peak = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    t, step = 0.0, math.inf
    while step > 1e-12 * t:
        beyond = _incomplete_beta(df / 2, 0.5, df / (df + t * t), t * t / (df + t * t)) / 2  # P(T > t)
        step = (probability - (1 - beyond)) / (peak * (1 + t * t / df) ** (-(df + 1) / 2))
        t += step
    return t


def _incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularised I_x(a, b), with `rest` = 1 - x; the continued fraction of DLMF 8.17.22, from its far end."""
    if x > (a + 1) / (a + b + 2):  # there it converges slowly, and its mirror image fast
        return 1 - _incomplete_beta(b, a, rest, x)
    if x == 0:
        return 0.0
    fraction = 1.0
    for m in range(20 + int(2 * math.sqrt(max(a, b))), -1, -1):  # terms needed grow with the root of the larger
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        fraction = 1 + odd / fraction
        if m:
            fraction = 1 + m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)) / fraction
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log(rest) - log_beta) / (a * fraction)


class Estimate(NamedTuple):
    """A number and the ends of its 95 % interval; None where there is none."""

    value: float | None
    low: float | None
    high: float | None


def ratio_of_sums(
    above: np.ndarray, below: np.ndarray, within: tuple[float, float] = (-math.inf, math.inf)
) -> Estimate:
    """sum(above) / sum(below) of independent units, with Student's t interval, cut off at `within`.

    The residuals are above - ratio below (Cochran, Sampling Techniques, section 2.11); with one unit there is no
    interval.
    """
    total = float(below.sum())
    ratio = float(above.sum()) / total if total else math.nan
    if not math.isfinite(ratio):
        return Estimate(None, None, None)
    n = len(above)
    if n < 2:
        return Estimate(ratio, None, None)
    error = math.sqrt(n / (n - 1) * float(np.square(above - ratio * below).sum())) / total
    half = t_quantile((1 + _CONFIDENCE) / 2, n - 1) * error
    return Estimate(ratio, max(ratio - half, within[0]), min(ratio + half, within[1]))


def _exp(value: float) -> float:
    """e to a power, kept within what a float holds: two replicates far apart have an interval beyond that."""
    return math.exp(min(max(value, -700.0), 700.0))


def mean_interval(log_medians: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % t interval of the geometric mean of replicates, in the medians' unit, from their logarithms.

    Raises:
        ValueError: fewer than two replicates.
    """
    n = len(log_medians)
    if n < 2:
        raise ValueError(f"an interval needs two replicates or more, and there is {n}: set measure.replicates.")
    mean = float(np.mean(log_medians))
    half = t_quantile((1 + _CONFIDENCE) / 2, n - 1) * float(np.std(log_medians, ddof=1)) / math.sqrt(n)
    return _exp(mean - half), _exp(mean + half)


def ratio_interval(
    a_medians: Sequence[float] | np.ndarray, b_medians: Sequence[float] | np.ndarray
) -> tuple[float, float, float]:
    """B/A of the geometric means, and the low and high end of its 95 % interval: Welch's t on log b - log a.

    B. L. Welch, Biometrika 34 (1947), with Satterthwaite's degrees of freedom: sides may differ in noise and number.
    Where nothing changed it excludes 1 in under 5 % of cells with equal numbers and noise, 6 % with unequal noise;
    two replicates against many are the weak spot (2 against 10: 10 %).

    Raises:
        ValueError: fewer than two replicates on a side.
    """
    n_a, n_b = len(a_medians), len(b_medians)
    if min(n_a, n_b) < 2:
        raise ValueError(f"an interval needs two replicates or more on both sides, not {n_a} and {n_b}.")
    log_a, log_b = np.log(a_medians), np.log(b_medians)
    error_a, error_b = float(np.var(log_a, ddof=1)) / n_a, float(np.var(log_b, ddof=1)) / n_b
    error = error_a + error_b
    half = 0.0
    if error > 0:  # else a coarse clock gave the same median every time
        share_a, share_b = error_a / error, error_b / error
        df = 1 / (share_a**2 / (n_a - 1) + share_b**2 / (n_b - 1))
        half = t_quantile((1 + _CONFIDENCE) / 2, max(df, 1.0)) * math.sqrt(error)
    shift = float(log_b.mean() - log_a.mean())
    return _exp(shift), _exp(shift - half), _exp(shift + half)


def typical(medians: Sequence[float] | np.ndarray) -> float:
    """The median of one process, or the geometric mean of those of several: the middle of `mean_interval`."""
    return float(medians[0]) if len(medians) == 1 else float(np.exp(np.mean(np.log(medians))))


class Judgement(NamedTuple):
    """What two sets of replicates say about B/A; `low` and `high` are None where a side has one replicate only."""

    verdict: str
    ratio: float
    low: float | None
    high: float | None
    why: str


def judge(
    a_medians: Sequence[float],
    b_medians: Sequence[float],
    threshold: float,
    floor: float | None,
    probes: tuple[Sequence[float], Sequence[float]] = ((), ()),
) -> Judgement:
    """Is B slower or faster than A by `threshold` (a ratio minus 1), the same within it, or can that not be told?

    `slower` and `faster` need an interval that excludes 1 and a ratio beyond the threshold and, where it is known, the
    machine's noise floor (how far two runs of the same lie apart, a ratio minus 1). Where both sides have a probe for
    each replicate (`probes`: a fixed piece of work timed beside it), the same must hold of the latencies in units of
    the probe: else the machine may have changed, and not the code. `same` needs the whole interval within the
    threshold. With one replicate on a side there is no interval: the floor alone decides.
    """
    limit = max(threshold, floor or 0.0)
    if min(len(a_medians), len(b_medians)) >= 2:
        ratio, low, high = ratio_interval(a_medians, b_medians)
        difference = max(ratio, 1 / ratio) - 1
        excludes_1 = low > 1 or high < 1
        if excludes_1 and difference >= limit:
            verdict, why = _direction(ratio), f"the interval excludes 1 and the ratio is beyond {percent(limit)}"
            if len(probes[0]) == len(a_medians) and len(probes[1]) == len(b_medians):
                in_probes = ratio_interval(np.divide(a_medians, probes[0]), np.divide(b_medians, probes[1]))
                if _direction(in_probes[0]) != verdict or in_probes[1] <= 1 <= in_probes[2]:
                    machine = _exp(float(np.mean(np.log(probes[1])) - np.mean(np.log(probes[0]))))
                    verdict = "inconclusive"
                    why = f"the machine may have changed: its probe took {machine:.3g} times as long in B, give or take"
        elif 1 / (1 + threshold) <= low and high <= 1 + threshold:
            verdict, why = "same", f"the interval lies within {percent(threshold)}"
        elif excludes_1 and difference >= threshold:
            verdict, why = "inconclusive", f"the ratio is not beyond this machine's noise floor of {percent(limit)}"
        else:
            verdict, why = "inconclusive", "the interval is too wide to tell: more replicates narrow it"
        return Judgement(verdict, ratio, low, high, why)
    ratio = _exp(float(np.mean(np.log(b_medians)) - np.mean(np.log(a_medians))))
    difference = max(ratio, 1 / ratio) - 1
    sides = " and ".join(name for name, medians in (("A", a_medians), ("B", b_medians)) if len(medians) == 1)
    why = f"one replicate in {sides}, so no interval"
    if floor is None:
        return Judgement("inconclusive", ratio, None, None, why)
    why += f"; judged by this machine's noise floor of {percent(floor)}"
    if difference > floor and difference >= threshold:
        verdict = _direction(ratio)
    elif floor < threshold and difference <= threshold - floor:
        verdict = "same"
    else:
        verdict = "inconclusive"
    return Judgement(verdict, ratio, None, None, why)


def _direction(ratio: float) -> str:
    return "slower" if ratio > 1 else "faster"


def percent(share: float) -> str:
    """0.03 as `3 %`."""
    return f"{100 * share:.0f} %" if abs(share) >= 9.995 else f"{100 * share:.3g} %"
