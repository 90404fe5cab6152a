"""models/minimal.py: y = RMSNorm(x W^T + x) * weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.models.minimal import Minimal
from moe_lab.models.parameters import initialize
from tests import tiny


def model_of(hidden: int) -> Minimal:
    model = Minimal(**{**tiny.keys_of("model", "minimal"), "hidden": hidden, "implementation": "torch"})
    initialize(model, seed=1)
    return model


@pytest.mark.parametrize(
    ("batch", "hidden"),
    [pytest.param(1, 1, id="b1_h1"), pytest.param(1, 37, id="b1_h37"), pytest.param(5, 64, id="b5_h64")],
)
def test_output_is_the_formula_in_float64(batch: int, hidden: int) -> None:
    """Linear, residual, norm, weight."""
    model = model_of(hidden)
    x_BD = torch.randn(batch, hidden, generator=torch.Generator().manual_seed(0))
    total_BD = x_BD.double() @ model.linear.weight.double().T + x_BD.double()
    want_BD = total_BD / (total_BD.square().mean(-1, keepdim=True) + 1e-6).sqrt() * model.norm.weight.double()
    torch.testing.assert_close(model(x_BD).y.double(), want_BD, rtol=1e-5, atol=1e-5)


def test_input_and_output_are_batch_by_hidden() -> None:
    """It has no sequence, no vocabulary and no routing."""
    run = tiny.built(tiny.minimal("batch=3"))
    assert run.built.model.input_shape(3, 128) == tuple(run.built.x.shape) == (3, 37)
    output = run.built.step()
    assert output.y.shape == (3, 37)
    assert output.routings == () and run.built.model.vocab_size is None


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), power=st.integers(-6, 10))
def test_output_does_not_depend_on_the_size_of_the_input(seed: int, power: int) -> None:
    """A norm takes any power of two out, as long as eps is small beside it."""
    model = model_of(37)
    x_BD = torch.randn(2, 37, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(model(x_BD * 2.0**power).y, model(x_BD).y, rtol=1e-2, atol=1e-2)


def test_rows_do_not_see_each_other() -> None:
    """Each row of a batch is as if it were alone."""
    model = model_of(37)
    x_BD = torch.randn(4, 37, generator=torch.Generator().manual_seed(2))
    alone_BD = torch.cat([model(row[None]).y for row in x_BD])
    torch.testing.assert_close(model(x_BD).y, alone_BD, rtol=1e-5, atol=1e-6)
