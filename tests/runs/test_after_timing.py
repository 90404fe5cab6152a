"""after_timing.py: what was timed is what was verified, and has written into nothing that it was given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_lab
from moe_lab.measure.clocks import Step
from moe_lab.models import Output
from moe_lab.routers.selection import SelectionRouter
from moe_lab.runs.after_timing import bits, bits_of_parameters
from tests import quick, tiny

Change = Callable[[Tensor], Tensor]


def after(calls: int, change: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, whose result is changed from some call on."""
    seen = 0

    def call(*arguments: Any, **more: Any) -> Any:
        nonlocal seen
        seen += 1
        result = original(*arguments, **more)
        return change(result) if seen > calls else result

    return call


def reason(cfg: Any, folder: Path) -> str | None:
    """Of the record; one of another run than was verified has no times."""
    record = moe_lab.run(cfg, folder)
    if record.status == "ok":
        return None
    assert record.latency_ms is None and record.check is not None and record.check.passed is False
    return record.reason


@pytest.mark.parametrize("model", [pytest.param(name, id=name) for name in ("decoder_moe", "moe_layer", "minimal")])
@pytest.mark.parametrize("phase", [pytest.param(name, id=name) for name in ("forward", "prefill", "decode")])
def test_what_stays_as_it_was_is_ok(model: str, phase: str, tmp_path: Path) -> None:
    """And its input is as before."""
    if phase != "forward" and model != "decoder_moe":
        return
    more = () if phase == "forward" else (f"workload.phase={phase}",)
    assert reason(quick.compose(model, *more), tmp_path) is None


def test_an_output_that_becomes_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After as many passes as are verified, and while it is timed."""
    wrong = after(4, lambda output: output._replace(y=output.y * 1.01), Step.__call__)
    monkeypatch.setattr(Step, "__call__", wrong)
    assert reason(quick.compose("minimal"), tmp_path) == "mismatch: layers"


def test_a_router_that_changes_its_mind_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own reference would agree with it."""
    backwards = after(
        60, lambda routing: routing._replace(expert_ids_TK=tiny.E - 1 - routing.expert_ids_TK), SelectionRouter.select
    )
    monkeypatch.setattr(SelectionRouter, "select", backwards)
    assert reason(tiny.moe_layer("measure.max_time_s=0.2"), tmp_path) in ("mismatch: timing", "mismatch: layers")


@pytest.mark.parametrize(
    ("what", "harm"),
    [
        pytest.param("input", lambda step: step.x.clamp_(min=0), id="input"),
        pytest.param("parameters", lambda step: [p.clamp_(max=0.05) for p in step.model.parameters()], id="parameters"),
    ],
)
def test_writing_into_what_is_given_is_found(
    what: str, harm: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference has the same input and parameters, so it agrees."""
    original = Step.__call__

    def call(self: Step) -> Output:
        with torch.inference_mode():
            harm(self)
        return original(self)

    monkeypatch.setattr(Step, "__call__", call)
    record = moe_lab.run(tiny.moe_layer(), tmp_path)
    assert (record.status, record.reason) == ("failed", "mismatch: timing")
    assert any(f"has written into its {what}" in text for text in record.warnings)


def test_an_answer_from_memory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tensor need not hold the same values."""
    original, kept = Step.__call__, dict[int, Output]()

    def remembered(self: Step) -> Output:
        if id(self) not in kept:
            kept[id(self)] = original(self)
        return kept[id(self)]

    monkeypatch.setattr(Step, "__call__", remembered)
    assert reason(tiny.moe_layer(), tmp_path) in ("mismatch: layers", "mismatch: route")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize(
    "shape", [pytest.param((5,), id="5"), pytest.param((3, 37), id="3x37"), pytest.param((0,), id="0")]
)
def test_bits_see_every_element_and_the_order(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Of any dtype, and of a view."""
    x = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert bits(x) == bits(x.clone()) and bits(x) == bits(torch.stack([x, x], -1)[..., 0])
    for i in range(min(x.numel(), 8)):
        other = x.clone()
        other.view(-1)[i] = 1 - other.view(-1)[i].to(torch.int64)
        assert bits(other) != bits(x)
    if x.numel() > 1:
        unequal = torch.arange(x.numel()).to(dtype)
        assert torch.equal(unequal, unequal.flip(0)) or bits(unequal) != bits(unequal.flip(0))


def test_bits_of_parameters_see_a_single_change() -> None:
    """Of the smallest number, in any layer."""
    run = tiny.built(tiny.decoder_moe())
    before = bits_of_parameters(run.built.model)
    assert before == bits_of_parameters(run.built.model)
    with torch.inference_mode():
        parameter = list(run.built.model.parameters())[-1]
        parameter.view(-1)[3] = torch.nextafter(parameter.view(-1)[3], torch.tensor(9.0))
    assert bits_of_parameters(run.built.model) != before
