"""What else the machine did while something was timed: its load, other processes, other runs, throttling. No torch.

Where the system does not tell, a value is None.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.measure.device_lock import DeviceLock
from moe_lab.records.schema import BUSY

_CPU, _CGROUP = Path("/sys/devices/system/cpu"), Path("/sys/fs/cgroup")
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
# NVML's policies whose violations it counts in ns (nvml.h), for a GPU that waits for the host's look may be idle.
_POLICIES = {0: "GPU power cap", 1: "GPU temperature"}
_VIOLATED = 0.1  # share of the time; a shorter one is the moment in which a kernel begins


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
        self._begun: tuple[_Ticks | None, tuple[int, ...]] | None = None
        self._counts: tuple[float, dict[str, int], dict[str, int]] | None = None
        self._throttled: set[str] | None = None
        self._other_runs: int | None = None
        self._frequency: float | None = None

    def start(self, pids: Iterable[int]) -> None:
        """Begin; the work of these processes is not others'."""
        pids = tuple(dict.fromkeys(pids))
        self._counts = None  # what was counted before is not of what is timed now
        self.look()
        self._begun = _ticks(self._cpus, pids), pids

    def look(self) -> set[str]:
        """Note what can be seen now. Returns what has slowed the machine down since the last look."""
        if (others := self.lock.others()) is not None:
            self._other_runs = max(self._other_runs or 0, others)
        if (frequency := _frequency(self._cpus)) is not None:
            self._frequency = min(frequency, self._frequency or frequency)
        reasons = self._throttling()
        if reasons is not None:
            self._throttled = (self._throttled or set()) | reasons
        return reasons or set()

    def _throttling(self) -> set[str] | None:
        """None if nothing of it can be read."""
        now, gpu = time.perf_counter(), _gpu_reasons(self.lock.device_id)
        counts, violations = _throttle_counts(self._cpus), _gpu_violations(self.lock.device_id)
        then, counts_then, violations_then = self._counts or (now, counts, violations)
        self._counts = now, counts, violations
        if gpu is None and not counts and not violations:
            return None
        found = {reason for reason, count in counts.items() if count > counts_then.get(reason, count)}
        least_ns = _VIOLATED * (now - then) * 1e9
        found |= {why for why, ns in violations.items() if ns - violations_then.get(why, ns) > least_ns}
        return found | (gpu or set())

    def forget(self, reasons: Iterable[str]) -> None:
        """Of a block that is timed again."""
        self._throttled = (self._throttled or set()).difference(reasons)

    def stop(self) -> None:
        """End, and add to what was seen before."""
        assert self._begun is not None, "call start first"
        self.look()
        ticks, pids = self._begun
        if ticks is not None and (now := _ticks(self._cpus, pids)) is not None:
            self._ticks.append((ticks, now))
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
    for path in (_CGROUP / group.strip("/") / "cpu.stat", _CGROUP / "cpu.stat", _CGROUP / "cpu" / "cpu.stat"):
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
    bits = ctypes.c_ulonglong()
    if not _nvml(device_id, "nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.byref(bits)):
        return None
    return {reason for bit, reason in _REASONS.items() if bits.value & bit}


class _Violation(ctypes.Structure):
    _fields_ = (("reference_us", ctypes.c_ulonglong), ("violated_ns", ctypes.c_ulonglong))


def _gpu_violations(device_id: str) -> dict[str, int]:
    """How long NVML has slowed this GPU down so far, in ns by reason; without what it does not count."""
    found, time_ = {}, _Violation()
    for policy, reason in _POLICIES.items():
        if _nvml(device_id, "nvmlDeviceGetViolationStatus", policy, ctypes.byref(time_)):
            found[reason] = int(time_.violated_ns)
    return found


def _nvml(device_id: str, function: str, *arguments: Any) -> bool:
    """Whether this function of NVML's filled its arguments; no package is needed for it."""
    if not device_id.startswith("GPU-"):
        return False
    handle = ctypes.c_void_p()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        return bool(
            nvml.nvmlInit_v2() == 0
            and nvml.nvmlDeviceGetHandleByUUID(device_id.encode(), ctypes.byref(handle)) == 0
            and getattr(nvml, function)(handle, *arguments) == 0
        )
    except (OSError, AttributeError):
        return False


def readable_reasons(device_id: str) -> list[str]:
    """What slows the machine down and can be read here, for people."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    reasons = set(_throttle_counts(cpus)) | set(_gpu_violations(device_id))
    if _gpu_reasons(device_id) is not None:
        reasons |= set(_REASONS.values())
    return sorted(reasons)
