"""Reading files that anybody may have written: only plain files of a sane size are read.

A pipe would block its reader for ever, a link to /dev/zero would fill the memory, deep JSON the stack. What such a file
is refused with is an `OSError` whose `strerror` says what it is.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 26
"""Of a JSON or YAML file; a record of a hundred layers has less than a hundredth of that."""
MOST_TEXT_BYTES = 1 << 30
"""Of a text, a tokenizer, or the arrays of one run; they are held in memory whole."""
DEEPEST = 100

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_plain(path: str | Path, most_bytes: int | None = MOST_BYTES) -> os.stat_result:
    """The status of a plain file, links followed; for files that a library opens by itself.

    Raises:
        OSError: the file does not exist, is not a plain file, or is larger than `most_bytes`.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"not a plain file but {kind}", str(path))
    if most_bytes is not None and status.st_size > most_bytes:
        raise _too_large(path, most_bytes)
    return status


def _too_large(path: str | Path, most_bytes: int) -> OSError:
    return OSError(errno.EFBIG, f"larger than {most_bytes >> 20} MiB", str(path))


def read_bytes(path: str | Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a plain file. Raises `OSError`; see `require_plain`."""
    require_plain(path, most_bytes)
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        content = file.read(most_bytes + 1)  # a file of /proc has more than its size says
    if content is None:
        raise OSError(errno.EAGAIN, "not a plain file but one to wait for", str(path))
    if len(content) > most_bytes:
        raise _too_large(path, most_bytes)
    return content


def read_text(path: str | Path, most_bytes: int = MOST_BYTES) -> str:
    """The text of a plain file. Raises `OSError` (see `require_plain`) or `ValueError`: it is not UTF-8."""
    return read_bytes(path, most_bytes).decode()


def read_json(path: str | Path) -> Any:
    """What a plain JSON file holds.

    Raises:
        OSError: see `require_plain`.
        ValueError: it is not JSON: NaN and Infinity are not, 1e999 is no float. Or it is nested deeper than `DEEPEST`.
    """
    return parse_json(read_text(path))


def parse_json(text: str, decoder: json.JSONDecoder | None = None) -> Any:
    """See `read_json`; a decoder may have more to object to."""
    try:
        content = (decoder or _DECODER).decode(text)
    except RecursionError:
        raise _too_deep() from None
    if text.count("{") + text.count("[") > DEEPEST:  # else it cannot be so deep
        _hold_depth(content)
    return content


def finite(text: str) -> float:
    """A number of a JSON file. Raises `ValueError` for NaN, Infinity and 1e999."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:60]} is not a finite number")
    return value


_DECODER = json.JSONDecoder(parse_constant=finite, parse_float=finite)


def _too_deep() -> ValueError:
    return ValueError(f"nested deeper than {DEEPEST} levels")


def _hold_depth(node: Any, left: int = DEEPEST) -> None:
    """Refuse what is nested deeper than any file of ours, before what follows it down runs out of stack."""
    if left == 0:
        raise _too_deep()
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _hold_depth(child, left - 1)


def require_arrays(path: str | Path) -> None:
    """For a `.npz` that a library opens by itself; what is in it may be packed a thousandfold.

    Raises:
        OSError: it is not a plain file, or its arrays have more than `MOST_TEXT_BYTES`.
        ValueError: it is not an archive.
    """
    if not require_plain(path, MOST_TEXT_BYTES).st_size:  # as the files of /proc, of which some block
        raise ValueError(f"{path} is empty")
    try:
        with zipfile.ZipFile(path) as archive:
            n_bytes = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not an .npz ({error})") from error
    if n_bytes > MOST_TEXT_BYTES:
        raise _too_large(path, MOST_TEXT_BYTES)


def set_aside(path: Path) -> Path:
    """Rename what cannot be read, so that nothing overwrites it: `result.json` to `result.unreadable.json`, ..."""
    aside = path.with_name(f"{path.stem}.unreadable{path.suffix}")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.stem}.unreadable-{number}{path.suffix}")
    os.rename(path, aside)
    return aside
