"""A card for each router of a sweep: what it declares, and what it did to load, agreement and latency."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from moe_lab.results.columns import PROPERTIES
from moe_lab.results.settings import describe

RANKS = 8
"""Expert-parallel ranks of which the card shows the fullest."""


_WANTED = ("causal", "batch_invariant", "static_k", "graph_safe")
"""Properties whose absence is worth a word; of the others only those that hold are named."""


_BITS = ("bits_per_byte", *(f"delta_bits_per_byte{end}" for end in ("", "_ci95_low", "_ci95_high")))


class Card(NamedTuple):
    """One router; a row per cell that ran, with the fields of `heads`."""

    name: str
    properties: list[tuple[str, bool]]
    """Name, and whether it holds."""
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
    fields = [_fields(row) for row in ran.to_dict("records")]
    heads = [head for head in (fields[0] if fields else {}) if any(row[head] for row in fields)]
    found = []
    for name, of in ran.reset_index(drop=True).groupby("router", sort=False):
        first = of.iloc[0]
        holds = {key: bool(first[f"router.{key}"]) for key in PROPERTIES if not pd.isna(first[f"router.{key}"])}
        properties = [(key, value) for key, value in holds.items() if value or key in _WANTED]
        found.append(Card(str(name), properties, heads, [[fields[at][head] for head in heads] for at in of.index]))
    return found


def _fields(row: Mapping[str, Any]) -> dict[str, str]:
    """What a row of a card shows, by heading; empty where it is not known."""

    def number(name: str, suffix: str = "") -> str:
        value = row.get(name)
        return (
            ""
            if value is None or pd.isna(value)
            else f"{value:,.3g}{suffix}"
            if abs(value) < 999.5
            else f"{value:,.0f}"
        )

    def both(name: str, group: str = "routing") -> str:
        pooled, worst = (number(f"{group}.{of}.{name}") for of in ("pooled", "worst"))
        return f"{pooled} · {worst}" if pooled else ""

    def beside_floor(text: str, name: str) -> str:
        floor = number(f"agreement.floor.{name}")
        return f"{text} ({floor})" if text and floor else text

    def bits_per_byte() -> str:
        """And by how much more than with the native router, give or take half its interval, which is symmetric."""
        found = [row.get(f"quality.{name}") for name in _BITS]
        bits, more, low, high = (None if value is None or pd.isna(value) else float(value) for value in found)
        if bits is None or more is None:
            return "" if bits is None else f"{bits:.3f}"
        half = "" if low is None or high is None else f" ± {(high - low) / 2:.3f}"
        return f"{bits:.3f} ({more:+.3f}{half})"

    # Of the worst layer: pooled, experts of different layers with the same number would count as one.
    used, uniform = number("routing.worst.unique_experts"), number("routing.worst.uniform_unique_experts")
    latency, ratio = number("latency_ms.p50"), number("ratio_to_anchor.p50")
    together, copied = (number(f"routing.pooled.rank_load_{place}_{RANKS}") for place in ("contiguous", "eplb"))
    return {
        "cell": row["setting"] if row["variant"] == row["router"] else f"{row['setting']}: {row['variant']}",
        "median ms": latency,
        "x anchor": ratio,
        "bits per byte": bits_per_byte(),
        "KL to native": number("quality.kl_to_native"),
        "top-1 agreement": number("quality.top1_agreement"),
        "load max / mean": both("load_max_over_mean"),
        "fewest experts": f"{used} of {uniform}" if used and uniform else used,
        "experts MB": number("routing.pooled.expert_mb"),
        f"{RANKS} ranks": f"{together}, {copied}" if together and copied else "",
        "dropped": both("dropped_fraction"),
        "mass chosen": number("routing.pooled.topk_mass"),
        "Jaccard": beside_floor(both("jaccard", "agreement"), "pooled.jaccard"),
        "output error": beside_floor(number("agreement.output_rel_error"), "output_rel_error"),
        "text information": _text_information(row.get("quality.domain_information")),
    }


def _text_information(listed: Any) -> str:
    """Mean of the layers, from the list that a column of `quality.*` holds as text."""
    try:
        return f"{statistics.fmean(json.loads(listed)):.2g}"
    except (ValueError, TypeError):  # none, or of no layer
        return ""
