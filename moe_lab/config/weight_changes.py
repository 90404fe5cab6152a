"""Schemas of what changes a model's weights: `model.prune` and its like (see `schemas`). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IMPORTANCES, FORMATS = ("frequency", "weight", "reap"), ("int8", "int4", "fp8")


@dataclass
class Calibration:
    """What experts are chosen by."""

    path: Any
    tokens: int
    seq_len: int


@dataclass
class Prune:
    """Experts that are removed."""

    experts: int
    by: str


@dataclass
class Merge:
    """Experts that become one."""

    experts: int


@dataclass
class QuantizeExperts:
    """Experts in few bits."""

    format: str | None
    group_size: int | None
    coldest: int | None


@dataclass
class QuantizeGate:
    """The gate in few bits, or with noise."""

    format: str | None
    group_size: int | None
    noise: float


@dataclass
class WeightChanges:
    """What a model with experts has beside; see conf/_base/model/weight_changes.yaml."""

    calibration: Calibration
    prune: Prune
    merge: Merge
    quantize_experts: QuantizeExperts
    quantize_gate: QuantizeGate
