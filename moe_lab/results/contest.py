"""The settings of a sweep with what competes in them: who is surely slower, and who surely predicts worse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd

from moe_lab.results.regions import TOKENS
from moe_lab.results.settings import places
from moe_lab.results.verdicts import judged, per_token, tokens_of_a_pass

SAME_BITS = 0.01
"""Differences of bits per byte up to this do not matter."""
COLLAPSED = 1.25
"""From so many times the bits per byte of the checkpoint's own router on, the predictions collapse."""
_ROUNDING = 3.0
"""Output errors up to so many times the floor are those of rounding."""

_RATIO = ("ratio_to_anchor.p50", "ratio_to_anchor.ci95_low", "ratio_to_anchor.ci95_high")
_EXPERT_MB = "routing.pooled.expert_mb"
_BITS, _DELTA = "quality.bits_per_byte", "quality.delta_bits_per_byte"
_ERROR, _REFERENCE, _FLOOR = "agreement.output_rel_error", "agreement.reference", "agreement.floor.output_rel_error"
_READ = {"setting_id", "env_id", "anchor", "is_anchor", "variant", "status", "directory", "model", "router", "dtype"}
_READ |= {"batch", "seq_len", "throughput.time_per_output_token_ms", "latency_ms.p50", "ratio_to_anchor.paired"}
_READ |= {*_RATIO, _EXPERT_MB, _ERROR, _REFERENCE, _FLOOR}
_SOFTMAX = {"torch", "triton", "cuda_ext"}
"""One router, each with its implementation fixed."""


class Quality(NamedTuple):
    """What is known of a cell's predictions, or of its output where there is no text. Less is better."""

    kind: Literal["delta", "bits", "error"]
    """More bits per byte than the checkpoint's own router; bits per byte; output error against a reference router."""
    value: float
    low: float
    high: float
    """NaN without an interval."""
    beside: float
    """The bits per byte of the checkpoint's own router; the error that rounding alone makes; else NaN."""
    reference: str = ""
    """Of an output error the router that it is compared with."""

    def is_worse_than(self, other: Quality) -> bool:
        """Surely, and by more than does not matter."""
        if self.kind == "error":
            return not self.is_rounding and self.value > 1.1 * other.value
        high = other.value if math.isnan(other.high) and other.is_sure else other.high
        return self.low > high and self.value - other.value > SAME_BITS

    @property
    def is_sure(self) -> bool:
        """Whether it can be judged: bits per byte without an interval cannot, unless they are the router's own."""
        return self.kind == "error" or not math.isnan(self.low) or (self.kind == "delta" and self.value == 0)

    @property
    def is_rounding(self) -> bool:
        """Whether an output differs from the reference's by no more than rounding."""
        return self.kind == "error" and self.value <= (0.0 if math.isnan(self.beside) else _ROUNDING * self.beside)

    @property
    def has_collapsed(self) -> bool:
        """Whether the predictions are far worse than those of the checkpoint's own router."""
        return self.kind == "delta" and self.low > 0 and self.value >= (COLLAPSED - 1) * self.beside


class Cell(NamedTuple):
    """A variant that ran in a setting."""

    variant: str
    is_anchor: bool
    ratio: tuple[float, float, float]
    """Its latency for a token over the anchor's, with interval; NaN if they were not timed together, or too short."""
    quality: Quality | None
    is_causal: bool | None
    choice: str
    """What the router computes: equal for implementations of one router, which then predict alike."""
    expert_mb: float = math.nan
    """The weights of the experts that a pass reads; NaN where that is not known."""
    directory: str = ""
    """Of its record."""

    @property
    def is_timed(self) -> bool:
        """Whether it can be compared with others of its setting."""
        return not math.isnan(self.ratio[1]) and not math.isnan(self.ratio[2])

    def is_slower_than(self, other: Cell) -> bool:
        """Surely, as far as the intervals of both ratios to the anchor tell."""
        return judged(self.ratio[1] / other.ratio[2], self.ratio[2] / other.ratio[1]) == "slower"


class Setting(NamedTuple):
    """What its cells share, and the cells that ran."""

    place: Mapping[str, Any]
    anchor: str
    cells: list[Cell]

    @property
    def is_beside_native(self) -> bool:
        """Whether the anchor predicts as the checkpoint's own router does: then all is compared with one thing."""
        return any(cell.is_anchor and cell.quality and cell.quality.value == 0 for cell in self.cells)

    @property
    def timed(self) -> list[Cell]:
        """The cells that can be compared with each other; none if there are not two."""
        timed = [cell for cell in self.cells if cell.is_timed]
        return timed if len(timed) > 1 else []


def settings(runs: pd.DataFrame, summary: pd.DataFrame) -> list[Setting]:
    """Of a sweep's tables, in their order. A setting on two machines is two."""
    if summary.empty:
        return []
    causal = dict(zip(runs["directory"], runs["router.causal"].astype(object), strict=True))
    keys = [str(name) for name in summary if str(name).startswith(("config.router.", "config.model."))]
    found: dict[tuple[str, str], Setting] = {}
    read = [name for name in summary if name in _READ or name in keys or str(name).startswith("quality.")]
    for row, place, share in zip(summary[read].to_dict("records"), places(summary), per_token(summary), strict=True):
        if row["status"] != "ok" or pd.isna(row["variant"]):
            continue
        setting = found.setdefault(
            (str(row["setting_id"]), str(row["env_id"])),
            Setting({TOKENS: tokens_of_a_pass(row), **place}, str(row["anchor"]), []),
        )
        is_causal = causal[row["directory"]]
        setting.cells.append(
            Cell(
                variant=str(row["variant"]),
                is_anchor=bool(row["is_anchor"]),
                ratio=_ratio(row, share),
                quality=_quality(row),
                is_causal=None if pd.isna(is_causal) else bool(is_causal),
                choice=_choice(row, keys),
                expert_mb=float(row[_EXPERT_MB]) if _known(row.get(_EXPERT_MB)) else math.nan,
                directory=str(row["directory"]),
            )
        )
    return list(found.values())


def fastest(cells: Sequence[Cell]) -> list[Cell]:
    """Those that are not surely slower than another."""
    return [cell for cell in cells if not any(cell.is_slower_than(other) for other in cells)]


def best(cells: Sequence[Cell]) -> list[Cell]:
    """Those that do not surely predict worse than another; none if that was not measured in the same way for all."""
    known = [(cell, cell.quality) for cell in cells if cell.quality is not None and cell.quality.is_sure]
    if len(known) < len(cells) or len({quality.kind for _, quality in known}) > 1:
        return []
    return [cell for cell, quality in known if not any(quality.is_worse_than(other) for _, other in known)]


def _ratio(row: Mapping[Any, Any], per_token: float) -> tuple[float, float, float]:
    """To the anchor, for each token."""
    if row["is_anchor"] and _known(row["latency_ms.p50"]):
        return 1.0, 1.0, 1.0
    paired = row["ratio_to_anchor.paired"]
    if pd.isna(paired) or not paired:
        return math.nan, math.nan, math.nan
    middle, low, high = (float(row[key]) * per_token if _known(row[key]) else math.nan for key in _RATIO)
    if any(value <= 0 or math.isinf(value) for value in (middle, low, high)):  # of a clock that stood still
        return math.nan, math.nan, math.nan
    return middle, low, high


def _quality(row: Mapping[Any, Any]) -> Quality | None:
    def number(name: str) -> float:
        return float(row[name]) if _known(row.get(name)) else math.nan

    for kind, name, beside in (("delta", _DELTA, "quality.native_bits_per_byte"), ("bits", _BITS, "")):
        if _known(row.get(name)):
            ends = number(f"{name}_ci95_low"), number(f"{name}_ci95_high")
            return Quality(kind, number(name), *ends, number(beside))  # type: ignore[arg-type]
    if _known(row.get(_ERROR)):
        return Quality("error", number(_ERROR), math.nan, math.nan, number(_FLOOR), str(row.get(_REFERENCE)))
    return None


def _choice(row: Mapping[Any, Any], config_keys: Sequence[str]) -> str:
    keys = [key for key in config_keys if not key.endswith((".impl", ".implementation", "._target_", ".name"))]
    is_plain = row["router"] in _SOFTMAX and not any(key.startswith("config.router.") for key in keys)
    values = (row[key] if _known(row[key]) else None for key in keys)
    return repr(["softmax" if is_plain else row["router"], row["model"], row["dtype"], *values])


def _known(value: Any) -> bool:
    return value is not None and not pd.isna(value)
