"""marks.py: the marks in the forward pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe_lab import marks as phases
from moe_lab.marks import NAMES, phase
from tests import tiny


class Log:
    """A listener that remembers what it was told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def start(self, name: str) -> None:
        self.heard.append(("start", name))

    def stop(self, name: str) -> None:
        self.heard.append(("stop", name))


@pytest.fixture
def log() -> Iterator[Log]:
    """A listener, taken away afterwards."""
    listener = Log()
    phases.listen(listener)
    yield listener
    phases.listen(None)


def test_a_listener_hears_each_phase_start_and_stop_in_order(log: Log) -> None:
    """The marks of two phases do not mix."""
    with phase("router"):
        pass
    with phase("experts"):
        pass
    assert log.heard == [("start", "router"), ("stop", "router"), ("start", "experts"), ("stop", "experts")]


def test_a_phase_that_raises_stops_and_lets_the_error_through(log: Log) -> None:
    """A listener is not left with an open phase."""
    with pytest.raises(RuntimeError, match="planted"), phase("router"):
        raise RuntimeError("planted")
    assert log.heard == [("start", "router"), ("stop", "router")]


def test_nobody_is_told_once_nobody_listens(log: Log) -> None:
    """After `listen(None)` a forward pass calls no listener."""
    run = tiny.built(tiny.decoder_moe())
    phases.listen(None)
    run.built.step()
    assert log.heard == []


def test_a_phase_without_a_listener_is_harmless() -> None:
    """Marks stand in code that runs without any measurement."""
    with phase("router"):
        reached = True
    assert reached


@pytest.mark.parametrize("experts", [pytest.param(name, id=name) for name in ("loop", "grouped")])
def test_marks_of_a_model_are_named_phases_that_do_not_nest(log: Log, experts: str) -> None:
    """Each start is followed by its own stop, and each part of a joined name is a name."""
    run = tiny.built(tiny.decoder_moe(f"experts={experts}", "model.shared_expert_hidden_dim=8"))
    log.heard.clear()
    run.built.step()
    starts, stops = log.heard[::2], log.heard[1::2]
    assert [name for _, name in starts] == [name for _, name in stops]
    assert {kind for kind, _ in starts} == {"start"} and {kind for kind, _ in stops} == {"stop"}
    assert {part for _, name in starts for part in name.split("+")} == set(NAMES)


def test_each_layer_marks_its_attention_and_its_router_once(log: Log) -> None:
    """As many marks as layers."""
    run = tiny.built(tiny.decoder_moe("model.n_layers=3"))
    log.heard.clear()
    run.built.step()
    assert log.heard.count(("start", "attention")) == log.heard.count(("start", "router")) == 3
