"""What a configuration names by a path and a run reads: which files they are, and what they hold. Imports no torch.

A result depends on what such files hold and not on where they lie, so identities take a hash of their content.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from moe_lab.records.files import read_bytes, require_plain
from moe_lab.records.store import ROUTING, TRACE
from moe_lab.records.weight_changes import active

TEXTS = (".txt", ".md")
CONFIG = "config.json"
_CHECKPOINT = (CONFIG, "tokenizer.json", "*.safetensors", "model.safetensors.index.json")
_WHOLE = 1 << 24  # bytes up to which a file is read from end to end
_PROBES, _PROBE = 64, 1 << 16  # of a larger one, so many places and so many bytes at each


def text_files(path: str | Sequence[str]) -> list[Path]:
    """The files that `workload.path` means: a file, a folder, or several of those.

    Of a folder all `*.txt` and `*.md` files directly in it, sorted by name, but for README.md, which is about the
    texts.

    Raises:
        ValueError: there is no such file or folder, or the folder has no texts.
    """
    return [file for each in ([path] if isinstance(path, str) else path) for file in _texts_of(each)]


def _texts_of(path: str) -> list[Path]:
    if Path(path).is_file():
        return [Path(path)]
    if not Path(path).is_dir():
        pattern = " (no file matches the pattern, so the shell left it as it is)" if set(path) & set("*?") else ""
        raise ValueError(
            f"workload.path={path}: file or folder not found{pattern}; give a text file or a folder of texts."
        )
    files = [
        file
        for file in sorted(Path(path).iterdir())
        if file.suffix in TEXTS and file.is_file() and file.name.lower() != "readme.md"
    ]
    if not files:
        raise ValueError(
            f"workload.path={path}: no texts in this folder ({' or '.join(f'*{suffix}' for suffix in TEXTS)}, "
            "README.md does not count); add a text or list the files."
        )
    return files


def require(config: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a path in a configuration that leads nowhere, before anything is loaded to read it."""
    model, workload = config["model"], config.get("workload") or {}
    if "path" in model and str(model["_target_"]).startswith("moe_lab."):
        require_checkpoint(str(model["path"]))
    if workload.get("path") and str(workload["_target_"]).startswith("moe_lab."):
        text_files(workload["path"])
    if (calibration := active(model).get("calibration", {}).get("path")) is not None:
        _require_other_text(calibration, workload.get("path"))
    if workload.get("trace") is not None and not trace_file(workload["trace"]).exists():
        raise ValueError(
            f"workload.trace={workload['trace']}: {trace_file(workload['trace'])} not found; give a trace file, or the "
            "folder of a run with measure.record_routing=true."
        )


def _require_other_text(calibration: str | Sequence[str], judged: str | Sequence[str] | None) -> None:
    """Raise `ValueError` for a calibration text that is not there, or that the run is judged by."""
    try:
        chosen = text_files(calibration)
    except ValueError as error:
        raise ValueError(str(error).replace("workload.path", "model.calibration.path")) from error
    contents = {file_id(file): file for file in text_files(judged)} if judged else {}
    for file in chosen:
        if (same := contents.get(file_id(file))) is not None:
            raise ValueError(
                f"model.calibration.path: {file} is the text of workload.path too ({same}), so what is chosen by it "
                "would be judged by it; use another text for one of the two."
            )


def require_checkpoint(folder: str) -> None:
    """Raise `ValueError` unless there is a folder with a config.json; a name of the hub is told apart."""
    path = Path(folder) / CONFIG
    if path.exists():
        return
    if re.fullmatch(r"[\w-]+/[\w.-]+", folder) and not Path(folder).parent.exists():
        name = folder.rpartition("/")[2]
        raise ValueError(
            f"model.path={folder}: folder not found; if it is a name of the Hugging Face hub, download it first (hf "
            f"download {folder} --local-dir {name}) and write model.path={name}."
        )
    raise ValueError(
        f"model.path={folder}: {path} cannot be read (No such file or directory); give the folder of a Hugging Face "
        "checkpoint, with config.json and safetensors."
    )


def text_id(path: str | Sequence[str]) -> str | Sequence[str]:
    """12 hex digits of the texts' names and content; the path itself where they cannot be read."""
    try:
        return _hash(text_files(path))
    except (OSError, ValueError, TypeError):  # the last: what is no path
        return path  # building the run will tell


def trace_file(path: str) -> Path:
    """The file that `workload.trace` means: a trace, or that of a run's folder; older runs have a `routing.npz`."""
    folder = Path(path)
    if not folder.is_dir():
        return folder if folder.exists() else folder / TRACE
    return folder / (ROUTING if (folder / ROUTING).exists() and not (folder / TRACE).exists() else TRACE)


def trace_id(path: str) -> str:
    """12 hex digits of recorded routes, or the path."""
    file = trace_file(path)
    try:
        return _hash([file]) if file.name == ROUTING else file_id(file)
    except OSError:
        return path


def file_id(file: Path) -> str:
    """12 hex digits of what a file holds, whatever its name. Raises `OSError` if it cannot be read."""
    stat = require_plain(file, None)
    return _content(os.path.abspath(file), stat.st_mtime_ns, stat.st_size).hex()[:12]


def checkpoint_id(directory: str) -> str:
    """12 hex digits of a checkpoint's configuration, tokenizer and weights, or the path.

    Of a file of more than 16 MiB its size and 4 MiB in 64 places are read, so that tens of gigabytes take no minutes.
    """
    folder = Path(directory)
    files = sorted(file for pattern in _CHECKPOINT for file in folder.glob(pattern) if file.is_file())
    try:
        return _hash(files) if files else directory
    except OSError:
        return directory


def _hash(files: Iterable[Path]) -> str:
    hashed = hashlib.sha256()
    for file in files:
        stat = require_plain(file, None)
        hashed.update(f"{file.name}\0{stat.st_size}\0".encode())
        hashed.update(_content(os.path.abspath(file), stat.st_mtime_ns, stat.st_size))
    return hashed.hexdigest()[:12]


@lru_cache(maxsize=256)  # identities are asked for again and again
def _content(file: str, mtime_ns: int, size: int) -> bytes:
    """A hash of the file's content, by its stamp."""
    hashed = hashlib.sha256()
    if size <= _WHOLE:
        hashed.update(read_bytes(file))
        return hashed.digest()
    with open(file, "rb") as stream:
        for probe in range(_PROBES):
            stream.seek(probe * (size - _PROBE) // (_PROBES - 1))
            hashed.update(stream.read(_PROBE))
    return hashed.digest()
