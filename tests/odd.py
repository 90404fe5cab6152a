"""Files that somebody may have put where a file of ours is expected."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from moe_lab.records import files


def _socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the name of a socket has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(before)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(files.MOST_TEXT_BYTES + 1)  # sparse


KINDS: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "folder-with-a-file": lambda path: (path.mkdir(), (path / "x").write_text("x")),
    "pipe": os.mkfifo,
    "socket": _socket,
    "link-to-zero": lambda path: path.symlink_to("/dev/zero"),
    "link-to-kernel-log": lambda path: path.symlink_to("/proc/kmsg"),
    "broken-link": lambda path: path.symlink_to("nowhere"),
    "link-to-itself": lambda path: path.symlink_to(path.name),
    "empty": lambda path: path.write_bytes(b""),
    "not-utf-8": lambda path: path.write_bytes(b'{"a": "\xff"}'),
    "deep": lambda path: path.write_text("[" * 100_000 + "]" * 100_000),
    "deep-object": lambda path: path.write_text('{"schema":1,"a":' * 150 + "1" + "}" * 150),
    "nan": lambda path: path.write_text('{"schema": 1, "a": NaN}'),
    "1e999": lambda path: path.write_text('{"schema": 1, "a": 1e999}'),
    "list": lambda path: path.write_text("[1]"),
    "half": lambda path: path.write_text('{"schema": 1, '),
    "huge": _huge,
}


def put(kind: str, path: Path) -> None:
    """A file of that kind at `path`, in place of what is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    KINDS[kind](path)
