"""What is sent of a record and of a sweep, the same for every tracker. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from moe_lab.records.identity import digest
from moe_lab.records.schema import NOT_SENT

_NOT_PARAMETERS = ("sweep", "tracker", "overrides")  # how a sweep goes about its cells, and where they are sent
_NOT_METRICS = ("schema", "config", "environment")
_TAGS = ("cell_id", "code_id", "env_id", "status", "reason", "name")
_MACHINE = ("node", "device_name", "git_sha", "moe_lab", "torch")


@dataclass(frozen=True)
class Sweep:
    """A multirun."""

    id: str
    """Unique, and the same whenever the sweep is continued."""
    name: str

    @property
    def group(self) -> str:
        """What its cells have in common where a tracker has groups or folders."""
        return f"{self.name}-{self.id}"


@dataclass(frozen=True)
class Files:
    """What lies in the folder of a sweep at its end: report, tables, plots."""

    paths: list[Path]
    is_complete: bool
    """Whether every cell has its result."""

    @property
    def content(self) -> str:
        """12 hex digits of what is sent."""
        hashed = hashlib.sha256(str(self.is_complete).encode())
        for path in self.paths:
            hashed.update(f"\0{path.name}\0".encode() + path.read_bytes())
        return hashed.hexdigest()[:12]


@dataclass
class Cell:
    """One record."""

    id: str
    """Unique, and the same whenever it is sent again: its cell_id, and the id of its sweep or of a single run."""
    name: str
    """For people, as its folder is called."""
    content: str
    """Hash of the record: tells a newer one from the one that was sent."""
    record: Mapping[str, Any]
    """See `of_record`."""

    @property
    def params(self) -> dict[str, Any]:
        """The flattened configuration: `model.top_k`, `router.name`, ...; lists as JSON."""
        kept = {key: value for key, value in self.record["config"].items() if key not in _NOT_PARAMETERS}
        return dict(_leaves(kept))

    @property
    def metrics(self) -> dict[str, float]:
        """Every number of the record under its name in docs/results-format.md; those of single layers are left out."""
        kept = {key: value for key, value in self.record.items() if key not in _NOT_METRICS}
        return {
            key: float(value)
            for key, value in _leaves(kept)
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }

    @property
    def tags(self) -> dict[str, str]:
        """Who the result is, how it ended, and where it ran."""
        found = {key: self.record[key] for key in _TAGS}
        found |= {key: self.record["environment"].get(key) for key in _MACHINE}
        found |= {f"implementation.{op}": name for op, name in self.record["implementation"].items()}
        return {key: str(value) for key, value in found.items() if value is not None}

    @property
    def started_s(self) -> float | None:
        """Seconds since 1970; None of a record without a run."""
        started = self.record["started"]
        return datetime.fromisoformat(started).timestamp() if started is not None else None

    @property
    def ended_s(self) -> float | None:
        """Seconds since 1970."""
        started = self.started_s
        return started + (self.record["elapsed_s"] or 0.0) if started is not None else None

    def write_record(self, folder: Path) -> Path:
        """`record.json`, the whole record, for a tracker that keeps files."""
        path = folder / "record.json"
        path.write_text(json.dumps(self.record, indent=2) + "\n")
        return path


def of_record(content: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record's `to_dict` is sent: all but the warnings about its sending."""
    return {**content, "warnings": [text for text in content["warnings"] if not text.startswith(NOT_SENT)]}


def hash_of(record: Mapping[str, Any]) -> str:
    """12 hex digits of what is sent of a record."""
    return digest(record)


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value) if isinstance(value, list) else value
