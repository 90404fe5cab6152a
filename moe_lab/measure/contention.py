"""What else the machine did while something was timed: its load, other processes, other runs, throttling. No torch.

Where the system does not tell, a value is None.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.measure.device_lock import DeviceLock
from moe_lab.records.schema import BUSY

_CPU = Path("/sys/devices/system/cpu")
_LEAST_TICKS = 20  # of 10 ms on each CPU; a shorter time tells nothing

# Above these a run has a warning.
_LOAD = 1.25  # of the load average by CPU: a run's own threads make up to 1
_OTHER_CPU = 0.1
_STEAL = 0.02

# Bits of NVML's clock event reasons that slow a GPU down (nvml.h); idle and chosen clocks do not.
_REASONS = {
    0x04: "GPU power cap",
    0x08: "GPU hardware slowdown",
    0x20: "GPU temperature",
    0x40: "GPU hardware temperature",
    0x80: "GPU power brake",
}


class _Ticks(NamedTuple):
    """Clock ticks since the system started, of the CPUs that this process may use."""

    total: int
    busy: int
    steal: int
    own: int
    """Of the processes that are not others."""


class Watch:
    """Looks at the machine from `start` to `stop`, as often as that; `look` is to be called now and then between."""

    def __init__(self, lock: DeviceLock):
        self.lock = lock
        self._load = _load_average()
        self._cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._ticks: list[tuple[_Ticks, _Ticks]] = []
        self._begun: tuple[_Ticks | None, dict[str, int], tuple[int, ...]] | None = None
        self._throttled: set[str] | None = None
        self._other_runs: int | None = None
        self._frequency: float | None = None

    def start(self, pids: Iterable[int]) -> None:
        """Begin; the work of these processes is not others'."""
        pids = tuple(dict.fromkeys(pids))
        self._begun = _ticks(self._cpus, pids), _throttle_counts(self._cpus), pids
        self.look()

    def look(self) -> None:
        """Note what can only be seen at a moment."""
        if (others := self.lock.others()) is not None:
            self._other_runs = max(self._other_runs or 0, others)
        if (frequency := _frequency(self._cpus)) is not None:
            self._frequency = min(frequency, self._frequency or frequency)
        if (reasons := _gpu_reasons(self.lock.device_id)) is not None:
            self._throttled = (self._throttled or set()) | reasons

    def stop(self) -> None:
        """End, and add to what was seen before."""
        assert self._begun is not None, "call start first"
        self.look()
        ticks, counts, pids = self._begun
        if ticks is not None and (now := _ticks(self._cpus, pids)) is not None:
            self._ticks.append((ticks, now))
        for reason, count in _throttle_counts(self._cpus).items():
            self._throttled = (self._throttled or set()) | ({reason} if count > counts.get(reason, count) else set())
        self._begun = None

    def seen(self) -> dict[str, Any]:
        """The record's `contention`."""
        total, busy, steal, own = (
            sum(after[index] - before[index] for before, after in self._ticks) for index in range(len(_Ticks._fields))
        )
        is_known = total >= _LEAST_TICKS * max(len(self._cpus), 1)
        return {
            "load_average": self._load,
            "other_cpu": min(max(busy - own, 0) / total, 1.0) if is_known else None,
            "steal": steal / total if is_known else None,
            "other_runs": self._other_runs,
            "cpu_frequency": self._frequency,
            "throttled": None if self._throttled is None else ", ".join(sorted(self._throttled)),
        }


def warnings(contention: dict[str, Any] | None) -> list[str]:
    """One line if the machine is known to have been busy."""
    seen = {name: value for name, value in (contention or {}).items() if value is not None}
    reasons = []
    if runs := seen.get("other_runs"):
        reasons.append(f"{runs} other run{'s' if runs > 1 else ''} on this device (sweep.wait=true waits for them)")
    if (share := seen.get("other_cpu", 0)) > _OTHER_CPU:
        reasons.append(f"other processes used {share:.0%} of the CPUs")
    if (load := seen.get("load_average", 0)) > _LOAD:
        reasons.append(f"the load average was {load:.1f} for each CPU")
    if (steal := seen.get("steal", 0)) > _STEAL:
        reasons.append(f"the hypervisor took {steal:.0%} of the CPUs")
    if throttled := seen.get("throttled"):
        reasons.append(f"throttled by {throttled}")
    return [f"{BUSY}{'; '.join(reasons)}. Latencies may be too long."] if reasons else []


# ---- what the system tells


def _load_average() -> float | None:
    """Of the last minute, over the CPUs of the machine: its load is that of all of them."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return None


def _ticks(cpus: Iterable[int], pids: Iterable[int]) -> _Ticks | None:
    names = {f"cpu{cpu}" for cpu in cpus}
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        times = [[int(text) for text in words[1:9]] for words in lines if words and words[0] in names]
        own = 0
        for pid in pids:  # utime, stime and those of children that have ended; the name before may hold anything
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            own += sum(int(text) for text in words[11:15])
    except (OSError, ValueError):
        return None
    user, nice, system, idle, wait, irq, softirq, steal = (sum(column) for column in zip(*times, strict=True))
    busy = user + nice + system + irq + softirq
    return _Ticks(busy + idle + wait + steal, busy, steal, own)


def _throttle_counts(cpus: Iterable[int]) -> dict[str, int]:
    """How often CPUs were slowed down so far, by reason."""
    counts = {}
    hot = [_number(_CPU / f"cpu{cpu}/thermal_throttle/core_throttle_count") for cpu in cpus]
    if known := [count for count in hot if count is not None]:
        counts["CPU temperature"] = sum(known)
    try:
        group = Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":", 2)[2]
    except (OSError, IndexError):
        group = "/"
    root = Path("/sys/fs/cgroup")
    for path in (root / group.strip("/") / "cpu.stat", root / "cpu.stat", root / "cpu" / "cpu.stat"):
        try:
            fields = dict(line.split() for line in path.read_text().splitlines())
            counts["CPU quota"] = int(fields["nr_throttled"])
            break
        except (OSError, ValueError, KeyError):
            continue
    return counts


def _frequency(cpus: Iterable[int]) -> float | None:
    """Mean clock of these CPUs over the highest that they have."""
    shares = []
    for cpu in cpus:
        now, most = (_number(_CPU / f"cpu{cpu}/cpufreq/{name}") for name in ("scaling_cur_freq", "cpuinfo_max_freq"))
        if now and most:
            shares.append(now / most)
    return sum(shares) / len(shares) if shares else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _gpu_reasons(device_id: str) -> set[str] | None:
    """Why NVML says that this GPU is slowed down at the moment; None for a CPU, or where NVML is not there."""
    if not device_id.startswith("GPU-"):
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        handle, bits = ctypes.c_void_p(), ctypes.c_ulonglong()
        is_known = (
            nvml.nvmlInit_v2() == 0
            and nvml.nvmlDeviceGetHandleByUUID(device_id.encode(), ctypes.byref(handle)) == 0
            and nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle, ctypes.byref(bits)) == 0
        )
    except (OSError, AttributeError):
        return None
    return {reason for bit, reason in _REASONS.items() if bits.value & bit} if is_known else None
