"""results/intervals.py: what the medians of fresh processes say."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import trapezoid

from moe_lab.intervals import judge, mean_interval, percent, ratio_interval, ratio_of_sums, t_quantile
from tests import tiny

MEDIANS = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=7)
ANY_MEDIANS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4)
FLOORS = st.none() | st.floats(0, 0.2)
TABLE = {  # Student's t as printed in textbooks: degrees of freedom, two-sided 90, 95, 99 %
    1: (6.314, 12.706, 63.657),
    2: (2.920, 4.303, 9.925),
    3: (2.353, 3.182, 5.841),
    4: (2.132, 2.776, 4.604),
    7: (1.895, 2.365, 3.499),
    10: (1.812, 2.228, 3.169),
    30: (1.697, 2.042, 2.750),
    120: (1.658, 1.980, 2.617),
}


def verdicts(
    rng: np.random.Generator, cells: int, n: tuple[int, int], sd: tuple[float, float], ratio: float = 1.0
) -> Counter[str]:
    """The count of each verdict over simulated cells with log-normal noise between processes."""
    a = np.exp(rng.normal(0, sd[0], (cells, n[0])))
    b = ratio * np.exp(rng.normal(0, sd[1], (cells, n[1])))
    return Counter(judge(list(a[cell]), list(b[cell]), 0.03, None).verdict for cell in range(cells))


@pytest.mark.parametrize("df", [pytest.param(df, id=f"df{df}") for df in TABLE])
def test_quantiles_are_those_of_the_tables(df: int) -> None:
    """To the digits printed."""
    assert [round(t_quantile(p, df), 3) for p in (0.95, 0.975, 0.995)] == list(TABLE[df])


@given(probability=st.floats(0.5, 0.9999))
def test_quantiles_have_closed_forms_for_one_and_two_degrees(probability: float) -> None:
    """One is Cauchy's distribution; for two see any textbook."""
    x = 2 * probability - 1
    assert t_quantile(probability, 1) == pytest.approx(math.tan(math.pi * x / 2), rel=1e-9, abs=1e-12)
    assert t_quantile(probability, 2) == pytest.approx(x * math.sqrt(2 / (1 - x * x)), rel=1e-9, abs=1e-12)


@given(df=st.floats(1, 500), probability=st.floats(0.6, 0.999))
def test_the_density_up_to_a_quantile_integrates_to_its_probability(df: float, probability: float) -> None:
    """Also for degrees of freedom that are not whole, as Welch's are."""
    t = np.linspace(0, t_quantile(probability, df), 20_001)
    peak = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    assert 0.5 + trapezoid(peak * (1 + t * t / df) ** (-(df + 1) / 2), t) == pytest.approx(probability, abs=1e-6)


def test_quantiles_are_those_of_scipy() -> None:
    """Where it happens to be installed."""
    stats = pytest.importorskip("scipy.stats")
    for df in np.geomspace(1, 1e5, 60):
        for probability in (0.51, 0.9, 0.975, 0.9995):
            assert t_quantile(probability, df) == pytest.approx(stats.t.ppf(probability, df), rel=1e-8)


def test_the_interval_of_a_mean_by_hand() -> None:
    """Logs 0, 1, 2: mean 1, deviation 1, t of two degrees."""
    low, high = mean_interval([0.0, 1.0, 2.0])
    half = 4.30265273 / math.sqrt(3)
    assert (math.log(low), math.log(high)) == pytest.approx((1 - half, 1 + half))


@pytest.mark.slow
def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    """95 % of the time, for three replicates."""
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(math.log(5), 0.04, 3)) for _ in range(4000)]
    assert 0.94 < np.mean([low < 5 < high for low, high in intervals]) < 0.96


def test_welchs_interval_by_hand() -> None:
    """Sides of different number and noise: 3.4 degrees of freedom, between those of the smaller side and of both."""
    log_a, log_b = np.array([0.0, 0.02, 0.04]), np.array([0.1, 0.2, 0.3, 0.4])
    error_a, error_b = 0.02**2 / 3, np.var(log_b, ddof=1) / 4
    df = (error_a + error_b) ** 2 / (error_a**2 / 2 + error_b**2 / 3)
    ratio, low, high = ratio_interval(np.exp(log_a), np.exp(log_b))
    half = t_quantile(0.975, df) * math.sqrt(error_a + error_b)
    assert 3 < df < 4
    assert (math.log(ratio), math.log(low), math.log(high)) == pytest.approx((0.23, 0.23 - half, 0.23 + half))


@given(a=MEDIANS, b=MEDIANS, unit=st.floats(1e-3, 1e3))
def test_ratios_mirror_and_have_no_unit(a: list[float], b: list[float], unit: float) -> None:
    """A/B is 1 over B/A, ends exchanged; microseconds give the same as milliseconds."""
    ratio, low, high = ratio_interval(a, b)
    assert low <= ratio <= high
    assert ratio_interval(b, a) == pytest.approx((1 / ratio, 1 / high, 1 / low), rel=1e-6)
    scaled = ratio_interval([unit * x for x in a], [unit * x for x in b])
    assert (scaled[0], math.log(scaled[2] / scaled[1])) == pytest.approx(
        (ratio, math.log(high / low)), rel=1e-6, abs=1e-6
    )


def test_a_clock_too_coarse_to_show_noise_gives_a_point() -> None:
    """All medians equal: nothing to divide by."""
    assert ratio_interval([2.0, 2.0], [2.1, 2.1, 2.1]) == pytest.approx((1.05, 1.05, 1.05))


def test_medians_beyond_reason_stay_finite() -> None:
    """The interval of two replicates that far apart is larger than a float."""
    assert np.isfinite(ratio_interval([1e-300, 1e300], [1.0, 1.0])).all()
    assert np.isfinite(judge([1e-320], [1e308], 0.03, 0.01)[1])


@pytest.mark.parametrize(
    ("a", "b"), [pytest.param(1, 2, id="one_in_a"), pytest.param(2, 1, id="one_in_b"), pytest.param(0, 0, id="none")]
)
def test_an_interval_needs_two_replicates(a: int, b: int) -> None:
    """The message says how many there are."""
    with pytest.raises(ValueError, match=f"not {a} and {b}"):
        ratio_interval([1.0] * a, [1.0] * b)
    with pytest.raises(ValueError, match=f"there is {min(a, b)}"):
        mean_interval([1.0] * min(a, b))


@pytest.mark.slow
@pytest.mark.parametrize("sd", [pytest.param(sd, id=f"noise_{sd}") for sd in (0.005, 0.02, 0.07)])
def test_what_is_alike_is_rarely_called_different(sd: float) -> None:
    """Three replicates of the same on both sides: slower or faster in under 5 % of the cells."""
    counts = verdicts(np.random.default_rng(1), 4000, (3, 3), (sd, sd))
    assert counts["slower"] + counts["faster"] < 0.05 * 4000


@pytest.mark.parametrize(
    ("n", "noise"), [pytest.param(3, 0.01, id="three_replicates"), pytest.param(5, 0.02, id="five_and_more_noise")]
)
def test_a_tenth_is_found(n: int, noise: float) -> None:
    """In nearly every cell, and never with the wrong sign."""
    for ratio, expected in ((1.1, "slower"), (1 / 1.1, "faster")):
        counts = verdicts(np.random.default_rng(2), 1000, (n, n), (noise, noise), ratio)
        assert counts[expected] > 950 and set(counts) <= {expected, "inconclusive"}


def test_what_is_alike_is_called_the_same_when_it_is_quiet() -> None:
    """Five replicates with half a percent of noise."""
    assert verdicts(np.random.default_rng(3), 1000, (5, 5), (0.005, 0.005))["same"] > 950


@given(a=ANY_MEDIANS, b=ANY_MEDIANS, floor=FLOORS)
def test_verdicts_mirror(a: list[float], b: list[float], floor: float | None) -> None:
    """Faster one way is slower the other way."""
    mirrored = {"slower": "faster", "faster": "slower"}
    there, back = judge(a, b, 0.0312345, floor), judge(b, a, 0.0312345, floor)
    assert back.verdict == mirrored.get(there.verdict, there.verdict)
    assert back.ratio == pytest.approx(1 / there.ratio)


@pytest.mark.parametrize(
    ("a", "b", "floor", "verdict"),
    [
        pytest.param([1, 1.01, 0.99], [1.1, 1.11, 1.09], None, "slower", id="slower"),
        pytest.param([1.1, 1.11, 1.09], [1, 1.01, 0.99], None, "faster", id="faster"),
        pytest.param([1, 1.001, 0.999], [1.02, 1.021, 1.019], None, "same", id="shown_but_below_the_threshold"),
        pytest.param([1, 1.001, 0.999], [1.03, 1.05, 1.01], None, "inconclusive", id="interval_too_wide"),
        pytest.param([1.03, 1.05, 1.01], [1, 1.001, 0.999], None, "inconclusive", id="interval_too_wide_when_fast"),
        pytest.param([1, 1.03], [1.01, 1.0], None, "inconclusive", id="interval_too_wide_on_both_sides"),
        pytest.param([1, 1.01, 0.99], [1.1, 1.11, 1.09], 0.07, "slower", id="beyond_the_floor"),
        pytest.param([1, 1.01, 0.99], [1.1, 1.11, 1.09], 0.12, "inconclusive", id="within_the_floor"),
        pytest.param([1, 1.001, 0.999], [1.001, 1, 1.002], 0.12, "same", id="replicates_need_no_floor_to_be_the_same"),
        pytest.param([1], [2], None, "inconclusive", id="one_replicate_says_nothing"),
        pytest.param([1], [1], None, "inconclusive", id="not_even_the_same"),
        pytest.param([1], [1.1, 1.1, 1.1], None, "inconclusive", id="one_replicate_in_a"),
        pytest.param([1.1, 1.1, 1.1], [1], None, "inconclusive", id="one_replicate_in_b"),
        pytest.param([1], [1.1], 0.07, "slower", id="one_replicate_beyond_the_floor"),
        pytest.param([1.1], [1], 0.07, "faster", id="one_replicate_faster"),
        pytest.param([1], [1.06], 0.07, "inconclusive", id="one_replicate_within_the_floor"),
        pytest.param([1], [1.015], 0.01, "same", id="one_replicate_the_same"),
        pytest.param([1], [1.025], 0.01, "inconclusive", id="too_near_the_threshold_for_the_same"),
        pytest.param([1], [1.025], 0.001, "same", id="nearer_where_the_floor_is_low"),
        pytest.param([1], [1], 0.03, "inconclusive", id="floor_as_large_as_the_threshold"),
        pytest.param([1], [1.029], 0.01, "inconclusive", id="beyond_the_floor_but_not_the_threshold"),
        pytest.param([2, 2], [2.062, 2.062], None, "slower", id="just_beyond_the_threshold"),
        pytest.param([2, 2], [2.058, 2.058], None, "same", id="just_within_the_threshold"),
        pytest.param([2, 2], [2.142, 2.142], 0.07, "slower", id="just_beyond_the_floor"),
        pytest.param([2, 2], [2.138, 2.138], 0.07, "inconclusive", id="just_within_the_floor"),
        pytest.param([2, 2], [2, 2], None, "same", id="no_noise_at_all"),
        pytest.param([2, 2], [2.1, 2.1], None, "slower", id="no_noise_and_a_difference"),
    ],
)
def test_the_rule(a: list[float], b: list[float], floor: float | None, verdict: str) -> None:
    """Threshold 3 %; an interval only where both sides have replicates; always a reason."""
    judgement = judge(a, b, 0.03, floor)
    assert judgement.verdict == verdict
    assert (judgement.low is None) == (judgement.high is None) == (min(len(a), len(b)) < 2)
    assert judgement.why


def test_the_reason_names_the_side_with_one_replicate_and_the_floor() -> None:
    """So that a person knows what to repeat."""
    assert "one replicate in A," in judge([1], [1, 1], 0.03, None).why
    assert "one replicate in B," in judge([1, 1], [1], 0.03, None).why
    assert "one replicate in A and B," in judge([1], [1], 0.03, None).why
    assert "noise floor of 7 %" in judge([1], [1], 0.03, 0.07).why
    assert "noise floor of 12.5 %" in judge([1, 1.01], [1.12, 1.121], 0.001, 0.125).why


def test_percents_are_short() -> None:
    """As people write them."""
    shares = (0.03, 0.125, 1 / 3, 9.99, 12.344, 1e4)
    assert [percent(share) for share in shares] == ["3 %", "12.5 %", "33.3 %", "999 %", "1234 %", "1000000 %"]


def test_no_pandas_is_loaded() -> None:
    """A run may import it."""
    code = "import sys, moe_lab.intervals; print({'pandas', 'torch', 'scipy'} & set(sys.modules))"
    assert tiny.python(code).strip() == "set()"


def test_a_change_of_the_machine_is_none_of_the_code() -> None:
    """All 20 % slower, the probe too: inconclusive, and the reason names the probe. The probe the same: slower."""
    a, b = [1.0, 1.01, 0.99], [1.2, 1.21, 1.19]
    steady, slower = [2.0, 2.01, 1.99], [2.4, 2.41, 2.39]
    assert judge(a, b, 0.03, None, (steady, steady)).verdict == "slower"
    assert judge(b, a, 0.03, None, (steady, steady)).verdict == "faster"
    changed = judge(a, b, 0.03, None, (steady, slower))
    assert changed.verdict == "inconclusive"
    assert "its probe took 1.2 times as long in B" in changed.why
    overshot = [2 * x for x in slower]  # in units of the probe B is the faster one
    assert judge(a, b, 0.03, None, (steady, overshot)).verdict == "inconclusive"
    assert judge(b, a, 0.03, None, (overshot, steady)).verdict == "inconclusive"
    for older in ((steady, []), ([], slower), ([], [])):  # an older record has no probe
        assert judge(a, b, 0.03, None, older).verdict == "slower"
    for fewer in ((steady[:2], slower), (steady, slower[:2])):  # a replicate without one
        assert judge(a, b, 0.03, None, fewer).verdict == "slower"


def test_a_ratio_of_sums_by_hand() -> None:
    """2 of 4, 1 of 4 and 3 of 4: residuals 0, -1 and 1; the half width is t times sqrt(3 / 2 2) / 12."""
    found = ratio_of_sums(np.array([2.0, 1, 3]), np.array([4.0, 4, 4]))
    half = t_quantile(0.975, 2) * math.sqrt(3 / 2 * 2) / 12
    assert found == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert ratio_of_sums(np.array([2.0, 1, 3]), np.array([4.0, 4, 4]), (0.0, 1.0)).low == 0.0
    assert ratio_of_sums(np.array([1.0]), np.array([4.0])) == (0.25, None, None)
    assert ratio_of_sums(np.array([1.0]), np.array([0.0])) == (None, None, None)
