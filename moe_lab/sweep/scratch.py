"""Temporary folders of a sweep. The kernel holds each while its process lives, so the next one knows what is left."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

_PREFIX = "moe-lab-scratch-"


class Scratch:
    """A folder, `path`, until `close` or the end of the process; the first thing is to remove those of killed ones."""

    def __init__(self) -> None:
        hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))  # held before others see it
        _remove_left(hidden.parent)
        descriptor = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # a file system without locks, where nothing is removed
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        self.path = hidden.rename(hidden.with_name(hidden.name[1:]))
        self.close = weakref.finalize(self, _remove, self.path, descriptor)


def _remove(path: Path, descriptor: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(descriptor)


def _remove_left(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # held, another user's, or gone meanwhile
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.getuid():
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)
