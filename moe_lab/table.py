"""Records as a table on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_lab.records.identity import option_name
from moe_lab.records.schema import Record

_NONE = "-"


def _number(value: float | None, digits: int = 3) -> str:
    return _NONE if value is None else f"{value:,.{digits}g}" if abs(value) < 999.5 else f"{value:,.0f}"


def _row(record: Record) -> list[str]:
    config: dict[str, Any] = record.config
    ignored = set(config["model"].get("ignores") or ())
    latency, check = record.latency_ms, record.check
    p50 = _NONE
    if latency is not None:
        p50 = f"{_number(latency.p50)} ms"
        if latency.ci95_low is not None and latency.ci95_high is not None:
            p50 += f" [{_number(latency.ci95_low)}, {_number(latency.ci95_high)}]"
    pooled = (record.routing or {}).get("pooled", {})
    return [
        _NONE if "router" in ignored else option_name(config["router"]),
        str(config["batch"]),
        _NONE if "seq_len" in ignored else str(config["seq_len"]),
        p50,
        _number((record.throughput or {}).get("tokens_per_s")),
        _number(pooled.get("load_max_over_mean")),
        f"{check.rel_error:.1e}" if check and check.rel_error is not None else _NONE,
        record.status + (f": {record.reason}" if record.reason else ""),
    ]


def print_records(records: Iterable[Record]) -> None:
    """One row per record: router, batch, seq_len, p50 [interval], tokens/s, load max/mean, error, status."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("router", "batch", "seq_len", "p50 [interval]", "tokens/s", "load max/mean", "error", "status"):
        left = name in ("router", "status")
        table.add_column(escape(name), justify="left" if left else "right", overflow="fold", no_wrap=name != "status")
    records = list(records)
    for record in records:
        table.add_row(*map(escape, _row(record)))
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to fit
        console = Console(width=200)
    console.print(table)
    for record in records:
        for warning in record.warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
        if record.directory:
            console.print(f"{record.directory}/result.json", markup=False, highlight=False, soft_wrap=True)
