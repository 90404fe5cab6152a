"""models/rope.py: frequencies of each scaling against their definitions and transformers, and the kept tables."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.models.rope import Rope, Ropes, frequencies, rope_tables

CPU = torch.device("cpu")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

scalings = pytest.mark.parametrize(
    "scaling",
    [
        pytest.param({"rope_type": "linear", "factor": 2.5}, id="linear"),
        pytest.param(LLAMA3, id="llama3"),
        pytest.param({**LLAMA3, "original_max_position_embeddings": 64, "low_freq_factor": 0.3}, id="llama3_short"),
        pytest.param(YARN, id="yarn"),
        pytest.param({**YARN, "original_max_position_embeddings": 64}, id="yarn_short"),
        pytest.param({**YARN, "factor": 1.0}, id="yarn_factor_1"),
        pytest.param({**YARN, "factor": 0.5}, id="yarn_factor_below_1"),
        pytest.param({**YARN, "beta_fast": 16, "beta_slow": 0.5}, id="yarn_betas"),
        pytest.param({**YARN, "beta_fast": None, "beta_slow": None}, id="yarn_null_betas"),
        pytest.param({**YARN, "truncate": False}, id="yarn_not_truncated"),
        pytest.param({**YARN, "attention_factor": 1.25}, id="yarn_attention_factor"),
        pytest.param({**YARN, "mscale": 0.7, "mscale_all_dim": 1.5}, id="yarn_mscale"),
        pytest.param({**YARN, "mscale": 0.7}, id="yarn_half_of_mscale"),
        pytest.param({**YARN, "mscale": 1.0, "mscale_all_dim": 0}, id="yarn_mscale_0"),
        pytest.param({**YARN, "attention_factor": 2.0, "mscale": 0.7, "mscale_all_dim": 1.5}, id="yarn_both"),
        pytest.param({**YARN, "beta_fast": 1, "beta_slow": 1}, id="yarn_no_ramp"),
    ],
)


def defined(head_dim: int, theta: float, scaling: dict[str, Any]) -> tuple[list[float], float]:
    """(frequencies, growth of cos and sin) one dimension at a time, in Python's floats, from the papers."""
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    kind, factor = scaling["rope_type"], scaling.get("factor", 1.0)
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return [f / factor for f in plain], 1.0
    original = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        result = []
        for f in plain:
            wavelength = 2 * math.pi / f
            if wavelength < original / scaling["high_freq_factor"]:
                result.append(f)
            elif wavelength > original / scaling["low_freq_factor"]:
                result.append(f / factor)
            else:
                low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
                share = (original / wavelength - low) / (high - low)
                result.append((1 - share) * f / factor + share * f)
        return result, 1.0
    fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
    first, last = (
        head_dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in (fast, slow)
    )
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    result = []
    for i, f in enumerate(plain):
        slowed = min(1.0, max(0.0, (i - first) / (last - first)))
        result.append(slowed * f / factor + (1 - slowed) * f)
    return result, 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def assert_frequencies(head_dim: int, theta: float, scaling: dict[str, Any]) -> None:
    got, grown = frequencies(head_dim, theta, scaling)
    want, want_grown = defined(head_dim, theta, scaling)
    assert got.dtype == torch.float32 and got.shape == (head_dim // 2,)
    # Of the plain frequencies: between slowed and plain ones float32 loses what cancels.
    plain = torch.tensor([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=torch.float64)
    torch.testing.assert_close(got / plain, torch.tensor(want, dtype=torch.float64) / plain, rtol=1e-5, atol=2e-6)
    assert grown == pytest.approx(want_grown, rel=1e-12)


HEAD_DIMS, THETAS = st.integers(1, 64).map(lambda half: 2 * half), st.floats(50, 1e7)


@settings(max_examples=50, deadline=None)
@given(head_dim=HEAD_DIMS, theta=THETAS, factor=st.floats(1, 64), kind=st.sampled_from(["default", "linear"]))
def test_plain_and_linear_frequencies_are_their_definition(
    head_dim: int, theta: float, factor: float, kind: str
) -> None:
    """theta^(-2i/d), divided by the factor."""
    assert_frequencies(head_dim, theta, {"rope_type": kind, "factor": factor})


@settings(max_examples=50, deadline=None)
@given(half=st.integers(1, 64), more=st.integers(0, 64), theta=THETAS, factor=st.floats(1, 64))
def test_proportional_frequencies_are_those_of_the_whole_head(
    half: int, more: int, theta: float, factor: float
) -> None:
    """The first of them, divided by the factor; the other dimensions do not turn."""
    head_dim = 2 * (half + more)
    scaling = {"rope_type": "proportional", "head_dim": head_dim, "factor": factor}
    got, grown = frequencies(2 * half, theta, scaling)
    whole = [theta ** (-2 * i / head_dim) / factor for i in range(half)]
    torch.testing.assert_close(got, torch.tensor(whole), rtol=1e-5, atol=0)
    assert grown == 1
    cos_Nd, sin_Nd = rope_tables(3, head_dim, theta, CPU, scaling, 2 * half)
    still = [i for i in range(head_dim) if i % (half + more) >= half]
    assert bool((cos_Nd[:, still] == 1).all()) and not sin_Nd[:, still].any()


def test_layers_that_turn_alike_share_their_tables() -> None:
    """Two kinds in four layers; each gets its own width, at the first positions and at others."""
    one, other = (6, 100.0, None, None), (8, 50.0, None, 4)
    ropes = Ropes([one, other, one, other])
    assert len(ropes) == 2
    ropes.reserve(9, CPU)
    for position_S in (None, torch.tensor([7, 3])):
        tables = ropes.tables(2, CPU, position_S)
        rows = slice(0, 2) if position_S is None else position_S
        for layer, mine in zip((one, other, one, other), tables, strict=True):
            head_dim, theta, scaling, rotary_dim = layer
            for got, want in zip(mine, rope_tables(9, head_dim, theta, CPU, scaling, rotary_dim), strict=True):
                assert torch.equal(got, want[rows])


@settings(max_examples=100, deadline=None)
@given(
    head_dim=HEAD_DIMS,
    theta=THETAS,
    factor=st.floats(1, 64),
    original=st.integers(16, 1 << 17),
    low=st.floats(0.1, 4),
    width=st.floats(0.5, 16),
)
def test_frequencies_of_llama3_are_their_definition(
    head_dim: int, theta: float, factor: float, original: int, low: float, width: float
) -> None:
    """Three ranges of wavelengths, the middle one blended."""
    scaling = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original}
    assert_frequencies(head_dim, theta, {**scaling, "low_freq_factor": low, "high_freq_factor": low + width})


@settings(max_examples=100, deadline=None)
@given(
    head_dim=HEAD_DIMS.filter(lambda d: d > 8),
    theta=st.floats(1000, 1e7),
    factor=st.floats(1, 64),
    original=st.integers(512, 1 << 17),
    slow=st.floats(0.5, 2),
    times=st.floats(4, 32),
    truncate=st.booleans(),
)
def test_frequencies_of_yarn_are_their_definition(
    head_dim: int, theta: float, factor: float, original: int, slow: float, times: float, truncate: bool
) -> None:
    """A ramp over the dimensions between those of `beta_fast` and of `beta_slow` turns."""
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    scaling |= {"beta_slow": slow, "beta_fast": slow * times, "truncate": truncate}
    assert_frequencies(head_dim, theta, scaling)


@scalings
@pytest.mark.parametrize("theta", [pytest.param(theta, id=f"theta{theta:g}") for theta in (500.0, 1e4, 1e6)])
@pytest.mark.parametrize("head_dim", [pytest.param(d, id=f"d{d}") for d in (8, 64, 128)])
def test_frequencies_are_those_of_transformers(scaling: dict[str, Any], theta: float, head_dim: int) -> None:
    """Every scaling and key, and what cos and sin are multiplied by."""
    pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig

    config = MixtralConfig(head_dim=head_dim, max_position_embeddings=1 << 17)
    config.rope_parameters = {**scaling, "rope_theta": theta}
    want, want_grown = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, CPU)
    got, grown = frequencies(head_dim, theta, scaling)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert grown == pytest.approx(want_grown, rel=1e-12)


def test_no_scaling_is_the_default_scaling() -> None:
    """None and {rope_type: default} are the same."""
    one, other = frequencies(16, 1e4), frequencies(16, 1e4, {"rope_type": "default"})
    assert torch.equal(one[0], other[0]) and one[1] == other[1] == 1.0


@scalings
def test_the_growth_multiplies_cos_and_sin(scaling: dict[str, Any]) -> None:
    """cos^2 + sin^2 is its square at every position."""
    cos_Sd, sin_Sd = rope_tables(40, 16, 1e4, CPU, scaling)
    grown = frequencies(16, 1e4, scaling)[1]
    torch.testing.assert_close(cos_Sd**2 + sin_Sd**2, torch.full((40, 16), grown**2))


def test_tables_hold_the_angles_of_each_position_twice() -> None:
    """position * f_i for dimension i and i + d/2, also far out."""
    scaling = {"rope_type": "linear", "factor": 2.0}
    cos_Sd, sin_Sd = rope_tables(3000, 8, 1e4, CPU, scaling)
    for position in (0, 1, 17, 2999):
        for i in range(8):
            angle = position * 1e4 ** (-2 * (i % 4) / 8) / 2
            assert float(cos_Sd[position, i]) == pytest.approx(math.cos(angle), abs=3e-4)
            assert float(sin_Sd[position, i]) == pytest.approx(math.sin(angle), abs=3e-4)


@scalings
def test_kept_computed_and_looked_up_tables_agree(scaling: dict[str, Any]) -> None:
    """`reserve`, `forward` and `at`, bit for bit."""
    fresh, kept = (Rope(16, 1e4, scaling) for _ in range(2))
    kept.reserve(20, CPU)
    for length in (1, 7, 20, 21):  # more than is kept is computed
        for one, other in zip(fresh(length, CPU), kept(length, CPU), strict=True):
            assert one.shape == (length, 16) and torch.equal(one, other)
        assert kept.tables_2Nd is not None
        assert (kept(length, CPU)[0].data_ptr() == kept.tables_2Nd.data_ptr()) == (length <= 20)
    position_S = torch.tensor([19, 0, 7, 7])
    for whole, found in zip(fresh(20, CPU), kept.at(position_S), strict=True):
        assert torch.equal(whole[position_S], found)


def test_a_second_reservation_replaces_the_first() -> None:
    """Longer or shorter."""
    rope = Rope(8, 1e4)
    for length in (5, 12, 3):
        rope.reserve(length, CPU)
        assert rope.tables_2Nd is not None and rope.tables_2Nd.shape[1] == length


def test_kept_tables_are_part_of_no_state() -> None:
    """They are not saved, and a model's parameters and names stay what they are."""
    rope = Rope(8, 1e4)
    rope.reserve(5, CPU)
    assert not rope.state_dict() and not list(rope.parameters())


def test_tables_do_not_follow_the_default_dtype_or_device() -> None:
    """They are fp32 wherever a model is built."""
    want = rope_tables(9, 8, 1e4, CPU)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            got = rope_tables(9, 8, 1e4, CPU)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
