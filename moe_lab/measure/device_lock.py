"""Who else uses a device: each run has a file in a folder of the device, which the kernel keeps locked while it lives.

All sets of CPUs have one folder, for they overlap; the file says which set it is. A file that is not locked was left by
a process that died; whoever finds it removes it. Does not import torch.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

CPUS = "cpus"
"""How the name of a set of CPUs begins: `cpus_0-3_8-8`."""
_TURN = "turn"  # locked by the one that no longer waits
_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class DeviceLock:
    """A context manager: inside, this process is known to use `device_id`. With `wait` it is let in when alone.

    `on_wait` is called once before it waits.

    Raises:
        ValueError: on entering with `wait`, if no folder of the user's own can be used.
    """

    def __init__(self, device_id: str, *, wait: bool = False, on_wait: Callable[[], None] = lambda: None):
        self.device_id, self.wait, self.on_wait = device_id, wait, on_wait
        self._folder: Path | None = None
        self._own: Path | None = None
        self._descriptors: list[int] = []

    def __enter__(self) -> DeviceLock:
        self._folder = folder_of(self.device_id)
        try:
            if self._folder is None:
                raise OSError("no folder of one's own")
            if self.wait:
                self._wait_for_others(self._folder)
            hidden = self._folder / f".{os.getpid()}-{id(self)}"  # locked before others see it
            descriptor = os.open(hidden, _OPEN, 0o600)
            self._descriptors.append(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, self.device_id.encode())
            self._own = self._folder / hidden.name[1:]
            hidden.rename(self._own)
        except OSError as error:
            self.__exit__(None, None, None)
            self._folder = None
            if self.wait:
                remedy = "set XDG_RUNTIME_DIR to a folder of your own"
                raise ValueError(f"sweep.wait=true: cannot lock the device ({error}); {remedy}.") from error
        except BaseException:  # Ctrl-C while it waits
            self.__exit__(None, None, None)
            raise
        return self

    def _wait_for_others(self, folder: Path) -> None:
        turn = os.open(folder / _TURN, _OPEN, 0o600)
        self._descriptors.append(turn)
        said = False
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.on_wait()
            said = True
            fcntl.flock(turn, fcntl.LOCK_EX)
        while others := self._others(folder):
            if not said:
                self.on_wait()
                said = True
            with suppress(FileNotFoundError):
                descriptor = os.open(others[0], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH)  # until it ends
                finally:
                    os.close(descriptor)

    def others(self) -> int | None:
        """How many other processes use the device now; None if that cannot be known."""
        return None if self._folder is None else len(self._others(self._folder))

    def _others(self, folder: Path) -> list[Path]:
        found = []
        for path in folder.iterdir():
            if path == self._own or path.name == _TURN or path.name.startswith("."):
                continue
            with suppress(OSError):  # the run has just ended, or the file is not a run's
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    path.unlink()
                except BlockingIOError:
                    if _overlap(self.device_id, os.read(descriptor, 1 << 16).decode()):
                        found.append(path)
                finally:
                    os.close(descriptor)
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._own is not None:
            self._own.unlink(missing_ok=True)
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors, self._own = [], None


def folder_of(device_id: str) -> Path | None:
    """The folder of a GPU or of all CPUs, the same for all processes of this user; None if it cannot be made.

    In a folder of the user's own, so that nobody else can plant a link or hold a lock.
    """
    uid = os.getuid()
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}") / "moe-lab"
    kind = CPUS if device_id.startswith(CPUS) else device_id
    name = "".join(character if character.isalnum() or character in "-_" else "_" for character in kind)[:100]
    for parent in (runtime, Path(tempfile.gettempdir()) / f"moe-lab-{uid}"):
        if parent.is_absolute() and _is_private(parent) and _is_private(parent / name):
            return parent / name
    return None


def _overlap(device_id: str, other: str) -> bool:
    """Whether they are the same GPU, or sets of CPUs that have one in common."""
    return device_id == other or not _cpus(device_id).isdisjoint(_cpus(other))


def _cpus(device_id: str) -> set[int]:
    """Of `cpus_0-3_8-8`: 0, 1, 2, 3 and 8. Of another device: none."""
    spans = re.findall(r"_(\d+)-(\d+)", device_id) if device_id.startswith(CPUS) else []
    return {cpu for first, last in spans for cpu in range(int(first), int(last) + 1)}


def _is_private(folder: Path) -> bool:
    """Whether this is a folder, no link, that nobody but the user can read or write. It is made if it is not there."""
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
    except OSError:
        return False
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return is_own and os.access(folder, os.W_OK | os.X_OK)
