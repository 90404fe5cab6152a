"""runs/observe.py: what an eager run says whose GPU waits for the host, and a prefill in chunks.

The rest is tested in test_run.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moe_lab
from moe_lab.measure.kernels import Kernel, matched
from moe_lab.measure.profile import Profile
from moe_lab.records.schema import LAUNCH_BOUND
from moe_lab.runs.observe import Observer
from tests import quick, tiny


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


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        pytest.param(True, ("cuda_graph", 0.25), id="its_own_kernels"),
        pytest.param(False, ("eager", None), id="other_kernels"),
        pytest.param(None, ("eager", None), id="no_profiler"),
    ],
)
def test_phases_of_a_graph_say_whose_they_are(
    known: bool | None, expected: tuple[str, float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the replay where its kernels are known; else of the eager pass, with a warning that says why."""
    built = tiny.built(tiny.decoder_moe()).built
    assert built is not None
    built.cfg.execution.name = "cuda_graph"
    replay = [Kernel("gemm", 0, 250, "0", None), Kernel("norm", 250, 750, "0", None)]
    eager = [kernel._replace(phase="router") for kernel in replay[:1]] + replay[1:] if known else [replay[1]]

    class Replayed(Profile):
        def __init__(self, *_: object):
            if known is None:
                raise RuntimeError("no CUPTI")
            self.events, self.steps, self.matched = [], [replay], [matched(replay, eager)]

    monkeypatch.setattr("moe_lab.runs.observe.Profile", Replayed)
    observer = Observer(built, 1.0, 0)
    phases_ms = observer._phases()
    assert (phases_ms["execution"], observer.values["phases_share"]["router"] if known else None) == expected
    assert phases_ms["launch_gap_ms"] is not None
    if known:
        assert (phases_ms["router"], phases_ms["sum_ms"], phases_ms["matched"]) == (0.25, 1.0, 1.0)
        assert observer.warnings == []
    else:
        (line,) = observer.warnings
        assert line.startswith("phases_ms is of an eager pass") and ("CUPTI" if known is None else "eagerly") in line


@pytest.mark.parametrize("router", [pytest.param("native", id="causal"), pytest.param("sinkhorn", id="not causal")])
def test_the_quality_of_whole_sequences_is_not_that_of_chunks_that_route_otherwise(router: str, tmp_path: Path) -> None:
    """Where the routes do not depend on the chunks it is the same."""
    weights = [] if router == "native" else ["router.renormalize=false"]
    more = (f"router={router}", *weights, "workload.phase=prefill", "workload.prefill_chunk=5")
    record = moe_lab.run(quick.compose("checkpoint", *more), tmp_path)
    assert record.status == "ok" and (record.quality is None) == (router == "sinkhorn")
    assert any("quality: left out" in text for text in record.warnings) == (router == "sinkhorn")


def test_what_is_seen_of_a_prefill_in_chunks_is_of_all_of_its_tokens() -> None:
    """Layer by layer as of the whole: routing, the trace, and how far another router is; a chunk reads its experts."""
    more = ("workload.phase=prefill", "measure.reference_router=switch", "measure.record_routing=true", "batch=3")
    found = []
    for chunk in ("null", "3"):
        run = tiny.built(tiny.decoder_moe(*more, f"workload.prefill_chunk={chunk}"))
        run.verify()
        assert run.built is not None
        observer = Observer(run.built, 1.0, 1)
        observer.observe()
        assert not observer.warnings
        found.append(observer)
    whole, cut = found
    for name in ("layer", "counts_LE", "coactivation_LEE"):
        assert (whole.routing_arrays[name] == cut.routing_arrays[name]).all()
    (tokens, routings), (cut_tokens, cut_routings) = (each.trace.passes[0] for each in found)  # type: ignore[union-attr]
    assert (tokens.position == cut_tokens.position).all()
    assert all(
        torch.equal(one.expert_ids_TK, other.expert_ids_TK) for one, other in zip(routings, cut_routings, strict=True)
    )
    for name in ("jaccard", "same_experts", "combine_l1"):
        one, other = (each.values["agreement"] for each in found)
        assert [layer[name] for layer in other["layers"]] == pytest.approx([layer[name] for layer in one["layers"]])
        assert other["pooled"][name] == pytest.approx(one["pooled"][name])
    assert cut.values["routing"]["pooled"]["expert_mb"] > whole.values["routing"]["pooled"]["expert_mb"]
