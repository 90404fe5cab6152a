"""ExpertWeights, swiglu and the check of the scale."""

from __future__ import annotations

import pytest
import torch

from moe_lab.experts.weights import ExpertWeights, check_scale, swiglu


@pytest.mark.parametrize(
    ("E", "D", "F"),
    [pytest.param(5, 9, 7, id="5-9-7"), pytest.param(12, 37, 65, id="12-37-65"), pytest.param(1, 1, 1, id="1-1-1")],
)
def test_the_parameters_have_the_documented_shapes(E: int, D: int, F: int) -> None:
    """Gate [E, D], gate and up [E, 2F, D], down [E, D, F], contiguous, under these names; none is trained."""
    weights = ExpertWeights(E, D, F)
    assert {name: tuple(value.shape) for name, value in weights.state_dict().items()} == {
        "gate_ED": (E, D),
        "w_gate_up_E2FD": (E, 2 * F, D),
        "w_down_EDF": (E, D, F),
    }
    assert all(value.is_contiguous() and not value.requires_grad for value in weights.parameters())
    assert weights.n_experts == E


def test_on_the_meta_device_nothing_is_allocated() -> None:
    """A model can be laid out before it is filled."""
    with torch.device("meta"):
        weights = ExpertWeights(12, 4096, 14336)
    assert {value.device.type for value in weights.parameters()} == {"meta"}


@pytest.mark.parametrize("scale", [pytest.param("output", id="output"), pytest.param("input", id="input")])
def test_both_scales_pass(scale: str) -> None:
    """What is allowed raises nothing."""
    assert check_scale(scale) is None


@pytest.mark.parametrize("scale", [pytest.param("Output", id="capital"), pytest.param("", id="empty")])
def test_any_other_scale_is_a_value_error(scale: str) -> None:
    """The message names the value and what is allowed."""
    with pytest.raises(ValueError, match=f"scale={scale}: .*output or input"):
        check_scale(scale)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float64, 1e-12, id="fp64"),
        pytest.param(torch.float32, 1e-6, id="fp32"),
        pytest.param(torch.float16, 3e-3, id="fp16"),
        pytest.param(torch.bfloat16, 3e-2, id="bf16"),
    ],
)
@pytest.mark.parametrize(
    "shape", [pytest.param((0, 14), id="no rows"), pytest.param((37, 14), id="2-D"), pytest.param((3, 5, 2), id="3-D")]
)
def test_the_first_half_is_the_gate(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    """gate * sigmoid(gate) * up, in the tensor's dtype, leaving the tensor as it was."""
    gate_up = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    before = gate_up.clone()
    half = shape[-1] // 2
    gate, up = gate_up[..., :half].double(), gate_up[..., half:].double()
    h = swiglu(gate_up)
    assert h.dtype == dtype
    torch.testing.assert_close(h.double(), gate / (1 + (-gate).exp()) * up, rtol=tolerance, atol=tolerance)
    assert torch.equal(gate_up, before)


def test_swiglu_keeps_the_limits_of_the_gate() -> None:
    """A very negative gate closes and a very positive one passes, without NaN."""
    h = swiglu(torch.tensor([[-1e4, 0.0, 1e4, 3.0, 3.0, 3.0]]))
    assert h.tolist() == [[0.0, 0.0, 3e4]]
