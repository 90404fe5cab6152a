"""Energy of timed blocks, from a counter that the device keeps itself, and its clocks beside it. No torch.

A GPU's is NVML's total energy (package nvidia-ml-py), a CPU's is RAPL as Linux shows it in /sys/class/powercap. Both
count everything that the device does, other processes and idling included: idle power is not subtracted. Readings are
taken between blocks, never during one. They follow each other without a gap, so that the energy of consecutive blocks
is one difference of the counter; a block has the moment of bookkeeping before it as well.

The counter is renewed every 1 (RAPL) to 100 ms (NVML). What it shows is that much older than the reading, so a block
next to another cell's may have up to that share of its energy from there: `resolution_share`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from moe_lab.records import fields

POWERCAP = Path("/sys/class/powercap")
BLOCK_S = 1.0
"""A block takes at least so long where energy is asked for: ten renewals of the slowest counter."""
LEAST_BLOCKS = 3  # of a cell alone
_COARSE = 0.1  # resolution_share above which a run has a warning
_LOOKED_S, _CHANGES = 0.4, 6  # how long, and for how many of its changes, a counter is watched for its resolution
_INSTALL = "nvidia-ml-py is not installed; pip install 'moe-lab[energy]'"


class State(NamedTuple):
    """A moment of a GPU; None where it does not tell, and of a CPU."""

    power_w: float | None = None
    sm_mhz: float | None = None
    memory_mhz: float | None = None
    temperature_c: float | None = None


class Lap(NamedTuple):
    """From one reading to the next."""

    seconds: float | None = None
    joules: float | None = None
    state: State = State()


class Source(Protocol):
    """A counter of energy."""

    name: str
    counts: str
    """What it counts."""

    def joules(self) -> float:
        """Since some moment; it never falls. Raises `EnergyError`."""
        ...

    def state(self) -> State:
        """Of this moment."""
        ...


class EnergyError(Exception):
    """Energy cannot be read, with the reason."""


class Nvml:
    """NVML's counter of one GPU."""

    name = "NVML total energy"
    counts = "the whole GPU with its memory"

    def __init__(self, device_id: str, nvml: Any = None):
        """`nvml` is the module `pynvml`, or what behaves like it. Raises `EnergyError`."""
        if nvml is None:
            try:
                nvml = importlib.import_module("pynvml")
            except ImportError as error:
                raise EnergyError(_INSTALL) from error
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            self._gpu = nvml.nvmlDeviceGetHandleByUUID(device_id)
        except nvml.NVMLError as error:
            raise EnergyError(f"NVML: {error}") from error
        self.joules()

    def joules(self) -> float:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)) / 1e3
        except self._nvml.NVMLError as error:
            raise EnergyError(f"NVML: total energy: {error}") from error

    def state(self) -> State:
        nvml = self._nvml
        power_mw = self._ask(nvml.nvmlDeviceGetPowerUsage)
        return State(
            None if power_mw is None else power_mw / 1e3,
            self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            self._ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        )

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> float | None:
        try:
            return float(function(self._gpu, *arguments))
        except self._nvml.NVMLError:
            return None


class Rapl:
    """RAPL of all packages of the host and of their memory, where that is counted apart. AMD's has the same names."""

    name = "RAPL"

    def __init__(self, root: Path = POWERCAP):
        """Raises `EnergyError`."""
        zones = [(zone, _text(zone / "name")) for zone in sorted(root.glob("intel-rapl:*"))]
        # `core` and `uncore` are parts of a package, `psys` holds the packages.
        self._zones = [zone for zone, name in zones if name.startswith("package") or name == "dram"]
        if not self._zones:
            raise EnergyError(f"RAPL: {root} has no package (a virtual machine, or the module intel_rapl is missing)")
        names = [name for zone, name in zones if zone in self._zones]
        self.counts = f"the whole host: {', '.join(names)}"
        self._range_uj = [self._number(zone / "max_energy_range_uj") for zone in self._zones]
        self._last_uj = [self._number(zone / "energy_uj") for zone in self._zones]
        self._sum_uj = 0

    def joules(self) -> float:
        """The counters begin again at 0 after `max_energy_range_uj`, some minutes under load: once between readings."""
        for index, zone in enumerate(self._zones):
            now = self._number(zone / "energy_uj")
            grown = now - self._last_uj[index]
            self._sum_uj += grown if grown >= 0 else grown + self._range_uj[index]
            self._last_uj[index] = now
        return self._sum_uj / 1e6

    def state(self) -> State:
        return State()

    def _number(self, path: Path) -> int:
        try:
            return int(path.read_text())
        except PermissionError as error:
            raise EnergyError(f"RAPL: {path} is readable by root only; chmod a+r it, as root") from error
        except (OSError, ValueError) as error:
            raise EnergyError(f"RAPL: {path}: {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def source_of(device_id: str) -> Source:
    """The counter of a device, named as `environment.device_id` does. Raises `EnergyError`."""
    return Nvml(device_id) if device_id.startswith("GPU-") else Rapl()


def resolution_s(source: Source, clock: Callable[[], float] = time.perf_counter) -> float | None:
    """Seconds between two changes of the counter, their median; None if it hardly changes. Raises `EnergyError`."""
    begun, before = clock(), source.joules()
    changed: list[float] = []
    while len(changed) < _CHANGES and clock() - begun < _LOOKED_S:
        if (now := source.joules()) != before:
            before = now
            changed.append(clock())
    return float(np.median(np.diff(changed))) if len(changed) > 1 else None


class Meter:
    """Reads a counter between blocks; without one every lap is unknown, and `described` says why."""

    def __init__(self, source: Source | None, reason: str | None = None):
        self._source, self._reason = source, reason
        self._at: tuple[float, float] | None = None
        self._resolution_s: float | None = None

    @classmethod
    def of(cls, device_id: str, cache: str) -> Meter:
        """Of a device. `cache` is `measure.cache`: what flushes the caches between two iterations is counted too."""
        if cache == "cold":
            return cls(None, "with measure.cache=cold the counter counts the flushes of the cache too")
        try:
            meter = cls(source := source_of(device_id))
            meter._resolution_s = resolution_s(source)
        except EnergyError as error:
            return cls(None, str(error))
        return meter

    @property
    def reads(self) -> bool:
        """Whether there is a counter."""
        return self._source is not None

    def lap(self) -> Lap:
        """What was used since the last call; unknown at the first."""
        if self._source is None:
            return Lap()
        try:
            now = time.perf_counter(), self._source.joules()
        except EnergyError as error:
            self._source, self._reason = None, str(error)
            return Lap()
        before, self._at = self._at or now, now
        return Lap(now[0] - before[0], now[1] - before[1], self._source.state())

    def described(self) -> dict[str, Any]:
        """What the record says of the counter."""
        source = self._source
        return {
            "source": source and source.name,
            "counts": source and source.counts,
            "reason": self._reason,
            "resolution_s": self._resolution_s,
        }


def summary(
    described: Mapping[str, Any],
    laps: Sequence[Lap],
    throttled: Sequence[str],
    *,
    passes: int,
    tokens: int,
    alone: bool,
) -> dict[str, Any]:
    """The record's `energy`.

    Args:
        described: of the meter.
        laps: of the blocks, in order.
        throttled: what slowed each down.
        passes: in all of them.
        tokens: of a pass.
        alone: whether they follow each other, with no other cell's and no probe between.
    """
    found: dict[str, Any] = {**dict.fromkeys(fields.names(fields.ENERGY)), **described}
    if described["reason"] is not None or not laps or any(lap.joules is None for lap in laps):
        return found | {"reason": described["reason"] or "no block was timed"}
    seconds, joules = ([getattr(lap, name) for lap in laps] for name in ("seconds", "joules"))
    total = sum(joules)
    if total <= 0:
        return found | {"reason": "the counter did not change while the blocks were timed"}
    stretch = sum(seconds) if alone else float(np.median(seconds))
    resolution = described["resolution_s"]
    found |= {
        "joules": total,
        "seconds": sum(seconds),
        "mean_power_w": total / sum(seconds),
        "j_per_iteration": total / passes,
        "j_per_token": total / passes / tokens,
        "resolution_share": None if resolution is None else resolution / stretch,
        "block_seconds": seconds,
        "block_joules": joules,
        "block_throttled": list(throttled),
    }
    for name in State._fields:
        values = [getattr(lap.state, name) for lap in laps]
        known = [value for value in values if value is not None]
        if known:
            found[f"block_{name}"] = values
            if name != "power_w":  # of the whole the counter knows it better
                found[name] = max(known) if name == "temperature_c" else float(np.median(known))
    return found


def warnings(energy: Mapping[str, Any] | None) -> list[str]:
    """A line if energy was asked for and is unknown or coarse."""
    if energy is None:
        return []
    if energy["reason"] is not None:
        return [f"energy was not measured: {energy['reason']}."]
    if (share := energy["resolution_share"]) is not None and share > _COARSE:
        return [
            f"energy is coarse: the counter is renewed every {energy['resolution_s'] * 1e3:.3g} ms, which is "
            f"{share:.0%} of what was measured without a break; raise measure.max_time_s."
        ]
    return []


def readable(device_id: str) -> dict[str, str]:
    """What can be read of this device, for people: by its name, what it is or why not."""
    try:
        source = source_of(device_id)
        step, state = resolution_s(source), source.state()
    except EnergyError as error:
        return {"energy": str(error)}
    renewed = "seldom renewed" if step is None else f"renewed every {step * 1e3:.3g} ms"
    known = [name for name, value in state._asdict().items() if value is not None]
    return {"energy": f"{source.name} ({source.counts}), {renewed}", "beside energy": ", ".join(known) or "nothing"}
