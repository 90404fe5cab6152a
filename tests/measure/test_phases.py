"""measure/phases.py: where the time of an eager pass goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_lab import marks as phases
from moe_lab.marks import NAMES, phase
from moe_lab.measure.clocks import Step
from moe_lab.measure.phases import measure_phases
from moe_lab.models import Output
from tests import tiny

INNER = ("dispatch", "experts", "combine")


class Counting(nn.Module):
    """Counts its passes, and raises inside a phase in pass number `fails_at`."""

    def __init__(self, fails_at: int | None = None):
        super().__init__()
        self.fails_at, self.passes = fails_at, 0

    def forward(self, x: Tensor) -> Output:
        self.passes += 1
        with phase("router"):
            if self.passes == self.fails_at:
                raise RuntimeError("planted")
            return Output(x + 1)


@pytest.fixture
def tiny_input() -> Tensor:
    return torch.zeros(2, 3)


def measured(*overrides: str, graph_p50_ms: float | None = None) -> dict[str, Any]:
    run = tiny.built(tiny.decoder_moe(*overrides))
    return measure_phases(Step(run.built.model, run.built.x), 0.0, graph_p50_ms)


def named(result: dict[str, Any]) -> dict[str, float]:
    """The phases that have a time of their own."""
    return {
        key: value
        for key, value in result.items()
        if key not in ("execution", "other", "sum_ms", "launch_gap_ms") and value is not None
    }


@pytest.mark.parametrize("experts", [pytest.param(name, id=name) for name in ("loop", "grouped")])
def test_phases_and_other_add_up_to_the_sum(experts: str) -> None:
    """Nothing is counted twice and nothing is lost."""
    result = measured(f"experts={experts}")
    assert sum(named(result).values()) + result["other"] == pytest.approx(result["sum_ms"])
    assert result["other"] >= 0
    assert all(value > 0 for value in named(result).values())


def test_one_kernel_over_several_phases_stands_once_under_the_joined_name() -> None:
    """experts=loop computes three phases at once: the inner ones are null, not 0."""
    result = measured("experts=loop")
    assert result["dispatch+experts+combine"] > 0
    assert all(result[name] is None for name in INNER)
    assert result["router"] > 0 and result["attention"] > 0


def test_grouped_experts_have_each_phase_apart() -> None:
    """No joined name appears."""
    result = measured("experts=grouped")
    assert all(result[name] > 0 for name in INNER)
    assert not any("+" in key for key in result)


def test_keys_are_those_of_the_record() -> None:
    """Every name is there for every model."""
    assert set(measured()) == {"execution", *NAMES, "other", "sum_ms", "launch_gap_ms", "matched"}


def test_a_model_without_marks_has_all_its_time_in_other() -> None:
    """model=minimal: each phase is null."""
    run = tiny.built(tiny.minimal())
    result = measure_phases(Step(run.built.model, run.built.x), 0.0)
    assert all(result[name] is None for name in NAMES)
    assert result["other"] == result["sum_ms"] > 0


@pytest.mark.parametrize("graph_p50_ms", [pytest.param(None, id="no_graph"), pytest.param(1e-3, id="graph")])
def test_launch_gap_is_what_eager_takes_longer_than_the_graph(graph_p50_ms: float | None) -> None:
    """Null where no graph was timed."""
    result = measured(graph_p50_ms=graph_p50_ms)
    assert result["execution"] == "eager"
    assert result["launch_gap_ms"] == (None if graph_p50_ms is None else pytest.approx(result["sum_ms"] - 1e-3))


def test_three_passes_are_made_even_in_no_time(tiny_input: Tensor) -> None:
    """A median of one is no median."""
    model = Counting()
    measure_phases(Step(model, tiny_input), 0.0)
    assert model.passes == 3


def test_nobody_listens_after_an_exception(tiny_input: Tensor) -> None:
    """A failing pass leaves no listener behind to slow the next ones."""
    with pytest.raises(RuntimeError, match="planted"):
        measure_phases(Step(Counting(fails_at=2), tiny_input), 0.0)
    assert phases._listener is None


def test_nobody_listens_afterwards(tiny_input: Tensor) -> None:
    """The marks are free again."""
    measure_phases(Step(Counting(), tiny_input), 0.0)
    assert phases._listener is None


@pytest.mark.gpu
def test_phases_on_cuda_add_up() -> None:
    """The marks are events in the stream."""
    result = measured("device=cuda")
    assert sum(named(result).values()) + result["other"] == pytest.approx(result["sum_ms"])
    taken = {name for whole in named(result) for name in whole.split("+")}
    assert taken == set(NAMES) and all(ms > 0 for ms in named(result).values())
