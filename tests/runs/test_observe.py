"""runs/observe.py: what an eager run says whose GPU waits for the host. The rest is tested in test_run.py."""

from __future__ import annotations

import pytest

from moe_lab.records.schema import LAUNCH_BOUND
from moe_lab.runs.observe import Observer
from tests import tiny


@pytest.mark.parametrize(
    ("overrides", "busy_ms", "expected"),
    [
        pytest.param([], 0.81, [], id="busy"),
        pytest.param(
            [], 0.07, ["the GPU was busy 7% of the time; compare kernels with execution=cuda_graph"], id="idle"
        ),
        pytest.param(
            ["router=base"],
            0.5,
            ["the GPU was busy 50% of the time; router=base cannot be captured, so use a larger batch"],
            id="router",
        ),
        pytest.param(
            ["experts=loop"],
            0.5,
            ["the GPU was busy 50% of the time; experts=loop cannot be captured, so use a larger batch"],
            id="experts",
        ),
    ],
)
def test_a_gpu_that_waits_is_a_warning(
    overrides: list[str], busy_ms: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a median of 1 ms; a graph is recommended where the parts can be captured."""
    built = tiny.built(tiny.decoder_moe(*overrides)).built
    assert built is not None and built.step is not None
    monkeypatch.setattr(built.step, "busy_ms", lambda: busy_ms)
    observer = Observer(built, 1.0, 0)
    assert observer._gpu_busy() == busy_ms
    assert observer.warnings == [f"{LAUNCH_BOUND}{text}" for text in expected]
