"""One sweep at a time in a folder. The kernel releases the lock of a process that died."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

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
                f"{directory}: another sweep is using this folder{self._described()}; "
                "wait for it or set another sweep.name."
            ) from error
        started = datetime.now(UTC).isoformat(timespec="seconds")
        owner = json.dumps({"pid": os.getpid(), "host": platform.node(), "since": started})
        write_atomic(self._owner, owner.encode())

    def _described(self) -> str:
        try:
            owner = json.loads(self._owner.read_text())
            return f" (process {owner['pid']} on {owner['host']} since {owner['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def release(self) -> None:
        """Release the lock."""
        self._owner.unlink(missing_ok=True)
        self._lock.release()
