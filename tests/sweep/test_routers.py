"""Every router under every load, in one sweep: what cannot be is skipped with its reason, the rest is verified."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from moe_lab.config.schemas import LOADS
from moe_lab.records.schema import Record
from tests import quick
from tests.sweep import faulty

RAGGED = {
    "expert_choice", "token_rounding", "top_p", "min_p", "expert_skip", "oea", "xshare", "moe_spec", "capacity", "soft",
}  # fmt: skip
"""Routers that fill no fixed number of slots, or all of them, so that no load can be forced on them."""


def swept(folder: Path, *axes: str) -> list[Record]:
    """The records of a sweep of the tiny MoE decoder with 8 experts."""
    more = ("model.n_experts=8", "sweep.name=s", "sweep.report=false", "measure.phases=false")
    more = (*more, "measure.reference_router=torch", *axes)
    command = [*faulty.MOE_LAB, "-m", *quick.overrides("decoder_moe", *more)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return faulty.records_list(folder)


def check(records: list[Record]) -> None:
    """Each is ok and verified, with the load that was asked for, or skipped for a reason that is true of it."""
    for record in records:
        router, load = record.config["router"]["name"], record.config["workload"]["load"]
        if router == "native":
            assert record.status == "skipped" and "impossible: router=native: only" in str(record.reason)
        elif load != "native" and router in RAGGED:
            assert record.status == "skipped" and f"workload.load={load}" in str(record.reason)
        else:
            assert (record.status, record.reason) == ("ok", None), (router, load)
            assert record.check is not None and record.check.passed
            check_agreement(record, router, load)
            own = {"base": "scipy", "cuda_ext": "cuda_ext:cpp", "triton": "triton"}.get(router, "torch")
            assert record.implementation["router"] == (f"forced: {load}" if load != "native" else own)
            if load == "balanced":
                assert record.routing is not None
                counts = record.routing["pooled"]["load_max_over_mean"]
                used = record.config["batch"] * record.config["seq_len"] * (1 if router in ("switch", "llama4") else 2)
                assert counts == pytest.approx(-(-used // 8) * 8 / used)


def check_agreement(record: Record, router: str, load: str) -> None:
    """With router=torch, where a router chose; the floor is fp32's rounding, which changes no choice here."""
    if load != "native":
        assert record.agreement is None and any("no routes to compare" in text for text in record.warnings)
        return
    assert record.agreement is not None and record.agreement["reference"] == "torch"
    pooled, floor = record.agreement["pooled"], record.agreement["floor"]
    assert 0 <= pooled["jaccard"] <= 1 and record.agreement["worst"]["jaccard"] <= pooled["jaccard"]
    assert floor["pooled"]["jaccard"] == 1 and floor["output_rel_error"] < 1e-5
    if router in ("torch", "mixtral", "granite", "qwen3_moe"):
        assert pooled["jaccard"] == 1 and record.agreement["output_rel_error"] < 1e-5


@pytest.mark.slow
def test_some_routers_under_some_loads(tmp_path: Path) -> None:
    """One of each kind."""
    routers = "router=deepseek_v3,sinkhorn,top_p,quantile,native"
    records = swept(tmp_path, routers, "workload.load=native,zipf", "batch=1")
    assert len(records) == 10
    check(records)


@pytest.mark.slow
def test_all_routers_under_all_loads(tmp_path: Path) -> None:
    """router x batch x load."""
    loads = [load for load in LOADS if load not in ("replay", "fitted")]
    records = swept(tmp_path, "router=glob(*)", f"workload.load={','.join(loads)}", "batch=1,32", "seq_len=3")
    routers = {record.config["router"]["name"] for record in records}
    assert len(records) == len(routers) * len(loads) * 2
    assert len(routers) > 20
    check(records)
