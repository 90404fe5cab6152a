"""ops/fake_quantize.py: by hand, and what holds of every tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.config.weight_changes import FORMATS as CONFIGURED
from moe_lab.ops.fake_quantize import FORMATS, fake_quantize, stored_bytes

STEP = {"int8": 1 / 254, "int4": 1 / 14, "fp8": 1 / 16}
"""Half a step over the largest value of a group; of fp8 half of the last of three bits, over the value itself."""


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_int4_by_hand() -> None:
    """The scale of the first group is 7/7, of the second 3.5/7; ties go to even."""
    w = torch.tensor([[7.0, -2.4, 2.5, 0.6, 3.5, -1.2, 0.2, 0.75]])
    assert fake_quantize(w, "int4", 4).tolist() == [[7.0, -2.0, 2.0, 1.0, 3.5, -1.0, 0.0, 1.0]]


def test_int8_by_hand() -> None:
    """One scale for the row: 127/127."""
    w = torch.tensor([[-127.0, 0.4, 0.6, 126.2]])
    assert fake_quantize(w, "int8", None).tolist() == [[-127.0, 0.0, 1.0, 126.0]]


def test_fp8_by_hand() -> None:
    """e4m3 has three bits behind the leading one: between 16 and 32 steps of 2, between 256 and 448 of 32."""
    w = torch.tensor([[448.0, 17.0, 19.0, 300.0, 0.0, -21.1]])
    assert fake_quantize(w, "fp8", None).tolist() == [[448.0, 16.0, 20.0, 288.0, 0.0, -22.0]]


def test_the_scale_is_rounded_to_bfloat16_and_nothing_leaves_the_range() -> None:
    """A largest value of 7 * 1.003 has the scale 1, and is 7 then."""
    assert fake_quantize(torch.tensor([[7 * 1.003, 1.0]]), "int4", None).tolist() == [[7.0, 1.0]]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    form=st.sampled_from(FORMATS),
    group_size=st.sampled_from([1, 3, 6, None]),
    size=st.floats(-6, 6),
)
def test_the_error_is_at_most_half_a_step(seed: int, form: str, group_size: int | None, size: float) -> None:
    """Of each group, whatever its size, with the rounding of the scale; signs and zeros stay."""
    w = numbers(seed, 5, 12) * 10**size
    rounded = fake_quantize(w, form, group_size)
    groups = (-1, group_size or 12)
    largest = w.unflatten(-1, groups).abs().amax(-1, keepdim=True)
    error = (rounded - w).unflatten(-1, groups).abs()
    limit = STEP[form] * (w.unflatten(-1, groups).abs() + largest / 1000 if form == "fp8" else largest)
    assert (error <= limit + largest / 256).all()  # a scale of bfloat16 is off by a 512th
    assert ((rounded == 0) | (rounded.sign() == w.sign())).all()


@pytest.mark.parametrize("form", [pytest.param(form, id=form) for form in FORMATS])
def test_zeros_stay_and_the_dtype_too(form: str) -> None:
    """Also beside a group that is not zero, in each dtype of a model."""
    w = torch.cat([torch.zeros(2, 8), numbers(0, 2, 8)], dim=1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = fake_quantize(w.to(dtype), form, 8)
        assert rounded.dtype == dtype and (rounded[:, :8] == 0).all() and rounded.isfinite().all()


def test_fewer_bits_lose_more() -> None:
    """And smaller groups less."""
    w = numbers(1, 64, 128)

    def error(form: str, group_size: int | None) -> float:
        return float((fake_quantize(w, form, group_size) - w).norm() / w.norm())

    assert error("int8", 32) < error("fp8", 32) < error("int4", 32) < error("int4", None)
    assert error("int8", 32) < 0.01 and 0.05 < error("int4", 32) < 0.12


def test_bytes_by_hand() -> None:
    """[3, 64]: 192 values, and six groups of 32 or three rows."""
    w = torch.empty(3, 64)
    assert [stored_bytes(w, form, 32) for form in ("int8", "int4", "fp8")] == [204, 108, 204]
    assert stored_bytes(w, "int4", None) == 102


def test_the_formats_are_those_of_the_configuration() -> None:
    assert CONFIGURED == FORMATS
