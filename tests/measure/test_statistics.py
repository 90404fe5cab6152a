"""measure/statistics.py: the interval of the median and the summary of a series."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_lab.measure.statistics import is_known, median_interval, ratio, relative_width, summarize

SAMPLES = st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=40)


def rank(n: int) -> int:
    """r of the interval [x_(r), x_(n+1-r)] that the code chooses for n samples."""
    interval = median_interval(range(1, n + 1))
    assert interval is not None
    return int(interval[0])


def missed(n: int, r: int) -> float:
    """Exact probability that [x_(r), x_(n+1-r)] misses the median: 2 P(Binomial(n, 1/2) < r)."""
    return 2 * sum(math.comb(n, i) for i in range(r)) / 2**n


def exact_rank(n: int) -> int:
    """The largest r whose interval is missed with at most 5 %."""
    return max(r for r in range(1, n // 2 + 1) if missed(n, r) <= 0.05)


@pytest.mark.parametrize("n", [pytest.param(n, id=f"n{n}") for n in (6, 20, 60, 300)])
def test_interval_holds_the_median_of_skewed_samples_in_95_of_100_series(n: int) -> None:
    """Coverage does not depend on the distribution; three standard errors of the simulation are allowed."""
    series = 3000
    drawn = np.sort(np.random.default_rng(7).lognormal(mean=0.0, sigma=1.5, size=(series, n)), axis=1)
    hits = sum(low <= 1.0 <= high for low, high in map(median_interval, drawn))
    assert hits / series >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / series)


@pytest.mark.parametrize("n", [pytest.param(n, id=f"n{n}") for n in (6, 7, 20, 60, 199, 200, 201, 202, 300, 999)])
def test_interval_is_missed_with_at_most_5_percent_by_the_exact_binomial(n: int) -> None:
    """Both branches promise 95 %, not about 95 %."""
    assert missed(n, rank(n)) <= 0.05


@pytest.mark.parametrize("n", [pytest.param(n, id=f"n{n}") for n in (6, 9, 20, 61, 137, 200)])
def test_interval_is_the_narrowest_symmetric_one_up_to_200_samples(n: int) -> None:
    """One rank further in would promise too much."""
    assert rank(n) == exact_rank(n)


@pytest.mark.parametrize("n", [pytest.param(n, id=f"n{n}") for n in (180, 199, 200, 201, 202, 220, 400)])
def test_both_branches_agree_with_the_exact_rank_to_one(n: int) -> None:
    """There is no jump where the formula changes."""
    assert exact_rank(n) - 1 <= rank(n) <= exact_rank(n)


@pytest.mark.parametrize("n", [pytest.param(n, id=f"n{n}") for n in range(6)])
def test_there_is_no_interval_below_six_samples(n: int) -> None:
    """With five, even the whole range misses the median in 6 % of series."""
    assert median_interval([1.0] * n) is None


def test_interval_is_symmetric_in_ranks() -> None:
    """The same number of samples lies outside on either side."""
    for n in range(6, 260):
        low, high = median_interval(range(1, n + 1)) or (0, 0)
        assert low - 1 == n - high


@settings(max_examples=40, deadline=None)
@given(samples=SAMPLES, seed=st.integers(0, 9))
def test_summary_does_not_depend_on_the_order_of_the_samples(samples: list[float], seed: int) -> None:
    """Drift is seen in samples.npz, not here."""
    shuffled = random.Random(seed).sample(samples, len(samples))
    one, other = summarize(samples, 0.02), summarize(shuffled, 0.02)
    assert other.mean == pytest.approx(one.mean, rel=1e-12)
    other.mean = one.mean
    assert one == other


@settings(max_examples=40, deadline=None)
@given(samples=st.lists(st.floats(1e-3, 1e6), min_size=6, max_size=40))
def test_interval_holds_the_samples_own_median_and_percentiles_ascend(samples: list[float]) -> None:
    """min <= low <= p50 <= high <= max, and p50 <= p90 <= p99."""
    latency = summarize(samples, 0.02)
    assert latency.ci95_low is not None and latency.ci95_high is not None
    assert min(samples) <= latency.ci95_low <= latency.p50 <= latency.ci95_high <= max(samples)
    assert latency.p50 <= latency.p90 <= latency.p99 <= max(samples)


def test_summary_of_1_to_101_is_known() -> None:
    """Every field against a number written out."""
    latency = summarize([float(value) for value in range(1, 102)], target_ci=0.5)
    assert (latency.n, latency.mean, latency.p50, latency.p90, latency.p99) == (101, 51.0, 51.0, 91.0, 100.0)
    assert (latency.ci95_low, latency.ci95_high) == (41.0, 61.0)
    assert latency.cache == "natural"


@pytest.mark.parametrize(
    ("samples", "target", "stable"),
    [
        pytest.param([5.0] * 10, 0.02, True, id="no_noise"),
        pytest.param([1.0, 1.0, 1.0, 2.0, 2.0, 2.0], 0.02, False, id="two_modes"),
        pytest.param([1.0, 1.0, 1.0, 2.0, 2.0, 2.0], 0.7, True, id="two_modes_and_a_wide_target"),
        pytest.param([5.0] * 5, 0.02, False, id="too_few_to_know"),
        pytest.param([5.0], 10.0, False, id="one_sample"),
    ],
)
def test_stable_says_whether_the_median_is_known_to_the_target(
    samples: list[float], target: float, stable: bool
) -> None:
    """The interval's width as a share of the median, against `target_ci`."""
    assert summarize(samples, target).stable is stable


@pytest.mark.parametrize(
    ("n", "target_ci", "known"),
    [
        pytest.param(9, 1.0, False, id="too_few_samples"),
        pytest.param(10, 1.0, True, id="enough_samples"),
        pytest.param(40, 0.0, True, id="no_wider_than_the_target"),
        pytest.param(5, math.inf, False, id="no_interval"),
    ],
)
def test_the_timing_ends_when_the_median_is_known(n: int, target_ci: float, known: bool) -> None:
    """Fewer than ten samples never know it, however alike they are."""
    assert is_known([2.0] * n, target_ci) is known
    assert not is_known([1.0, 3.0] * 20, 1 - 1e-9)  # the interval is as wide as the median


def test_few_samples_leave_the_interval_null() -> None:
    """Unknown is null, never 0."""
    latency = summarize([1.0, 2.0], 0.02)
    assert latency.ci95_low is None and latency.ci95_high is None
    assert math.isinf(relative_width([1.0, 2.0]))


@settings(max_examples=30, deadline=None)
@given(samples=st.lists(st.floats(1e-2, 1e3), min_size=6, max_size=30), power=st.integers(-10, 10))
def test_relative_width_has_no_unit(samples: list[float], power: int) -> None:
    """Seconds instead of milliseconds change nothing (a power of two is exact)."""
    assert relative_width([value * 2.0**power for value in samples]) == pytest.approx(relative_width(samples))


def test_a_numpy_array_is_as_good_as_a_list() -> None:
    """Samples come as arrays from the clocks, and the record holds plain numbers."""
    samples = np.linspace(1, 2, 37)
    latency = summarize(samples, 0.02)
    assert latency == summarize(samples.tolist(), 0.02)
    assert {type(value) for value in (latency.mean, latency.p50, latency.ci95_low)} == {float}


def test_replicates_give_the_interval_of_their_medians() -> None:
    """Student's t with two degrees of freedom on the logarithms, by hand: 4.3027 standard errors."""
    replicates = [np.array([value] * 9) for value in (1.0, 1.1, 1.21)]
    latency = summarize(np.concatenate(replicates), 0.02, replicates)
    assert latency.replicate_p50 == [1.0, 1.1, 1.21]
    half = 4.302653 * math.log(1.1) / math.sqrt(3)
    assert latency.ci95_low == pytest.approx(1.1 * math.exp(-half), rel=1e-5)
    assert latency.ci95_high == pytest.approx(1.1 * math.exp(half), rel=1e-5)
    assert not latency.stable
    assert (latency.n, latency.p50) == (27, pytest.approx(1.1))


def test_one_replicate_is_no_replicate() -> None:
    """The interval is that of its samples, which a second process may widen."""
    samples = np.linspace(1, 1.01, 50)
    assert summarize(samples, 0.02, [samples]) == summarize(samples, 0.02)
    assert summarize(samples, 0.02).replicate_p50 == [pytest.approx(np.median(samples))]
    assert summarize(samples, 0.02).stable
    assert not summarize(np.concatenate([samples, 2 * samples]), 0.02, [samples, 2 * samples]).stable


@example(replicates=[[1.982421875, 422996.0282984941]] * 2)  # of equal values: rounding alone
@settings(max_examples=60, deadline=None)
@given(replicates=st.lists(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=9), min_size=2, max_size=6))
def test_the_interval_of_replicates_holds_the_recorded_median(replicates: list[list[float]]) -> None:
    """Processes may have made different numbers of samples, so the pooled median may lie beside their mean."""
    arrays = [np.array(samples) for samples in replicates]
    latency = summarize(np.concatenate(arrays), 0.02, arrays)
    assert latency.ci95_low is not None and latency.ci95_high is not None
    assert latency.ci95_low <= latency.p50 <= latency.ci95_high
    assert latency.replicate_p50 == [float(np.median(samples)) for samples in arrays]


def test_the_ratio_of_one_process_is_the_median_of_its_rounds() -> None:
    """Its interval is that of the median, from order statistics: of 20 rounds the 6th and the 15th."""
    rounds = [(0, value) for value in random.Random(3).sample([1 + i / 100 for i in range(1, 21)], 20)]
    found = ratio(rounds, "a" * 12)
    assert found is not None
    assert (found.anchor, found.rounds) == ("a" * 12, 20)
    assert found.p50 == pytest.approx(1.105)
    assert (found.ci95_low, found.ci95_high) == (pytest.approx(1.06), pytest.approx(1.15))


def test_the_ratio_of_several_processes_has_the_interval_of_their_medians() -> None:
    """Many rounds of one process know nothing of another: within a process they agree, the interval stays wide."""
    rounds = [(replicate, 2.0 * 1.1**replicate) for replicate in range(3) for _ in range(100)]
    found = ratio(rounds, "a" * 12)
    assert found is not None and found.ci95_low is not None and found.ci95_high is not None
    half = 4.302653 * math.log(1.1) / math.sqrt(3)
    assert (found.p50, found.rounds) == (pytest.approx(2.2), 300)
    assert found.ci95_low == pytest.approx(2.2 * math.exp(-half), rel=1e-5)
    assert found.ci95_high == pytest.approx(2.2 * math.exp(half), rel=1e-5)


def test_a_ratio_of_few_rounds_has_no_interval_and_of_none_there_is_none() -> None:
    """Unknown is null."""
    assert ratio([], "a" * 12) is None
    found = ratio([(0, 1.5)] * 5, "a" * 12)
    assert found is not None
    assert (found.p50, found.ci95_low, found.ci95_high, found.rounds) == (1.5, None, None, 5)


@settings(max_examples=60, deadline=None)
@given(
    rounds=st.lists(st.tuples(st.integers(0, 3), st.floats(0.01, 100)), min_size=1, max_size=40),
    seed=st.integers(0, 9),
)
def test_a_ratio_lies_in_its_interval_whatever_the_order_of_the_rounds(
    rounds: list[tuple[int, float]], seed: int
) -> None:
    """Also where one process has few rounds."""
    found = ratio(rounds, "a" * 12)
    assert found is not None
    other = ratio(random.Random(seed).sample(rounds, len(rounds)), "a" * 12)
    assert other == found
    if found.ci95_low is not None and found.ci95_high is not None:
        assert found.ci95_low <= found.p50 <= found.ci95_high
