"""Temporary folders of a sweep. The kernel holds each while its process lives, so the next one knows what is left."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import tempfile
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path

_STEM = f"moe-lab-scratch-{platform.node()}"  # several nodes may share the folder, and not see each other's locks


class Scratch:
    """A folder, `path`, until `close` or the end of the process.

    Making the first one removes the folders that killed processes of this node left.
    """

    def __init__(self) -> None:
        _remove_left(tempfile.gettempdir())
        self.path, descriptor = _make()
        self.close = weakref.finalize(self, _remove, self.path, descriptor)


def _make() -> tuple[Path, int]:
    """(a folder, the descriptor that holds it). Another process may remove it before it is held: then make another."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{_STEM}-"))
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):  # a file system without locks, where nothing is removed
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.is_dir():
                return path, descriptor
            os.close(descriptor)


def _remove(path: Path, descriptor: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(descriptor)


@cache
def _remove_left(parent: str) -> None:
    """Once in a process: a large folder takes a while."""
    for path in Path(parent).iterdir():
        if path.name.rpartition("-")[0] != _STEM:  # what `mkdtemp` adds has no dash
            continue
        with suppress(OSError):  # held, another user's, or gone meanwhile
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.getuid():
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)
