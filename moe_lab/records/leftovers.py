"""What a folder of results need not keep: runs that failed, results set aside, runs of long ago."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from moe_lab.records import search, store
from moe_lab.records.schema import Record

_BESIDE = (store.SAMPLES, store.ROUTING, store.TRACE, store.TIMELINE, store.LOG)
_OF_A_RUN = (store.RESULT, *_BESIDE, "config.yaml", ".hydra", "netron", ".lock", store.SENT, store.TRACKERS_LOG)
_STALE = "stale-"
_OF_A_SWEEP = (
    *(store.PLAN, "multirun.yaml", "worker.log", ".lock", "plots", "report.html", "plotly.min.js", "runs.csv"),
    *("runs.parquet", "summary.csv", "summary.parquet", "samples.parquet", "coactivation.parquet", "unreadable.csv"),
    *(".aggregate.parquet", ".slots", ".slurm", store.SENT, store.TRACKERS_LOG, search.FILE),
)


class Leftover(NamedTuple):
    """What could go from one folder."""

    folder: Path
    kind: str
    """failed | stale | old"""
    why: str
    when: datetime
    paths: tuple[Path, ...]
    """Files and folders of moe-lab's own in it; what else lies there is nobody's to remove."""

    @property
    def n_bytes(self) -> int:
        """What they take on the disk."""
        return sum(_size(path) for path in self.paths)


def find(
    root: Path, *, failed: bool, stale: bool, before: datetime | None, unreadable: Callable[[OSError], object]
) -> Iterator[Leftover]:
    """What could go below `root`, by path.

    Args:
        failed: runs without a result: failed, interrupted, killed.
        stale: earlier results that were set aside (`stale-*`) and files that could not be read, beside one that is ok.
        before: runs that began before this, whatever came of them.
        unreadable: is told of each folder that cannot be listed.

    Links are not followed.
    """
    for name, folders, names in os.walk(root, onerror=unreadable):
        folders.sort()
        folder = Path(name)
        record = None
        if store.RESULT in names:
            with suppress(ValueError):  # what it is nobody knows
                record = store.read_record(folder)
        if record is None:
            continue
        aside = [folder / name for name in sorted(names) if name.startswith(_STALE) or store.is_unreadable(name)]
        if stale and aside and record.status == "ok":  # else it may be the only good one
            yield Leftover(folder, "stale", f"{len(aside)} files set aside", _changed(aside[0]), tuple(aside))
        own = tuple(path for name in _OF_A_RUN if (path := folder / name).exists() and not path.is_symlink())
        began = _began(record, folder)
        if failed and record.status == "failed":
            yield Leftover(folder, "failed", record.reason or "no reason recorded", began, own)
        elif before is not None and began < before:
            yield Leftover(folder, "old", record.status, began, own)


def _began(record: Record, folder: Path) -> datetime:
    with suppress(TypeError, ValueError):
        began = datetime.fromisoformat(record.started or "")
        return began if began.tzinfo else began.replace(tzinfo=UTC)
    return _changed(folder / store.RESULT)


def _changed(path: Path) -> datetime:
    return datetime.fromtimestamp(path.lstat().st_mtime, UTC)


def _size(path: Path) -> int:
    if path.is_dir() and not path.is_symlink():
        return sum(_size(below) for below in path.iterdir())
    return path.lstat().st_size


def remove(leftover: Leftover) -> list[str]:
    """Remove it, and its folder if nothing else is in it. Returns the names of what stays there."""
    return _remove(leftover.folder, leftover.paths)  # the record first: a folder without one is not a run


def remove_empty_sweep(folder: Path) -> bool:
    """Remove a sweep's own files if no record is left in it, and its folder if nothing else is. Whether that was so.

    What lies in a folder that cannot be listed nobody knows, so it counts as a record.
    """
    unreadable: list[OSError] = []
    if any(store.RESULT in names for _, _, names in os.walk(folder, onerror=unreadable.append)) or unreadable:
        return False
    _remove(folder, [folder / name for name in _OF_A_SWEEP])
    return True


def _remove(folder: Path, paths: Iterable[Path]) -> list[str]:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    stays = sorted(path.name for path in folder.iterdir())
    if not stays:
        folder.rmdir()
    return stays
