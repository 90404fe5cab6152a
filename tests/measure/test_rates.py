"""measure/rates.py: reads of a real disk past the page cache, and reasons where there is nothing to measure."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_lab.measure import rates

MIB = 2**20


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """A folder on a disk that is read past the page cache."""
    if rates._file_system(tmp_path) in (None, *rates._MEMORY, "overlay"):
        pytest.skip(f"{tmp_path} is not on a disk")
    return tmp_path


@pytest.fixture
def in_memory() -> Iterator[Path]:
    shm = Path("/dev/shm")
    if not (shm.exists() and os.access(shm, os.W_OK) and rates._file_system(shm) == "tmpfs"):
        pytest.skip("there is no tmpfs at /dev/shm")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)


def written(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
    return path


def test_the_largest_file_of_a_folder_is_read(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every whole block once, in three passes, from the place that is read; nothing is written."""
    written(on_disk / "a", MIB)
    largest = written(on_disk / "b", 50 * MIB)
    content, read, preadv = largest.read_bytes(), [], os.preadv

    def seen(descriptor: int, buffers: list[object], offset: int) -> int:
        n = preadv(descriptor, buffers, offset)
        assert bytes(buffers[0]) == content[offset : offset + rates._BLOCK]  # type: ignore[call-overload]
        assert os.readlink(f"/proc/self/fd/{descriptor}") == str(largest)
        read.append(offset // rates._BLOCK)
        return n

    monkeypatch.setattr(os, "preadv", seen)
    rate = rates.disk(on_disk)
    assert read == [0, 1, 2, 3, 4, 5]
    assert rate.reason is None and rate.of == str(largest) and rate.gb_per_s is not None
    assert 0.001 < rate.gb_per_s < 100
    assert sorted(path.name for path in on_disk.iterdir()) == ["a", "b"]


def test_the_page_cache_is_passed(on_disk: Path) -> None:
    """What was not in it is not in it afterwards: a read that may not wait finds nothing."""
    path = written(on_disk / "a", 24 * MIB)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        assert rates.disk(path).gb_per_s is not None
        with pytest.raises(BlockingIOError):
            os.preadv(descriptor, [bytearray(4096)], 0, os.RWF_NOWAIT)
    finally:
        os.close(descriptor)


def test_a_folder_without_a_large_file_gets_one_for_a_moment(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is left as it was."""
    monkeypatch.setattr(rates, "_WRITTEN_BLOCKS", 3)
    rate = rates.disk(on_disk)
    assert rate.gb_per_s is not None and rate.of == f"a file written to {on_disk}"
    assert list(on_disk.iterdir()) == []


def test_memory_is_no_disk(in_memory: Path) -> None:
    """It would look like a very fast one."""
    rate = rates.disk(in_memory)
    assert rate.gb_per_s is None and rate.reason == f"{in_memory} is in memory (tmpfs), not on a disk"


def test_a_small_file_is_not_measured(on_disk: Path) -> None:
    """Three passes of a block each are the least."""
    rate = rates.disk(written(on_disk / "a", 20 * MIB))
    assert rate.gb_per_s is None and rate.reason is not None and "has 20 MiB, and at least 24" in rate.reason


def test_a_folder_that_cannot_be_read_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback, and no rate."""

    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    written(tmp_path / "a", 24 * MIB)
    monkeypatch.setattr(rates, "_file_system", lambda _: None)
    monkeypatch.setattr(os, "preadv", refuse)
    rate = rates.disk(tmp_path)
    assert rate.gb_per_s is None and rate.reason == f"{tmp_path}: Invalid argument"
    monkeypatch.delattr(os, "O_DIRECT")
    assert "O_DIRECT" in str(rates.disk(tmp_path).reason)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_there_is_a_reason() -> None:
    """And no rate of 0."""
    assert rates.host_to_device() == rates.Rate(None, "pinned memory to a CUDA device", "no CUDA device")


@pytest.mark.gpu
def test_a_copy_to_the_gpu_has_the_rate_of_its_link() -> None:
    """PCIe 3 x1 to NVLink; twice nearly the same, and faster than from memory that is not pinned."""
    first, second = rates.host_to_device().gb_per_s, rates.host_to_device().gb_per_s
    assert first is not None and second is not None and 0.5 < first < 1000
    assert 0.7 < first / second < 1.4
