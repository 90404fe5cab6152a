"""Records of steps of decoding, as a sweep over batch and workload.window leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_lab.records import store
from moe_lab.records.schema import Latency, Ratio, Record


def write(
    folder: Path,
    batch: int,
    window: int,
    ms: float,
    ratio: tuple[float, str] | None = None,
    *,
    load: str = "native",
    seed: int = 0,
    model: dict[str, Any] | None = None,
    **more: Any,
) -> str:
    """The record of a step; `ratio`: to the anchor of that cell_id, with an interval of a tenth to each side."""
    cell_id = f"{batch:04d}{window:04d}{load == 'replay':d}{seed:03d}"
    which = "" if (load, seed) == ("native", 0) else f"-{load}-{seed}"
    folder = folder / f"{batch}-{window}{which}{more.get('status', '')}"
    folder.mkdir(parents=True)
    config = {
        "batch": batch,
        "seed": seed,
        "workload": {"phase": "decode", "window": window, "load": load},
        "model": model or {"name": "checkpoint", "path": "small-moe"},
        "export": {"name": "none"},
    }
    latency = Latency(n=9, mean=ms, p50=ms, p90=ms, p99=ms, ci95_low=ms, ci95_high=ms, stable=True)
    record = Record(
        **{"status": "ok", "config": config, **more},
        cell_id=cell_id,
        code_id="c",
        latency_ms=latency,
        routing={"layers": [{"layer": 0, "unique_experts": 1.0 + window}, {"layer": 2, "unique_experts": 3.0}]},
        roofline={"bytes": 10e6 + window * 1e6},
    )
    if ratio is not None:
        record.ratio_to_anchor = Ratio(
            anchor=ratio[1], p50=ratio[0], ci95_low=ratio[0] * 0.9, ci95_high=ratio[0] * 1.1, rounds=9
        )
    store.write_record(folder, record)
    return cell_id
