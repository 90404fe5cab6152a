"""Peak memory of one iteration."""

from __future__ import annotations

from pathlib import Path

from moe_lab.measure.clocks import Step

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def peak_bytes(step: Step) -> int | None:
    """Bytes at the peak of one call of `step`, or None where it cannot be known.

    CUDA: the allocator's peak, parameters and input included. CPU under Linux: the resident peak of the whole process
    (interpreter and libraries too), after a reset of the kernel's high-water mark.
    """
    if step.device.type == "cuda":
        return step.peak_bytes()
    try:
        _CLEAR_REFS.write_text("5")  # resets VmHWM to the present resident size
    except OSError:
        return None
    step()
    return resident_peak_bytes()


def resident_peak_bytes() -> int | None:
    """VmHWM of this process, or None where the kernel does not tell."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
