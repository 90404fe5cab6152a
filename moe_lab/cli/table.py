"""Records as a table on the terminal: a row each, by setting, the anchor first in each of them.

Every row is printed, however many there are. What does not fit the width is named below the table.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from moe_lab.cli import fit
from moe_lab.cli.fit import Column
from moe_lab.records import identity, variants
from moe_lab.records.identity import option_name
from moe_lab.records.schema import BUSY, LAUNCH_BOUND, Record
from moe_lab.results import numbers
from moe_lab.results.numbers import with_interval
from moe_lab.terminal import Console

_NONE = "-"
_KERNELS = 3  # of a profile, in a terminal
_SIZES = ("batch", "seq_len")
_FIRST_SETTINGS = ("model", "workload", "dtype", "device")
_MORE_BITS = "delta_bits_per_byte"
_BITS_OF = (_MORE_BITS, f"{_MORE_BITS}_ci95_low", f"{_MORE_BITS}_ci95_high")


class Line(NamedTuple):
    """A record with its place in the table."""

    record: Record
    variant: str
    settings: Mapping[str, str]
    """What it is compared in, as text: model, workload, dtype, device, batch, seq_len and whatever else there is."""


# --- in which order, and what a row is called ---


def lines(
    records: Sequence[Record], compare: Sequence[str] = variants.COMPARE, anchor: Mapping[str, Any] | None = None
) -> list[Line]:
    """By setting, sizes as numbers; in each the anchor first, then the order of the records."""
    known: list[Record] = []
    lost: list[Record] = []  # failed before they were composed, so they have no setting
    for record in records:
        (known if {"model", "export"} <= record.config.keys() else lost).append(record)
    configs = [record.config for record in known]
    contents = variants.all_named([identity.content(config) for config in configs], configs)
    labels, settings = variants.labels(contents, compare), _settings(contents, compare)
    timed_beside = {record.ratio_to_anchor.anchor for record in records if record.ratio_to_anchor}
    groups = [variants.setting_id(content, compare) for content in contents]
    first = {group: place for place, group in reversed(list(enumerate(groups)))}
    placed = []
    for record, content, label, setting, group in zip(known, contents, labels, settings, groups, strict=True):
        others = bool(anchor) and not variants.matches(content, anchor or {})
        place = (*map(_as_numbers, setting.values()), first[group], record.cell_id not in timed_beside, others)
        placed.append((place, Line(record, label, setting)))
    rest = [Line(record, Path(record.directory or record.cell_id).name, {}) for record in lost]
    return [line for _, line in sorted(placed, key=lambda one: one[0])] + rest


def _settings(contents: Sequence[Mapping[str, Any]], compare: Sequence[str]) -> list[dict[str, str]]:
    every = dict.fromkeys(key for content in contents for key in content)
    others = [key for key in every if key not in (*_FIRST_SETTINGS, *_SIZES, *compare)]
    settings: list[dict[str, str]] = [{} for _ in contents]
    for key in (*_FIRST_SETTINGS, *_SIZES, *others):
        if key in compare:
            continue
        if key in _SIZES:
            texts = [str(content.get(key, _NONE)) for content in contents]
        else:
            nodes = [_said(content.get(key)) for content in contents]
            texts = variants.labels([{"model": "", key: node} for node in nodes], (key,))
        for setting, text in zip(settings, texts, strict=True):
            setting[key] = text or _NONE
    return settings


def _said(node: Any) -> Any:
    """`moe_layer/demo` for a model with a shape; of `measure` only the state of the caches counts."""
    if isinstance(node, Mapping) and set(node) == {"cache"}:
        return node["cache"]
    if isinstance(node, Mapping) and isinstance(shape := node.get("shape"), Mapping):
        others = {key: value for key, value in node.items() if key != "shape"}
        return {**others, "name": f"{option_name(node)}/{identity.shape_name(shape)}"}
    return node


def _as_numbers(text: str) -> list[tuple[int, float | str]]:
    """`batch 8` before `batch 16`."""
    return [(0, float(part)) if part[0].isdigit() else (1, part) for part in re.findall(r"\d+(?:\.\d+)?|\D+", text)]


# --- what a row says ---


def columns(shown: Sequence[Line], heading: str = "variant") -> list[Column]:
    """Variant and setting, latency, ratio and quality, and then the rest."""
    records = [line.record for line in shown]
    settings = dict.fromkeys(key for line in shown for key in line.settings)
    result = [Column(heading, [line.variant for line in shown], is_name=True)]
    for key in settings:
        texts = [line.settings.get(key, _NONE) for line in shown]
        if len(set(texts)) > 1 or key in _SIZES:
            rank = 4 if len(set(texts)) == 1 else 0
            result.append(Column(key, texts, is_name=key not in _SIZES, rank=rank))
    late = any(record.status != "ok" and record.latency_ms for record in records)
    result += [
        Column("p50 [interval]", [_latency(record) for record in records]),
        Column("ratio [interval]", [_ratio(record) for record in records], rank=1),
        Column("bits/byte vs native [interval]", [_more_bits(record) for record in records], rank=2),
        Column("bits/byte", [_bits(record) for record in records], rank=5),
        Column(
            "tokens/s", [numbers.short((record.throughput or {}).get("tokens_per_s")) for record in records], rank=6
        ),
        Column("J/token", [numbers.short((record.energy or {}).get("j_per_token")) for record in records], rank=6),
        Column("load max/mean", [_load(record) for record in records], rank=7),
        Column("KL to native", [numbers.short((r.quality or {}).get("kl_to_native")) for r in records], rank=8),
        Column("error", [numbers.error(r.check.rel_error) if r.check else _NONE for r in records], rank=10),
        Column("error vs reference (floor)", [_off(record.agreement) for record in records], rank=9),
    ]
    always = ("p50 [interval]", "tokens/s", "load max/mean", "error", heading, *settings)
    result = [column for column in result if column.heading in always or set(column.cells) != {_NONE}]
    return [*result, Column("status", [_status(record) for record in records], is_left=True, rank=0 if late else 3)]


def _latency(record: Record) -> str:
    """The median; of a run without one, why not."""
    latency = record.latency_ms
    if latency is None:
        return _NONE if record.status == "ok" else record.status
    return with_interval(latency.p50, latency.ci95_low, latency.ci95_high, " ms")


def _ratio(record: Record) -> str:
    ratio = record.ratio_to_anchor
    return with_interval(ratio.p50, ratio.ci95_low, ratio.ci95_high) if ratio else _NONE


def _more_bits(record: Record) -> str:
    more, low, high = ((record.quality or {}).get(name) for name in _BITS_OF)
    return _NONE if more is None else more_bits(more, low, high)


def more_bits(more: float, low: float | None, high: float | None) -> str:
    """How many more than with the native router; two digits behind the point where more say nothing."""
    ends = "" if low is None or high is None else numbers.interval(low, high, numbers.bits(more, sign=""))
    return f"{numbers.bits(more)(more)} {ends}".rstrip()


def _bits(record: Record) -> str:
    bits = (record.quality or {}).get("bits_per_byte")
    return _NONE if bits is None else f"{bits:.3f}"


def _load(record: Record) -> str:
    return numbers.short((record.routing or {}).get("pooled", {}).get("load_max_over_mean"))


def _off(agreement: Mapping[str, Any] | None) -> str:
    """The output's error against the reference router's, and the floor; null where the output is zero or not finite."""
    if not agreement:
        return _NONE
    error, floor = agreement["output_rel_error"], agreement["floor"]["output_rel_error"]
    return f"{numbers.error(error)} ({numbers.error(floor, digits=0)})"


def _status(record: Record) -> str:
    """A row has a ratio to compare; so it says itself whether its latency is stable."""
    is_unstable = record.latency_ms is not None and not record.latency_ms.stable
    return f"{record.status}, unstable" if is_unstable else record.status


# --- printing ---


def print_columns(shown: Sequence[Column], where: str = "", file: IO[str] | None = None) -> Console:
    """Print a table as wide as the terminal, or as it needs where the output is none; what was left out is named.

    Returns the console. `where` says where that is to be found; `file` gets the table in place of standard output.
    """
    console = Console()
    width = console.width if console.is_terminal else None
    console = console if file is None else Console(file=file)
    fitted = fit.fit(shown, width)
    heading, rows = fit.lines(fitted)
    for part, style in ((heading, "bold"), ([line for row in rows for line in row], None)):
        console.print("\n".join(part), style=style, markup=False, highlight=False, soft_wrap=True)
    if fitted.left_out:
        text = f"not shown at {width} columns: {', '.join(fitted.left_out)}"
        _say(console, text + (f"; {where}" if where else ""))
    return console


def text_of(shown: Sequence[Column]) -> str:
    """What `print_columns` prints."""
    written = io.StringIO()
    print_columns(shown, file=written)
    return written.getvalue()


_NUMBERS = (*_SIZES, "cell_id")


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Console:
    """Print texts in a table of which every column is shown, and return the console."""
    cells = list(zip(*rows, strict=True)) or [()] * len(headings)
    together = zip(headings, cells, strict=True)
    return print_columns([Column(name, column, is_name=name not in _NUMBERS) for name, column in together])


def _say(console: Console, text: str, style: str | None = None, path: str = "") -> None:
    """A line, broken between words where the terminal needs it; one with a path is not, so that it can be copied."""
    soft_wrap = bool(path) or not console.is_terminal
    console.print(text + path, style=style, markup=False, highlight=False, soft_wrap=soft_wrap)


def _say_time_of_agreement(console: Console, records: Sequence[Record]) -> None:
    """What the passes with the reference router took, which no latency holds."""
    agreements = [record.agreement for record in records if record.agreement]
    if agreements:
        names = sorted({agreement["reference"] for agreement in agreements})
        seconds = sum(agreement["seconds"] for agreement in agreements)
        _say(console, f"reference: router={', '.join(names)}; the comparison took {seconds:.2f} s")


def _say_what_all_share(console: Console, shown: Sequence[Line]) -> None:
    """The settings in which the rows do not differ."""
    texts: dict[str, set[str]] = {}
    for line in shown:
        for key, text in line.settings.items():
            texts.setdefault(key, set()).add(text)
    same = [f"{key}={text}" for key, (text, *others) in texts.items() if not others and text != _NONE]
    if len(shown) > 1 and same:
        _say(console, f"every row: {', '.join(same)}")


def _routers_name(record: Record) -> str:
    ignored = (record.config.get("model") or {}).get("ignores") or ()
    return _NONE if "router" in ignored or "router" not in record.config else option_name(record.config["router"])


def columns_of_runs(records: Sequence[Record]) -> list[Column]:
    """As `columns`, of single runs in their order: nothing is compared."""
    sizes = [
        {key: _NONE if key in (r.config["model"].get("ignores") or ()) else str(r.config[key]) for key in _SIZES}
        for r in records
    ]
    return columns([Line(r, _routers_name(r), size) for r, size in zip(records, sizes, strict=True)], "router")


def print_records(records: Iterable[Record]) -> None:
    """Single runs: a row, the warnings and the path of each."""
    records = list(records)
    console = print_columns(columns_of_runs(records), "result.json has them")
    _say_time_of_agreement(console, records)
    for record in records:
        if record.reason:
            _say(console, f"{record.status}: {record.reason}", "red" if record.status == "failed" else "yellow")
        for warning in record.warnings:
            _say(console, f"warning: {warning}", "yellow")
        _say_profile(console, record)
        if record.directory:
            _say(console, "", path=f"{record.directory}/result.json")


def _say_profile(console: Console, record: Record) -> None:
    """The longest kernels of a run that was profiled, and how to look at one of them."""
    if record.profile is None:
        return
    for kernel in record.profile["top"][:_KERNELS]:
        phase = kernel["phase"] or "outside of the phases"
        _say(console, f"{numbers.short(kernel['ms'])} ms, {kernel['share']:.0%}: {kernel['name'][:80]} ({phase})")
    if record.profile["ncu"] is not None:
        _say(console, record.profile["ncu"])


def print_sweep(
    records: Sequence[Record],
    compare: Sequence[str],
    anchor: Mapping[str, Any] | None = None,
    where: str = "moe-lab report has them",
    file: IO[str] | None = None,
) -> None:
    """One row per cell with its ratio to the anchor; then each warning once, and every failure.

    `where` says where the columns are that the terminal is too narrow for. What `sweep.exclude` leaves out is a number
    below the table, for it may be most of the grid.
    """
    skipped = Counter(record.reason for record in records if record.status == "skipped")
    shown = lines([record for record in records if record.reason != "excluded"], compare, anchor)
    for machine, of_machine in by_machine(shown).items():
        if machine:
            print(f"on {machine}:", file=file)
        console = print_columns(columns(of_machine), where, file)
        _say_what_all_share(console, of_machine)
    records = [line.record for line in shown]
    _say_time_of_agreement(console, records)
    _say_warnings(console, records)
    for reason, number in skipped.items():
        _say(console, f"skipped ({_cells(number)}): {reason}", "yellow")
    for record in records:
        if record.status == "failed":
            _say(console, f"failed: {record.reason} (", "red", path=f"{record.directory}/run.log)")


def by_machine(shown: Sequence[Line]) -> dict[str, list[Line]]:
    """A table for each machine, named where there are several; what did not reach a device is in the first."""
    names = {line.record.env_id: line.record.environment.get("device_name") for line in shown if line.record.env_id}
    if len(names) < 2:
        return {"": list(shown)}
    first = next(iter(names))
    tables: dict[str, list[Line]] = {}
    for line in shown:
        env_id = line.record.env_id or first
        tables.setdefault(f"{names[env_id]} ({env_id[:6]})", []).append(line)
    return tables


def _say_warnings(console: Console, records: Sequence[Record]) -> None:
    unstable = sum(record.latency_ms is not None and not record.latency_ms.stable for record in records)
    if unstable:
        counted = f"{unstable} of {len(records)} latencies are not stable (measure.target_ci)"
        _say(console, f"warning: {counted}; raise measure.max_time_s or use a less busy machine", "yellow")
    for kind in (LAUNCH_BOUND, BUSY):  # each has its own numbers
        alike = [w for record in records for w in record.warnings if w.startswith(kind)]
        if alike:
            _say(console, f"warning ({_cells(len(alike))}, for example): {alike[0]}", "yellow")
    summarised = ("latency is not stable", LAUNCH_BOUND, BUSY)
    others: dict[str, list[str]] = {}  # those that differ in numbers alone are one
    for warning in (w for record in records for w in record.warnings if not w.startswith(summarised)):
        others.setdefault(re.sub(r"\d[\d.,]*", "0", warning), []).append(warning)
    for alike in others.values():
        example = ", for example" if len(set(alike)) > 1 else ""
        _say(console, f"warning ({_cells(len(alike))}{example}): {alike[0]}", "yellow")


def _cells(number: int) -> str:
    return f"{number} cell{'' if number == 1 else 's'}"
