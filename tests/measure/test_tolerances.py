"""measure/tolerances.py: what rounding explains, and fp32 products without TF32."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from moe_lab.measure.tolerances import TOLERANCES, exact_products, tolerance_of
from moe_lab.models.gated_delta_net import GatedDeltaNet


@pytest.fixture
def high_precision() -> Iterator[None]:
    """TF32 allowed, as a user may have it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("high_precision")
def test_products_are_exact_within_and_as_before_after() -> None:
    """Also when something fails within."""
    with exact_products():
        assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(RuntimeError, match="planted"), exact_products():
        raise RuntimeError("planted")
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("allowed", [pytest.param(True, id="allowed"), pytest.param(False, id="not_allowed")])
def test_convolutions_are_exact_within_and_as_before_after(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's switch, which is another than that of matrix products; nested, too."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", allowed)
    with exact_products():
        assert cudnn.allow_tf32 is False
        with exact_products():
            assert cudnn.allow_tf32 is False
        assert cudnn.allow_tf32 is False
    with pytest.raises(RuntimeError, match="planted"), exact_products():
        raise RuntimeError("planted")
    assert cudnn.allow_tf32 is allowed


@pytest.mark.slow
def test_the_newer_switch_of_convolutions_is_kept_too() -> None:
    """Once it is set, torch refuses to read the older one; in a process of its own, for it cannot be undone."""
    program = """
import torch
from moe_lab.measure.tolerances import exact_products
conv = torch.backends.cudnn.conv
torch.backends.cudnn.rnn.fp32_precision = "ieee"
with exact_products():
    assert conv.fp32_precision == "ieee"
assert conv.fp32_precision == "tf32", conv.fp32_precision
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.gpu
def test_a_convolution_is_exact_within() -> None:
    """Depthwise, as a delta net has it, and a usual one: that of fp64 up to the rounding of fp32."""
    for groups in (64, 1):
        x = torch.randn(2, 64, 100, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        w = torch.randn(64, 64 // groups, 4, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
        want = torch.nn.functional.conv1d(x.double(), w.double(), groups=groups)
        with exact_products():
            got = torch.nn.functional.conv1d(x, w, groups=groups)
        assert float((got - want).norm() / want.norm()) < 1e-6


@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=str(dtype)) for dtype in TOLERANCES])
def test_rounding_adds_up_with_the_root_of_the_depth(dtype: torch.dtype) -> None:
    """Of the model's output and of its cache; what is looked at layer by layer has no depth."""
    model = nn.Module()
    allowed = tolerance_of(model, dtype)
    model.layers = nn.ModuleList(nn.Identity() for _ in range(9))
    deep = tolerance_of(model, dtype)
    assert allowed.model == TOLERANCES[dtype].model and allowed.cache == TOLERANCES[dtype].token
    assert (deep.model, deep.cache) == pytest.approx((3 * allowed.model, 3 * allowed.cache))
    assert (deep.expert, deep.token, deep.score, deep.weight) == (
        allowed.expert,
        allowed.token,
        allowed.score,
        allowed.weight,
    )


def test_narrow_heads_of_delta_nets_enlarge_rounding() -> None:
    """By the narrowest; not what is looked at layer by layer."""
    sizes = {"n_heads": 1, "head_dim": 4, "n_value_heads": 1, "conv_width": 2}
    model = nn.Module()
    plain = tolerance_of(model, torch.bfloat16)
    model.nets = nn.ModuleList(GatedDeltaNet(4, 1e-6, value_dim=width, **sizes) for width in (64, 16))
    found = tolerance_of(model, torch.bfloat16)
    assert (found.model, found.cache) == pytest.approx((3 * plain.model, 3 * plain.cache))
    assert (found.expert, found.token, found.score) == (plain.expert, plain.token, plain.score)


def test_an_execution_that_fuses_may_differ_in_its_logits_and_weights() -> None:
    """By what the model's output so far may be off."""
    plain = tolerance_of(nn.Module(), torch.bfloat16)
    fused = tolerance_of(nn.Module(), torch.bfloat16, fuses=True)
    assert plain.logit == 0 and fused.logit == pytest.approx(3 * plain.model)
    assert fused.weight == pytest.approx(plain.weight + plain.model)
    assert (fused.model, fused.token, fused.score) == (plain.model, plain.token, plain.score)
