"""Records as a table on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from moe_lab.records import identity, variants
from moe_lab.records.identity import option_name
from moe_lab.records.schema import BUSY, LAUNCH_BOUND, Record
from moe_lab.results import numbers
from moe_lab.results.numbers import with_interval
from moe_lab.terminal import Console

_NONE = "-"
_OFF = "error vs reference (floor)"
_BITS, _KL = "bits/byte (- native) [interval]", "KL to native"
_NUMBERS = (
    "batch",
    "seq_len",
    "p50 [interval]",
    "ratio [interval]",
    "tokens/s",
    "load max/mean",
    "error",
    _OFF,
    _BITS,
    _KL,
)
_BITS_OF = ("bits_per_byte", "delta_bits_per_byte", "delta_bits_per_byte_ci95_low", "delta_bits_per_byte_ci95_high")


def _off(agreement: Mapping[str, Any]) -> str:
    """The output's error against the reference router's, and the floor; null where the output is zero or not finite."""
    error, floor = agreement["output_rel_error"], agreement["floor"]["output_rel_error"]
    return f"{numbers.error(error)} ({numbers.error(floor, digits=0)})"


def _cells(record: Record) -> dict[str, str]:
    """What a row may show, by column."""
    config: dict[str, Any] = record.config
    ignored = set(config["model"].get("ignores") or ())
    latency, ratio, check = record.latency_ms, record.ratio_to_anchor, record.check
    pooled, agreement = (record.routing or {}).get("pooled", {}), record.agreement
    quality = record.quality or {}
    return {
        "router": _NONE if "router" in ignored else option_name(config["router"]),
        "batch": str(config["batch"]),
        "seq_len": _NONE if "seq_len" in ignored else str(config["seq_len"]),
        "p50 [interval]": with_interval(latency.p50, latency.ci95_low, latency.ci95_high, " ms") if latency else _NONE,
        "ratio [interval]": with_interval(ratio.p50, ratio.ci95_low, ratio.ci95_high) if ratio else _NONE,
        "tokens/s": numbers.short((record.throughput or {}).get("tokens_per_s")),
        "load max/mean": numbers.short(pooled.get("load_max_over_mean")),
        "error": numbers.error(check.rel_error) if check else _NONE,
        _OFF: _off(agreement) if agreement else _NONE,
        _BITS: numbers.bits_per_byte(*(quality.get(name) for name in _BITS_OF)) or _NONE,
        _KL: numbers.short(quality.get("kl_to_native")),
        "status": _status(record) + (f": {record.reason}" if record.reason else ""),
    }


def _status(record: Record) -> str:
    """A row has a ratio to compare; so it says itself whether its latency is stable."""
    is_unstable = record.latency_ms is not None and not record.latency_ms.stable
    return f"{record.status}, unstable" if is_unstable else record.status


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Console:
    """Print a table and return the console, which is wide enough for it where the output is no terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in columns:
        left = name not in _NUMBERS
        table.add_column(escape(name), justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to fit
        console = Console(width=200)
    console.print(table)
    return console


_COLUMNS = ("batch", "seq_len", "p50 [interval]", "tokens/s", "load max/mean", "error", "status")


def _columns(records: Sequence[Record]) -> list[str]:
    """With the quality, and the output's difference from the reference router's, where that was looked at."""
    columns = list(_COLUMNS)
    if any(record.agreement for record in records):
        columns.insert(-1, _OFF)
    if any(record.quality for record in records):
        columns.insert(-1, _BITS)
    if any((record.quality or {}).get("kl_to_native") is not None for record in records):
        columns.insert(-1, _KL)
    return columns


def _print_time_of_agreement(console: Console, records: Sequence[Record]) -> None:
    """What the passes with the reference router took, which no latency holds."""
    agreements = [record.agreement for record in records if record.agreement]
    if agreements:
        names = sorted({agreement["reference"] for agreement in agreements})
        seconds = sum(agreement["seconds"] for agreement in agreements)
        text = f"reference: router={', '.join(names)}; the comparison took {seconds:.2f} s"
        console.print(text, markup=False, highlight=False)


def print_records(records: Iterable[Record]) -> None:
    """One row per record: router, batch, seq_len, p50 [interval], tokens/s, load max/mean, error, status."""
    records = list(records)
    columns = ("router", *_columns(records))
    console = print_table(columns, ([_cells(record)[name] for name in columns] for record in records))
    _print_time_of_agreement(console, records)
    for record in records:
        for warning in record.warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
        if record.directory:
            console.print(f"{record.directory}/result.json", markup=False, highlight=False, soft_wrap=True)


def print_sweep(records: Sequence[Record], compare: Sequence[str]) -> None:
    """One row per cell with its ratio to the anchor; then each warning once, and every failure.

    What `sweep.exclude` leaves out is a number below the table, for it may be most of the grid.
    """
    skipped = Counter(record.reason for record in records if record.status == "skipped")
    records = [record for record in records if record.reason != "excluded"]
    configs = [record.config for record in records]
    contents = variants.all_named([identity.content(config) for config in configs], configs)
    shown = {"variant": variants.labels(contents, compare)}
    for key in ("model", "workload", "dtype", "device"):
        labels = variants.labels(contents, (key,))
        if key not in compare and len(set(labels)) > 1:
            shown[key] = labels
    columns = _columns(records)
    if any(record.ratio_to_anchor for record in records):
        columns.insert(3, "ratio [interval]")
    rows = []
    for position, record in enumerate(records):
        cells = {**_cells(record), "status": _status(record)}  # the reasons stand below
        rows.append([*(labels[position] for labels in shown.values()), *(cells[name] for name in columns)])
    console = print_table([*shown, *columns], rows)
    _print_time_of_agreement(console, records)

    unstable = sum(record.latency_ms is not None and not record.latency_ms.stable for record in records)
    if unstable:
        console.print(
            f"warning: {unstable} of {len(records)} latencies are not stable (measure.target_ci); "
            "raise measure.max_time_s or use a less busy machine",
            style="yellow",
            highlight=False,
        )
    for kind in (LAUNCH_BOUND, BUSY):  # each has its own numbers
        alike = [w for record in records for w in record.warnings if w.startswith(kind)]
        if alike:
            text = f"warning ({len(alike)} cells, for example): {alike[0]}"
            console.print(text, style="yellow", markup=False, highlight=False)
    summarised = ("latency is not stable", LAUNCH_BOUND, BUSY)
    other = Counter(w for record in records for w in record.warnings if not w.startswith(summarised))
    for warning, number in other.items():
        console.print(f"warning ({number} cells): {warning}", style="yellow", markup=False, highlight=False)
    for reason, number in skipped.items():
        console.print(f"skipped ({number} cells): {reason}", style="yellow", markup=False, highlight=False)
    for record in records:
        if record.status == "failed":
            text = f"failed: {record.reason} ({record.directory}/run.log)"
            console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
