"""measure/energy.py: planted files of the system, and recorded readings of NVML."""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_lab
from benchmarks import energy_profiles
from moe_lab.measure import contention, energy, environment
from moe_lab.measure.energy import EnergyError, Lap, Meter, Nvml, Rapl, State, resolution_s, summary, warnings
from moe_lab.records.fields import ENERGY, names
from tests import quick


class Played:
    """The functions of `pynvml` that are used, with recorded readings; an exception among them is raised."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(
        self, millijoules: Iterable[Any], clocks: Any = (1980, 3201), power_mw: Any = 512_345, celsius: Any = 61
    ):
        self._millijoules: Iterator[Any] = iter(millijoules)
        self._clocks, self._power_mw, self._celsius = clocks, power_mw, celsius

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return self._or_raise(uuid if uuid == "GPU-a" else self.NVMLError("Not Found"))

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: str) -> Any:  # noqa: N802
        return self._or_raise(next(self._millijoules))

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> Any:  # noqa: N802
        return self._or_raise(self._power_mw)

    def nvmlDeviceGetClockInfo(self, gpu: str, kind: int) -> Any:  # noqa: N802
        return self._or_raise(self._clocks[kind - 1])

    def nvmlDeviceGetTemperature(self, gpu: str, sensor: int) -> Any:  # noqa: N802
        return self._or_raise(self._celsius)

    def _or_raise(self, value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value


def zone(root: Path, path: str, name: str, uj: int, range_uj: int = 1000) -> Path:
    """A zone of powercap; returns the file with its counter."""
    folder = root / path
    folder.mkdir(parents=True)
    for file, content in (("name", name), ("energy_uj", uj), ("max_energy_range_uj", range_uj)):
        (folder / file).write_text(f"{content}\n")
    return folder / "energy_uj"


@pytest.fixture
def two_packages(tmp_path: Path) -> dict[str, Path]:
    """What Linux shows: two packages, parts of one, its memory, and the platform that holds them all."""
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys",
    }
    return {name: zone(tmp_path, path, name, 100) for path, name in zones.items()}


def test_rapl_is_the_sum_of_packages_and_memory(two_packages: dict[str, Path], tmp_path: Path) -> None:
    """Cores are in their package, and the platform has the packages: neither is counted again."""
    rapl = Rapl(tmp_path)
    assert rapl.counts == "the whole host: package-0, dram, package-1"
    for file, uj in zip(two_packages.values(), (110, 500, 103, 105, 900), strict=True):
        file.write_text(str(uj))
    assert rapl.joules() == pytest.approx(18e-6)
    assert rapl.joules() == pytest.approx(18e-6)
    assert rapl.state() == State()


@settings(max_examples=20)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=8))
def test_a_counter_that_begins_again_is_counted_on(used_uj: list[int]) -> None:
    """At most once between two readings: of a range of 1000 uJ any sequence of smaller amounts comes back."""
    with tempfile.TemporaryDirectory() as folder:
        counter = zone(Path(folder), "intel-rapl:0", "package-0", 990)
        rapl, total = Rapl(Path(folder)), 990
        for uj in used_uj:
            total += uj
            counter.write_text(str(total % 1000))
            assert rapl.joules() == pytest.approx((total - 990) / 1e6)


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        pytest.param(lambda root: None, "has no package", id="no_powercap"),
        pytest.param(lambda root: zone(root, "intel-rapl:0", "psys", 1), "has no package", id="only_the_platform"),
        pytest.param(
            lambda root: zone(root, "intel-rapl:0", "package-0", 1).write_text("x"), "energy_uj", id="no_number"
        ),
        pytest.param(lambda root: zone(root, "intel-rapl:0", "package-0", 1).unlink(), "energy_uj", id="no_counter"),
    ],
)
def test_a_host_without_rapl_says_why(plant: Any, reason: str, tmp_path: Path) -> None:
    """And a counter that root alone may read says what to do."""
    plant(tmp_path)
    with pytest.raises(EnergyError, match=reason):
        Rapl(tmp_path)


def test_a_counter_of_root_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux has it since 5.10; the tests may run as root, who can read it."""
    counter, read = zone(tmp_path, "intel-rapl:0", "package-0", 1), Path.read_text

    def refused(self: Path, *arguments: Any) -> str:
        if self == counter:
            raise PermissionError(13, "Permission denied")
        return read(self, *arguments)

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(EnergyError, match="readable by root only; chmod"):
        Rapl(tmp_path)


def test_nvml_counts_in_millijoules() -> None:
    """With the state of the GPU beside it."""
    gpu = Nvml("GPU-a", Played([1_000, 2_500]))
    assert gpu.joules() == 2.5
    assert gpu.state() == State(512.345, 1980, 3201, 61)


def test_what_a_gpu_does_not_tell_is_none() -> None:
    """Each by itself."""
    error = Played.NVMLError("Not Supported")
    assert Nvml("GPU-a", Played([1], (error, 3201), error, 40)).state() == State(None, None, 3201, 40)


@pytest.mark.parametrize(
    ("device_id", "readings", "reason"),
    [
        pytest.param("GPU-b", [1], "Not Found", id="other_gpu"),
        pytest.param("GPU-a", [Played.NVMLError("Not Supported")], "total energy: Not Supported", id="no_counter"),
    ],
)
def test_a_gpu_without_a_counter_says_why(device_id: str, readings: list[Any], reason: str) -> None:
    """When it is opened, not in the middle of a run."""
    with pytest.raises(EnergyError, match=f"NVML: .*{reason}"):
        Nvml(device_id, Played(readings))


def test_laps_follow_each_other_without_a_gap(tmp_path: Path) -> None:
    """Their sums are the difference of the first and the last reading, in seconds and in joules."""
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0, 10**9)
    meter, used = Meter(Rapl(tmp_path)), (3_000_000, 0, 5_000_000)
    begun = time.perf_counter()
    assert meter.lap().joules == 0  # what came before is nobody's
    laps = []
    for total in itertools.accumulate(used):
        counter.write_text(str(total))
        laps.append(meter.lap())
    assert [lap.joules for lap in laps] == [3.0, 0.0, 5.0]
    assert 0 < sum(lap.seconds or 0 for lap in laps) <= time.perf_counter() - begun


def test_a_counter_that_fails_in_the_middle_leaves_no_half_of_an_energy() -> None:
    """The record has the reason, and no number."""
    meter = Meter(Nvml("GPU-a", Played([1, 1_000, 2_000, Played.NVMLError("GPU is lost")])))
    laps = [meter.lap() for _ in range(3)][1:]
    assert [lap.joules for lap in laps] == [1.0, None]
    found = summary(meter.described(), laps, ["", ""], passes=4, tokens=2, alone=True)
    assert found["reason"] == "NVML: total energy: GPU is lost"
    assert {value for name, value in found.items() if name != "reason"} == {None}
    assert warnings(found) == ["energy was not measured: NVML: total energy: GPU is lost."]


def test_the_resolution_is_the_time_between_two_changes() -> None:
    """Read every 10 ms, a counter that changes with every fourth reading is renewed every 40 ms; or never."""
    readings: list[int] = []

    def changing(every: int) -> Iterator[int]:
        for number in itertools.count():
            readings.append(number)
            yield number // every

    def clock() -> float:
        return 0.01 * len(readings)

    assert resolution_s(Nvml("GPU-a", Played(changing(4))), clock) == pytest.approx(0.04)
    assert resolution_s(Nvml("GPU-a", Played(changing(10**9))), clock) is None


LAPS = [
    Lap(2.0, 900.0, State(450.0, 1900.0, 3201.0, 50.0)),
    Lap(1.0, 600.0, State(600.0, 1700.0, 3201.0, 60.0)),
    Lap(1.0, 500.0, State(500.0, 1800.0, None, 55.0)),
]
COUNTER = {"source": "NVML total energy", "counts": "the whole GPU", "reason": None, "resolution_s": 0.1}


def test_a_summary_by_hand() -> None:
    """2000 J in 4 s of 50 passes of 8 tokens."""
    found = summary(COUNTER, LAPS, ["", "GPU power cap", ""], passes=50, tokens=8, alone=True)
    assert set(found) == set(names(ENERGY))
    expected = {
        "joules": 2000,
        "seconds": 4,
        "mean_power_w": 500,
        "j_per_iteration": 40,
        "j_per_token": 5,
        "resolution_share": 0.025,
        "sm_mhz": 1800,
        "memory_mhz": 3201,
        "temperature_c": 60,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["block_joules"] == [900, 600, 500] and found["block_throttled"] == ["", "GPU power cap", ""]
    assert found["block_memory_mhz"] == [3201, 3201, None]
    assert warnings(found) == []


def test_among_other_cells_a_block_is_the_stretch() -> None:
    """The whole is four seconds, but another cell's blocks lie between."""
    found = summary({**COUNTER, "resolution_s": 0.2}, LAPS, [""] * 3, passes=1, tokens=1, alone=False)
    assert found["resolution_share"] == pytest.approx(0.2)
    (line,) = warnings(found)
    assert "every 200 ms, which is 20%" in line and "measure.max_time_s" in line


@pytest.mark.parametrize(
    ("described", "laps", "reason"),
    [
        pytest.param({**COUNTER, "reason": "no RAPL"}, [Lap()], "no RAPL", id="no_counter"),
        pytest.param(COUNTER, [], "no block was timed", id="no_block"),
        pytest.param(
            COUNTER, [Lap(1.0, 0.0)], "the counter did not change while the blocks were timed", id="stuck_counter"
        ),
    ],
)
def test_absent_energy_is_null_with_the_reason(described: dict[str, Any], laps: list[Lap], reason: str) -> None:
    """Never 0."""
    found = summary(described, laps, [""] * len(laps), passes=1, tokens=1, alone=True)
    assert found["reason"] == reason and 0 not in found.values() and found["j_per_token"] is None


def test_flushes_of_the_cache_are_no_energy_of_a_run() -> None:
    """They would be most of it."""
    assert "flushes" in Meter.of("GPU-a", "cold").described()["reason"]


def test_a_run_counts_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of 100 W, by a file that a thread renews: power times time, per token and per block."""
    counter = zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 0, 10**12)
    ended, begun = threading.Event(), time.perf_counter()

    def renew() -> None:
        while not ended.wait(0.002):
            fresh = counter.with_name("fresh")
            fresh.write_text(str(int((time.perf_counter() - begun) * 100e6)))
            fresh.replace(counter)

    thread = threading.Thread(target=renew)
    thread.start()
    monkeypatch.setattr(energy, "source_of", lambda device_id: Rapl(tmp_path / "powercap"))
    try:
        cfg = quick.compose("minimal", "measure.energy=true", "measure.max_time_s=0.4", "measure.target_ci=1e-9")
        record = moe_lab.run(cfg, tmp_path / "run")
    finally:
        ended.set()
        thread.join()
    found, latency = record.energy, record.latency_ms
    assert found is not None and latency is not None and found["reason"] is None
    assert found["mean_power_w"] == pytest.approx(100, rel=0.1)
    assert found["joules"] == pytest.approx(sum(found["block_joules"]))
    assert found["seconds"] >= latency.n * latency.mean / 1e3
    assert found["j_per_iteration"] == pytest.approx(found["joules"] / latency.n)
    assert found["j_per_token"] == pytest.approx(found["j_per_iteration"] / 2)
    assert found["sm_mhz"] is None and found["block_sm_mhz"] is None
    plain = moe_lab.run(quick.compose("minimal"), tmp_path / "plain")
    assert plain.energy is None and (plain.cell_id, plain.env_id) == (record.cell_id, record.env_id)


def test_doctor_says_what_is_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or why it is not."""
    monkeypatch.setattr(energy, "source_of", lambda device_id: Rapl(tmp_path))
    assert "has no package" in energy.readable("cpus_0-1")["energy"]
    changing = Nvml("GPU-a", Played(itertools.count(0, 1000)))
    monkeypatch.setattr(energy, "source_of", lambda device_id: changing)
    said = energy.readable("GPU-a")
    assert said["energy"].startswith("NVML total energy (the whole GPU with its memory), renewed every")
    assert said["beside energy"] == "power_w, sm_mhz, memory_mhz, temperature_c"


@pytest.mark.gpu
@pytest.mark.slow
def test_the_energy_of_a_long_run_is_power_times_time(tmp_path: Path) -> None:
    """Within 5 %, of power that a thread sampled meanwhile; the state of the GPU stands with every block."""
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed (pip install 'moe-lab[energy]')")
    record, over_power = energy_profiles.energy_beside_power(tmp_path, 10)
    assert over_power == pytest.approx(1, rel=0.05)
    assert record.energy is not None and None not in record.energy["block_sm_mhz"]


@pytest.mark.gpu
def test_throttle_reasons_of_a_gpu_are_readable() -> None:
    """All that NVML names."""
    device_id = environment.device_id(torch.device("cuda"))
    assert {"GPU power cap", "GPU temperature"} <= set(contention.readable_reasons(device_id))
