"""Writing and reading a run's directory. A file is either the old one or the whole new one, never half of it.

A folder may come from somebody else: what is written follows no link in it.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from moe_lab.records import files
from moe_lab.records.schema import Record

# The files of a run's directory; `PLAN` lies in a sweep's, beside its runs.
RESULT, SAMPLES, ROUTING, LOG = "result.json", "samples.npz", "routing.npz", "run.log"
TRACE = "routes.trace"  # with measure.record_routing: see records/trace.py
TIMELINE = "timeline.json.gz"  # with measure.profile, for ui.perfetto.dev
UNREADABLE, PLAN = "result.unreadable.json", "plan.json"
SENT, TRACKERS_LOG = ".sent.json", "trackers.log"  # of trackers/, in both
_BESIDE = (SAMPLES, ROUTING, TRACE, TIMELINE, LOG)


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file beside `path`, flush it to the disk, then rename it over `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed, or put there by somebody
    try:
        with open(temporary, "xb") as file:  # x follows no link
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir() and not path.is_symlink():
            files.set_aside(path)  # no file takes the place of a folder
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # a folder that became read-only: the first error tells
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def missing_folders(path: Path) -> list[Path]:
    """`path` and the folders above it that are not there yet, the deepest first: what making it would make."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those that are empty, the deepest first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def own_folder(path: Path) -> Path:
    """Make the folder of a run, or one in it. Raises `OSError` if it is a link: its files would lie elsewhere."""
    if path.is_symlink():
        raise OSError(f"{path}: is a link, so files would be written elsewhere; remove it.")
    path.mkdir(parents=True, exist_ok=True)
    return path


def open_to_append(path: str | Path, flags: int = os.O_APPEND) -> int:
    """A descriptor of the file, made if it is not there. Raises `OSError` if it is a link."""
    if os.path.islink(path):
        raise OSError(f"{path}: is a link, so the log would be written elsewhere; remove it.")
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o666)


class LogFile(logging.FileHandler):
    """A log in a run's folder; it follows no link."""

    def _open(self) -> TextIOWrapper:
        flags = os.O_TRUNC if self.mode == "w" else os.O_APPEND
        return TextIOWrapper(
            open(open_to_append(self.baseFilename, flags), "wb"), encoding=self.encoding, errors=self.errors
        )


def as_json(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null. Of pairs of surrogates UTF-8 has no halves: they are escaped."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_record(directory: Path, record: Record) -> Path:
    """Write `result.json`; the caller writes everything else first, so that its presence means the run is complete."""
    path = directory / RESULT
    text = json.dumps(as_json(record.to_dict()), indent=2, allow_nan=False)
    write_atomic(path, text.encode() + b"\n")
    return path


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write named arrays as a compressed `.npz`."""
    import numpy as np  # here: who only asks for an identity does not wait for it

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def set_aside_unreadable(directory: Path) -> Path | None:
    """Rename a `result.json` that cannot be read, so that nothing overwrites it. Returns its new name, or None."""
    try:
        read_record(directory)
    except FileNotFoundError:
        return None
    except ValueError:
        return files.set_aside(directory / RESULT)
    return None


def find_record(directory: Path) -> Record | None:
    """The record in a run's folder; None if it is missing or cannot be read."""
    try:
        return read_record(directory)
    except (FileNotFoundError, ValueError):
        return None


def mark(directory: Path) -> tuple[int, int] | None:
    """Tells the record in a folder from the one that is written after it; None if there is none."""
    try:
        status = (directory / RESULT).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def is_unreadable(name: str) -> bool:
    """Whether a file of this name is a record that was set aside because it could not be read."""
    return name.startswith(UNREADABLE.removesuffix(".json")) and name.endswith(".json")


def set_aside_stale(directory: Path, cell_id: str, code_id: str, env_id: str | None) -> None:
    """Keep a result of another configuration, code or machine, or one that is ok, beside the one to come."""
    record = find_record(directory)
    if record is None:
        return
    if (record.cell_id, record.code_id, record.env_id) != (cell_id, code_id, env_id) or record.status == "ok":
        set_aside(directory, record)


def set_aside(directory: Path, record: Record) -> str:
    """Rename a run's files, of which `record` is one; returns how their names now begin.

    `result.json`, `samples.npz` and so on become `stale-<code_id>-<env_id>.result.json` and so on, the next of the same
    code and machine `stale-<code_id>-<env_id>-2.result.json`.
    """
    prefix = stale = f"stale-{record.code_id}-{record.env_id}"
    number = 1
    while (directory / f"{stale}.{RESULT}").exists():
        number += 1
        stale = f"{prefix}-{number}"
    _rename(directory, "", f"{stale}.")
    return f"{stale}."


def put_back(directory: Path, stale: str) -> None:
    """Undo `set_aside`, which returned `stale`."""
    remove(directory)
    _rename(directory, stale, "")


def remove(directory: Path, stale: str = "") -> None:
    """Remove a run's files; with `stale` those that `set_aside` renamed."""
    for name in (RESULT, *_BESIDE):  # the record first: what has none is no run
        (directory / f"{stale}{name}").unlink(missing_ok=True)


def _rename(directory: Path, old: str, new: str) -> None:
    for name in (*_BESIDE, RESULT):  # the record last: until then the rest belongs to it
        if (directory / f"{old}{name}").exists():
            os.replace(directory / f"{old}{name}", directory / f"{new}{name}")


def read_record(directory: Path) -> Record:
    """Read `directory/result.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a plain file with a record of this schema; the message names it.
    """
    path = directory / RESULT
    try:
        record = Record.from_dict(files.read_json(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    record.directory = str(directory)
    return record
