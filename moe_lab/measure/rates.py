"""How fast weights can be loaded here: from host memory to the GPU, and from a disk (`moe-lab doctor --rates`).

    host_to_device    copies of 256 MiB from pinned memory to the CUDA device, by its own clock; the median of ten
    disk              reads of 8 MiB, one after the other, past the page cache (O_DIRECT); the median of three passes,
                      each over another part of the file, of 1 GiB at most. Several readers at once may be faster.

GB/s are 10^9 bytes a second. What cannot be measured has no rate but a reason.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_COPY = 2**28  # bytes
_COPIES = 10
_BLOCK = 2**23
_PASSES = 3
_MOST_BLOCKS = 128  # of a pass
_WRITTEN_BLOCKS = 48  # of a file that is written to be read
_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Rate:
    """`gb_per_s` of what was measured (`of`); None where it could not be, with the reason."""

    gb_per_s: float | None
    of: str
    reason: str | None = None


def host_to_device() -> Rate:
    """From pinned memory to the CUDA device."""
    if not torch.cuda.is_available():
        return Rate(None, "pinned memory to a CUDA device", "no CUDA device")
    of = f"pinned memory to {torch.cuda.get_device_name()}"
    try:
        host = torch.empty(_COPY, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(_COPY, dtype=torch.uint8, device="cuda")
        device.copy_(host)  # the first copy pays for more than the copy
        ms = []
        for _ in range(_COPIES):
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            device.copy_(host, non_blocking=True)
            ended.record()
            ended.synchronize()
            ms.append(begun.elapsed_time(ended))
    except RuntimeError as error:
        return Rate(None, of, str(error).splitlines()[0])
    return Rate(_COPY / statistics.median(ms) / 1e6, of)


def disk(place: Path) -> Rate:
    """From the disk that `place` is on: a file, or a folder whose largest file is read (a checkpoint's).

    In a folder without a file of 24 MiB one of 384 MiB is written, read, and removed.
    """
    of = str(place)
    if not hasattr(os, "O_DIRECT"):
        return Rate(None, of, "this system has no reads past the page cache (O_DIRECT)")
    try:
        if (kind := _file_system(place)) in _MEMORY:
            return Rate(None, of, f"{place} is in memory ({kind}), not on a disk")
        with _large_file(place) as (path, of):
            return Rate(_read_rate(path), of)
    except OSError as error:
        return Rate(None, of, f"{place}: {error.strerror or error}")


@contextmanager
def _large_file(place: Path) -> Iterator[tuple[Path, str]]:
    """`place` itself, its largest file, or one that is removed afterwards; and its name for people."""
    if place.is_file():
        yield place, str(place)
        return
    largest = max((path for path in place.iterdir() if path.is_file()), key=_size, default=None)
    if largest is not None and _size(largest) >= _PASSES * _BLOCK:
        yield largest, str(largest)
        return
    with tempfile.NamedTemporaryFile(dir=place, prefix="moe-lab-rates-") as written:
        for _ in range(_WRITTEN_BLOCKS):
            written.write(os.urandom(_BLOCK))
        written.flush()
        os.fsync(written.fileno())
        yield Path(written.name), f"a file written to {place}"


def _size(path: Path) -> int:
    return path.stat().st_size


def _read_rate(path: Path) -> float:
    """GB/s, see the head of this file. Raises `OSError` if it cannot be read so."""
    blocks = min(_size(path) // _BLOCK // _PASSES, _MOST_BLOCKS)
    if blocks == 0:
        raise OSError(f"has {_size(path) / 2**20:.0f} MiB, and at least {_PASSES * _BLOCK // 2**20} are needed")
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        rates = []
        with mmap.mmap(-1, _BLOCK) as buffer:  # it begins at a page, which O_DIRECT asks for
            for first in range(0, _PASSES * blocks, blocks):
                begun = time.perf_counter()
                for block in range(first, first + blocks):
                    if os.preadv(descriptor, [buffer], block * _BLOCK) != _BLOCK:
                        raise OSError("was shortened while it was read")
                rates.append(blocks * _BLOCK / (time.perf_counter() - begun) / 1e9)
    finally:
        os.close(descriptor)
    return statistics.median(rates)


def _file_system(place: Path) -> str | None:
    """Of Linux: `ext4`, `tmpfs`, ...; None where it is not known."""
    number = place.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(" - ")[1].split()[0] for line in lines if line.split()[2] == device), None)
