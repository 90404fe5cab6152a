"""Peak memory of one iteration."""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_lab.measure.clocks import Step

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def peak_bytes(step: Step) -> int | None:
    """Bytes at the peak of one call of `step`, or None where it cannot be known.

    CUDA: the allocator's peak, parameters and input included. CPU under Linux: the resident peak of the whole process
    (interpreter and libraries too), after a reset of the kernel's high-water mark.
    """
    if step.device.type == "cuda":
        return step.peak_bytes()
    gc.collect()
    give_back_free_memory()
    try:
        _CLEAR_REFS.write_text("5")  # resets VmHWM to the present resident size
    except OSError:
        return None
    step()
    return resident_peak_bytes()


def available_bytes(device: Any) -> int | None:
    """Bytes that this process has or could take on `device` now, or None where the system does not tell."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    return host_bytes()


def host_bytes() -> int | None:
    """Those of the host's memory. Needs no torch."""
    try:
        available = _kilobytes(_MEMINFO, "MemAvailable:")
        resident = _kilobytes(_STATUS, "VmRSS:")
    except OSError:
        return None
    if available is None or resident is None:
        return None
    return max(0, min([available + resident, *_limits_of_groups(), *_limits_of_process(resident)]))


def swap_bytes() -> int:
    """Bytes that the system could move to the disk."""
    try:
        return _kilobytes(_MEMINFO, "SwapFree:") or 0
    except OSError:
        return 0


def _limits_of_groups() -> Iterator[int]:
    """What the control groups of this process allow it and its companions: its own group's limit, and all above."""
    try:
        lines = _CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2, version 1
            root = _CGROUPS if not controllers else _CGROUPS / "memory"
            own = root / path.strip("/")
            for folder in (own, *own.parents):
                with suppress(OSError, ValueError):  # not there, or `max`
                    yield int((folder / ("memory.limit_in_bytes" if controllers else "memory.max")).read_text())
                if folder == root:
                    break


def _limits_of_process(resident: int) -> Iterator[int]:
    """What `ulimit` allows: what is resident, and what the address space or the data may still grow by."""
    for limit, field in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        most, _ = resource.getrlimit(limit)
        now = _kilobytes(_STATUS, field)
        if most != resource.RLIM_INFINITY and now is not None:
            yield most - now + resident


def give_back_free_memory() -> None:
    """What was freed and is still the allocator's, to the system; else it counts as what is done next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def resident_peak_bytes() -> int | None:
    """VmHWM of this process, or None where the kernel does not tell."""
    return _kilobytes(_STATUS, "VmHWM:")


def _kilobytes(path: Path, field: str) -> int | None:
    """The field of a /proc file that counts in kB, in bytes."""
    for line in path.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None


def is_exhausted_by(error: BaseException) -> bool:
    """Whether an error says that memory, the device's or the host's, did not suffice."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator: can't allocate" in str(error)  # a bare RuntimeError
