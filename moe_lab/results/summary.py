"""One row per setting, machine and variant, beside the anchor: the variant that the others are compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from moe_lab.records import variants
from moe_lab.results import columns
from moe_lab.results.load import Plan

Row = dict[str, Any]


def summarize(rows: Sequence[Mapping[str, Any]], contents: Sequence[Mapping[str, Any] | None], plan: Plan) -> list[Row]:
    """The rows of `summary.csv`, from those of `runs.csv` and their configurations.

    A setting's anchor is the variant that agrees with the plan's; of several, or without one, that which its cells were
    timed beside; else the first in the plan, or by name. Of several records of one cell on one machine the newest
    stands here, and `n_records` says how many there are.
    """
    places = {cell_id: place for place, cell_id in enumerate(plan.statuses)}
    settings: defaultdict[str, list[tuple[Mapping[str, Any], Mapping[str, Any] | None]]] = defaultdict(list)
    for row, content in zip(rows, contents, strict=True):
        settings[row.get("setting_id") or row["cell_id"]].append((row, content))
    names: set[str] = set()
    for row in rows:
        names |= row.keys()
    configured = sorted(name for name in names if name.startswith("config."))
    summary = []
    for members in settings.values():
        label = _anchor(members, plan.anchor, places)
        newest: dict[tuple[str | None, str | None], Mapping[str, Any]] = {}
        for row, _ in sorted(members, key=lambda member: member[0].get("started") or ""):
            newest[row.get("env_id"), row.get("variant")] = row
        for (env_id, _), row in newest.items():
            summary.append(_line(row, newest.get((env_id, label)), label, configured))
    return sorted(summary, key=_place)


def _anchor(
    members: Sequence[tuple[Mapping[str, Any], Mapping[str, Any] | None]],
    wanted: Mapping[str, Any] | None,
    places: Mapping[str, int],
) -> str | None:
    in_order = sorted((places.get(row["cell_id"], len(places)), row.get("variant") or "") for row, _ in members)
    labels = [label for _, label in in_order if label]
    chosen = {
        row.get("variant") for row, content in members if wanted and content and variants.matches(content, wanted)
    }
    timed_beside = {row.get("ratio_to_anchor.anchor") for row, _ in members}
    named = {row.get("variant") for row, _ in members if row["cell_id"] in timed_beside}
    in_turn = (chosen & named, chosen, named, labels)
    return next((label for group in in_turn for label in labels if label in group), None)


def _line(row: Mapping[str, Any], anchor: Mapping[str, Any] | None, label: str | None, configured: list[str]) -> Row:
    line = {name: row[name] for name in (*columns.SUMMARY, *configured) if name in row}
    line["anchor"] = label
    line["is_anchor"] = row is anchor or (label is not None and row.get("variant") == label)
    p50 = row.get("latency_ms.p50")
    line["n_replicates"] = 0 if p50 is None else len(row.get("latency_ms.replicate_p50") or [p50])
    paired = anchor is not None and row.get("ratio_to_anchor.anchor") == anchor["cell_id"]
    if not paired:  # timed apart: no interval can be given
        line |= dict.fromkeys(name for name in line if name.startswith("ratio_to_anchor."))
        beside = anchor.get("latency_ms.p50") if anchor is not None and not line["is_anchor"] else None
        line["ratio_to_anchor.p50"] = p50 / beside if p50 is not None and beside else None
    line["ratio_to_anchor.paired"] = paired if line.get("ratio_to_anchor.p50") is not None else None
    return line


def _place(line: Row) -> tuple[Any, ...]:
    """By model and sizes; within a setting the anchor first."""
    texts = [line.get(name) or "" for name in ("model", "dtype", "device", "setting_id", "env_id")]
    sizes = [line.get(name) or 0 for name in ("batch", "seq_len", "seed")]
    return texts[0], *sizes, *texts[1:], not line["is_anchor"], line.get("variant") or "", line["cell_id"]
