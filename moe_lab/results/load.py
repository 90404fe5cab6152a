"""Reading a folder of records: one row per `result.json`, at any depth."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from moe_lab.config.schemas import PLOTLY
from moe_lab.records import files, identity, variants
from moe_lab.records.schema import Record
from moe_lab.records.store import PLAN, RESULT, ROUTING, SAMPLES, is_unreadable, read_record
from moe_lab.results import columns

UNREADABLE_BECAUSE = (ValueError, AttributeError, TypeError, KeyError, RecursionError, OSError)
"""What reading a file that anybody may have written can raise."""

# Nested fields that stay out of the row: the whole configuration, and per-layer lists (`result.json` has those).
_NOT_COLUMNS = {"config", "routing.layers", "agreement.layers", "agreement.floor.layers"}
_NOT_COLUMNS |= {f"weight_changes.{name}" for name in ("layers", "route_by_layer", "gate_by_layer")}

_RENAMED = {f"routing.{part}.dropped_fraction": f"routing.{part}.unused_slots_fraction" for part in ("pooled", "worst")}
"""Columns of older records, and what they are called now."""


class Entry(NamedTuple):
    """What the tables take from one record."""

    row: dict[str, Any]
    content: dict[str, Any] | None
    """`identity.content` of its configuration; None where it has none (it failed before it was composed)."""


class Plan(NamedTuple):
    """What tables and page take from `plan.json`; what stands here where there is none."""

    compare: Sequence[str] = variants.COMPARE
    anchor: Mapping[str, Any] | None = None
    name: str | None = None
    commands: Sequence[Sequence[str]] = ()
    statuses: Mapping[str, str] = {}
    """By cell_id, in the order of the command."""
    plotly: str = PLOTLY[0]
    """`sweep.plotly`."""


class Found(NamedTuple):
    """A record's folder, relative to the one searched, with the time stamp and size of its files (-1: not there)."""

    folder: str
    result: tuple[int, int]
    samples: tuple[int, int]
    routing: tuple[int, int]


def load(directory: str | Path) -> pd.DataFrame:
    """As `moe_lab.load` (api/load.py), as plain pandas."""
    root = folder(directory)
    found, problems = search(root)
    unreadable = [f"{root / path}: {error}" for path, error in problems if not is_unreadable(os.path.basename(path))]
    entries, plan = [], Plan()
    try:
        plan = read_plan(root)
    except UNREADABLE_BECAUSE as error:
        unreadable.append(f"{root / PLAN}: {one_line(error)}")
    for record in found:
        try:
            entries.append(read(root, record.folder))
        except UNREADABLE_BECAUSE as error:
            unreadable.append(f"{root / record.folder / RESULT}: {one_line(error)}")
    if unreadable:
        raise ValueError("unreadable records (move them away to load the rest):\n  " + "\n  ".join(unreadable))
    rows = complete(entries, plan)
    for row in rows:
        row["directory"] = printable(root / row["directory"])
    return columns.frame(columns.table(rows, columns.RUNS))


def records(directory: str | Path) -> tuple[list[Record], Plan]:
    """Every record under `directory` that can be read, and the plan: in its order, others after it, by path.

    Raises:
        ValueError: the folder does not exist.
    """
    root, found, plan = folder(directory), [], Plan()
    with suppress(*UNREADABLE_BECAUSE):
        plan = read_plan(root)
    for place in search(root)[0]:
        with suppress(*UNREADABLE_BECAUSE):
            found.append(read_record(root / place.folder))
    places = {cell_id: place for place, cell_id in enumerate(plan.statuses)}
    return sorted(found, key=lambda record: places.get(record.cell_id, len(places))), plan


def folder(directory: str | Path) -> Path:
    """As a Path. Raises `ValueError` if the folder does not exist."""
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"{root}: folder not found.")
    return root


def search(root: Path) -> tuple[list[Found], list[tuple[str, str]]]:
    """The records under `root`, ordered by path, and (path, what is wrong) of what is known to be unreadable."""
    found: list[Found] = []
    problems: list[tuple[str, str]] = []

    def note(error: OSError) -> None:
        problems.append((printable(Path(error.filename).relative_to(root)), one_line(error)))

    for directory, folders, names in os.walk(root, onerror=note):
        if RESULT in names or RESULT in folders:  # as a folder it is one that cannot be read
            relative = directory[len(str(root)) :].strip(os.sep) or "."
            found.append(Found(relative, *(stamp(f"{directory}/{name}") for name in (RESULT, SAMPLES, ROUTING))))
        for name in filter(is_unreadable, (*names, *folders)):
            path = printable(Path(directory, name).relative_to(root))
            problems.append((path, "could not be read and was renamed when its cell was run again"))
    return sorted(
        found, key=lambda record: [*record.folder.split(os.sep), RESULT] if record.folder != "." else [RESULT]
    ), sorted(problems)


def stamp(path: str | Path) -> tuple[int, int]:
    """Time of the last change in nanoseconds and size in bytes; (-1, -1) if there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_mtime_ns, status.st_size


def read_plan(root: Path) -> Plan:
    """`plan.json` of a sweep's folder. Raises one of `UNREADABLE_BECAUSE` if it exists but is not a plan."""
    try:
        content = files.read_json(root / PLAN)
    except FileNotFoundError:
        return Plan()
    if content["schema"] != 1:
        raise ValueError(f"schema={content['schema']!r}: this version of moe-lab reads schema 1.")
    compare, anchor = content["compare"], content["anchor"]
    if not isinstance(compare, list) or not compare:
        raise ValueError(f"compare={str(compare)[:60]!r}: must be a list of groups.")
    if not all(isinstance(text, str) for text in compare):
        raise ValueError("compare: the groups must be text.")
    if not isinstance(anchor, dict | None):
        raise ValueError(f"anchor={str(anchor)[:60]!r}: must be part of a configuration.")
    plotly = content.get("plotly", PLOTLY[0])  # older plans have none
    if plotly not in PLOTLY:
        raise ValueError(f"plotly={str(plotly)[:60]!r}: must be one of {', '.join(PLOTLY)}.")
    commands = [[str(word) for word in words] for words in content["commands"]]
    statuses = {str(cell["cell_id"]): str(cell["status"]) for cell in content["cells"]}
    return Plan(compare, anchor, None if content["name"] is None else str(content["name"]), commands, statuses, plotly)


def read(root: Path, relative: str) -> Entry:
    """The record in `root/relative`. Raises one of `UNREADABLE_BECAUSE` if it is not a record of this schema."""
    text = files.read_text(f"{root}/{relative}/{RESULT}")
    content = files.parse_json(text)
    if "\\ud" in text or "\\uD" in text:  # a half of a pair of surrogates, which no file could take
        json.dumps(content, ensure_ascii=False).encode()
    config = Record.from_dict(content).config
    row = _flatten(content, _asked(config))
    row["directory"] = printable(relative)
    columns.check(row)
    if not row.get("cell_id") or not row.get("status"):
        raise ValueError("cell_id or status is missing.")
    return Entry(row, identity.content(config) if "model" in config and "export" in config else None)


class ToldApart(NamedTuple):
    """What only all configurations together tell of one; nothing of a record without one."""

    variant: str | None
    setting_id: str | None
    differing: Mapping[str, Any]


def told_apart(contents: Sequence[Mapping[str, Any] | None], plan: Plan) -> list[ToldApart]:
    """Variant, setting and the values in which they differ, of each record's `identity.content`."""
    known = [content for content in contents if content is not None]
    together = zip(variants.labels(known, plan.compare), known, _differing(known), strict=True)
    told = (ToldApart(label, variants.setting_id(one, plan.compare), differing) for label, one, differing in together)
    return [ToldApart(None, None, {}) if content is None else next(told) for content in contents]


def complete(entries: Sequence[Entry], plan: Plan) -> list[dict[str, Any]]:
    """The entries' rows with what only all records together tell: variants, settings, what differs, copies."""
    copies = Counter(entry.row["cell_id"] for entry in entries)
    rows = []
    for (row, _), told in zip(entries, told_apart([entry.content for entry in entries], plan), strict=True):
        named = {"variant": told.variant, "setting_id": told.setting_id} if told.variant is not None else {}
        rows.append({**row, "n_records": copies[row["cell_id"]], **named, **told.differing})
    return rows


def _asked(config: Mapping[str, Any]) -> dict[str, Any]:
    ignored = set(config.get("model", {}).get("ignores") or ())
    settings = {key: None if key in ignored else config.get(key) for key in columns.SETTINGS}
    options = {
        key: None if key in ignored or not config.get(key) else identity.option_name(config[key])
        for key in columns.OPTIONS
    }
    if config.get("model"):
        options["model"] = identity.model_name(config["model"])
    return {**settings, **options}


def _flatten(content: Mapping[str, Any], row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`row` with the values of a record, nested ones under their dotted names; null is left out."""
    for key, value in content.items():
        if value is None:
            continue
        name = prefix + key
        name = _RENAMED.get(name, name)
        if name in _NOT_COLUMNS:
            continue
        if isinstance(value, dict):
            _flatten(value, row, name + ".")
        else:
            row[name] = value
    return row


def _differing(contents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each content the values in which those with the same option of a group differ, as `config.<path>`."""
    first: dict[tuple[str, str], Any] = {}
    differing: dict[str, set[str]] = {}
    for content in contents:
        for group, node in content.items():
            if group in columns.SETTINGS:
                continue
            other = first.setdefault((group, identity.option_name(node) if isinstance(node, Mapping) else ""), node)
            if node != other:
                mine, theirs = (dict(variants.leaves(one, f"config.{group}")) for one in (node, other))
                paths = differing.setdefault(group, set())
                paths |= {path for path in mine.keys() | theirs.keys() if mine.get(path) != theirs.get(path)}
    return [
        {
            path: value
            for group, paths in differing.items()
            for path, value in variants.leaves(content.get(group), f"config.{group}")
            if path in paths
        }
        for content in contents
    ]


def printable(path: str | Path) -> str:
    """The path with what is no UTF-8 in it escaped."""
    return str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")


def one_line(error: BaseException) -> str:
    """What is wrong, without line breaks or what cannot be printed."""
    text = f"missing key {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return " ".join(text.encode(errors="backslashreplace").decode().split())
