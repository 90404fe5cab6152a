"""A card for each router of a sweep: what it declares, and what it did to load, agreement and latency."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from moe_lab.records import fields
from moe_lab.records.schema import DOES_NOT_HOLD, VERIFIED
from moe_lab.results import numbers
from moe_lab.results.settings import describe

RANKS = 8
"""Expert-parallel ranks of which the card shows the fullest."""


_WANTED = ("causal", "batch_invariant", "static_k", "graph_safe")
"""Properties whose absence is worth a word; of the others only those that hold are named."""
_VERIFIABLE = ("causal", "batch_invariant", "static_k")
"""Properties that a run checks."""
BITS = (
    "quality.bits_per_byte",
    "quality.delta_bits_per_byte",
    "quality.delta_bits_per_byte_ci95_low",
    "quality.delta_bits_per_byte_ci95_high",
)
"""The columns behind `numbers.bits_per_byte`."""


_READ = {"setting", "router", "variant", "latency_ms", "ratio_to_anchor", "quality", "routing", "agreement"}


class Card(NamedTuple):
    """One router; a row per cell that ran, with the fields of `heads`."""

    name: str
    properties: list[tuple[str, bool]]
    """What is said of a property, and whether it holds: declared, and verified by a cell where it can be."""
    heads: list[str]
    rows: list[list[str]]


def cards(runs: pd.DataFrame) -> list[Card]:
    """Of the cells that recorded their routing, in the order of the routers' names; the smallest sizes first.

    A column that no cell of the sweep has a value for is left out.
    """
    ran = runs[(runs["status"] == "ok") & runs["routing.pooled.load_max_over_mean"].notna()]
    ran = ran.assign(setting=describe(ran)).sort_values(
        ["router", "model", "batch", "seq_len", "variant"], kind="stable"
    )
    ran = ran[~ran["implementation.router"].fillna("").str.startswith("forced")]  # no router had a say
    read = [name for name in ran if str(name).split(".")[0] in _READ]
    rows = [_fields(row) for row in ran[read].to_dict("records")]
    heads = [head for head in (rows[0] if rows else {}) if any(row[head] for row in rows)]
    by_router = []
    for name, cells in ran.reset_index(drop=True).groupby("router", sort=False):
        of_router = runs[runs["router"] == name]
        found = [_property(key, cells, of_router) for key in fields.names(fields.PROPERTIES)]
        properties = [each for each in found if each is not None]
        shown = [[rows[position][head] for head in heads] for position in cells.index]
        by_router.append(Card(str(name), properties, heads, shown))
    return by_router


def _property(key: str, cells: pd.DataFrame, all_cells: pd.DataFrame) -> tuple[str, bool] | None:
    """See `Card.properties`; None for one that is not worth a word. `all_cells` have those that failed too."""
    declared = cells.iloc[0][f"router.{key}"]
    if pd.isna(declared):
        return (f"{key}: not known", False) if key in _WANTED else None
    if not declared:
        return (f"not {key}", False) if key in _WANTED else None
    if key in _VERIFIABLE and (all_cells[f"check.{key}"] == DOES_NOT_HOLD).any():
        return f"{key}: declared, does not hold", False
    if key in _VERIFIABLE and not (cells[f"check.{key}"] == VERIFIED).any():
        return f"{key}: declared, not verified", False
    return key, True


def _fields(row: Mapping[str, Any]) -> dict[str, str]:
    """What a row of a card shows, by heading; empty where it is not known."""

    def known(name: str) -> float | None:
        value = row[name]
        return None if pd.isna(value) else float(value)

    def number(name: str) -> str:
        return numbers.short(known(name), missing="")

    def both(name: str, group: str = "routing") -> str:
        pooled, worst = (number(f"{group}.{part}.{name}") for part in ("pooled", "worst"))
        return f"{pooled} · {worst}" if pooled else ""

    def beside_floor(text: str, name: str) -> str:
        floor = number(f"agreement.floor.{name}")
        return f"{text} ({floor})" if text and floor else text

    # Of the worst layer: pooled, experts of different layers with the same number would count as one.
    used, uniform = number("routing.worst.unique_experts"), number("routing.worst.uniform_unique_experts")
    latency, ratio = number("latency_ms.p50"), number("ratio_to_anchor.p50")
    together, copied = (number(f"routing.pooled.rank_load_{place}_{RANKS}") for place in ("contiguous", "eplb"))
    return {
        "cell": row["setting"] if row["variant"] == row["router"] else f"{row['setting']}: {row['variant']}",
        "median ms": latency,
        "x anchor": ratio,
        "bits per byte": numbers.bits_per_byte(*(known(name) for name in BITS)),
        "output error": beside_floor(number("agreement.output_rel_error"), "output_rel_error"),
        "KL to native": number("quality.kl_to_native"),
        "top-1 agreement": number("quality.top1_agreement"),
        "load max / mean": both("load_max_over_mean"),
        "fewest experts": f"{used} of {uniform}" if used and uniform else used,
        "experts MB": number("routing.pooled.expert_mb"),
        f"{RANKS} ranks": f"{together}, {copied}" if together and copied else "",
        "dropped tokens": both("dropped_tokens_fraction"),
        "unused slots": both("unused_slots_fraction"),
        "top-k mass": number("routing.pooled.topk_mass"),
        "Jaccard": beside_floor(both("jaccard", "agreement"), "pooled.jaccard"),
        "text information": _text_information(row.get("quality.domain_information")),
    }


def _text_information(listed: Any) -> str:
    """Mean of the layers, from the list that a column of `quality.*` holds as text."""
    try:
        return numbers.short(statistics.fmean(json.loads(listed)))
    except (ValueError, TypeError):  # none, or of no layer
        return ""
