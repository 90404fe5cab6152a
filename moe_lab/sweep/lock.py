"""One sweep at a time in a folder. The kernel releases the lock of a process that died."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from moe_lab.records import files
from moe_lab.records.store import write_atomic

LOCK, OWNER = ".lock", ".owner.json"


class Lock:
    """Held from `__init__` to `release` or the end of the process.

    Raises:
        ValueError: another sweep holds it; the message says which process.
    """

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._owner = directory / OWNER
        self._lock = FileLock(directory / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"{directory}: another sweep is using this folder{_described(directory)}; "
                "wait for it or set another sweep.name."
            ) from error
        started = datetime.now(UTC).isoformat(timespec="seconds")
        owner = json.dumps({"pid": os.getpid(), "host": platform.node(), "since": started})
        write_atomic(self._owner, owner.encode())

    def release(self) -> None:
        """Release the lock."""
        with suppress(OSError):  # in a folder that became read-only it stays, and says nothing without the lock
            self._owner.unlink(missing_ok=True)
        self._lock.release()


def owner(directory: Path) -> str | None:
    """Which process holds the lock, as text; None if none does."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _described(directory)
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)
    return None


def _described(directory: Path) -> str:
    try:
        owner = files.read_json(directory / OWNER)
        return f" (process {owner['pid']} on {owner['host']} since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
