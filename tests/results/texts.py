"""Gives the records of `synthetic.sweep` what a run on texts has: quality, and slots by text and expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.synthetic import N_EXPERTS
from moe_lab.records.store import ROUTING, read_record, write_record

TEXTS = ("code", "prose.v2")
"""A name may have a dot."""
SLOTS = 96
_BITS = {"torch": 1.5, "sinkhorn": 1.75}


def add(folder: Path) -> None:
    """To one record, if its run was ok: more bits per byte with sinkhorn than with torch, and in the second text."""
    record = read_record(folder)
    if record.status != "ok":
        return
    router, experts = record.config["router"]["name"], record.config["experts"]["name"]
    more = _BITS[router] - _BITS["torch"] + (0.01 if experts == "loop" else 0.0)
    record.quality = {
        **_summary(_BITS["torch"], more),
        "windows_left_out": 0,
        "domains": {text: _summary(_BITS["torch"] + place, more) for place, text in enumerate(TEXTS)},
        "domain_information": [0.1, 0.3],
    }
    write_record(folder, record)
    with np.load(folder / ROUTING) as arrays:
        there = dict(arrays)
    rng = np.random.default_rng(len(router))  # the same for both ways to compute the experts
    share_LGE = rng.dirichlet(np.ones(N_EXPERTS), size=(len(there["layer"]), len(TEXTS)))
    there |= {"domain_counts_LGE": rng.multinomial(SLOTS, share_LGE), "domain": np.array(TEXTS)}
    np.savez(folder / ROUTING, **there)


def _summary(native: float, more: float) -> dict[str, Any]:
    numbers = {
        "bits_per_byte": native + more,
        "nats_per_token": native + more,
        "delta_bits_per_byte": more,
        "kl_to_native": more,
        "top1_agreement": 1 - more,
    }
    intervals = {f"{name}{end}": value + by for name, value in numbers.items() for end, by in _ENDS}
    return {"tokens": 640, "windows": 10, "bytes": 640, "native_bits_per_byte": native, **numbers, **intervals}


_ENDS = (("_ci95_low", -0.05), ("_ci95_high", 0.05))
