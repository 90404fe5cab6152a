"""Small result sets to compare, written as plain files."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from moe_lab.records import identity
from moe_lab.records.schema import Latency, Record
from moe_lab.records.store import RESULT
from tests import tiny

HERE, THERE = "0123456789ab", "ba9876543210"
QUIET = (1.0, 1.001, 0.999)


@cache
def tiny_config() -> dict[str, Any]:
    content = OmegaConf.to_container(tiny.moe_layer("router=sinkhorn"), resolve=True)
    assert isinstance(content, dict)
    return content


def record(*medians: float, config: dict[str, Any] | None = None, cache: str = "natural", **fields: Any) -> Record:
    """A record of a cell with these replicate medians; what `config` gives replaces the tiny layer's."""
    whole = {**copy.deepcopy(tiny_config()), **(config or {})}
    latency = None
    if medians:
        p50 = float(np.median(medians))
        latency = Latency(n=9, mean=p50, p50=p50, p90=p50, p99=p50, ci95_low=None, ci95_high=None, stable=True)
        latency.replicate_p50, latency.cache = list(medians), cache  # type: ignore[assignment]
    least = {"cell_id": identity.cell_id(whole), "env_id": HERE, "config": whole, "latency_ms": latency}
    return tiny.record(**{**least, **fields})


def write(folder: Path, *records: Record) -> Path:
    """Each in a folder of its own; plain writes, because hundreds of flushed ones take seconds.

    A record that does not say when it started did so at a time of this folder's.
    """
    for position, one in enumerate(records):
        directory = folder / f"cell-{position}"
        directory.mkdir(parents=True)
        content = one.to_dict()
        (directory / RESULT).write_text(json.dumps({**content, "started": content["started"] or folder.name}))
    return folder


def five_cells(folder: Path) -> tuple[Path, Path]:
    """Five cells: slower, faster, the same, only in A, failed in B."""
    batches = [{"batch": batch} for batch in (1, 2, 4, 8, 16)]
    a = [record(*QUIET, config=config) for config in batches]
    b = [
        record(*(1.2 * x for x in QUIET), config=batches[0]),
        record(*(x / 1.2 for x in QUIET), config=batches[1]),
        record(*QUIET, config=batches[2]),
        record(config=batches[4], status="failed", reason="out_of_memory"),
    ]
    return write(folder / "a", *a), write(folder / "b", *b)
