"""measure/contention.py: what else the machine did, by real processes and by planted files of the system."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moe_lab.measure import contention
from moe_lab.measure.contention import Watch, warnings
from moe_lab.measure.device_lock import DeviceLock
from moe_lab.records.fields import CONTENTION, names
from moe_lab.records.schema import BUSY

needs_proc = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat")
QUIET = {"load_average": 1.0, "other_cpu": 0.05, "steal": 0.0, "other_runs": 0, "cpu_frequency": 0.9, "throttled": ""}


def busy_for(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@needs_proc
def test_only_the_work_of_others_counts() -> None:
    """This process and those that are named are not others; a neighbour that computes all the time is."""
    spin = "while True: pass"
    neighbour = subprocess.Popen([sys.executable, "-c", spin])
    try:
        own = {}
        for name, pids in (("others", [os.getpid()]), ("own", [os.getpid(), neighbour.pid])):
            watch = Watch(DeviceLock("cpus_test"))
            watch.start(pids)
            busy_for(0.6)
            watch.stop()
            own[name] = watch.seen()["other_cpu"]
    finally:
        neighbour.kill()
        neighbour.wait()
    n_cpus = len(os.sched_getaffinity(0))
    assert own["others"] > own["own"]
    assert own["others"] - own["own"] > 0.3 / n_cpus or own["own"] > 1 - 1.5 / n_cpus  # else the machine is full


@needs_proc
def test_a_short_time_tells_nothing() -> None:
    """Ticks are 10 ms: of a block of 1 ms nothing is known, and unknown is no 0."""
    watch = Watch(DeviceLock("cpus_test"))
    watch.start([os.getpid()])
    watch.stop()
    seen = watch.seen()
    assert seen["other_cpu"] is None and seen["steal"] is None
    assert set(seen) == set(names(CONTENTION))


STAT = "cpu  0 0 0 0 0 0 0 0 0 0\n" + "".join(f"cpu{cpu} {{{cpu}}} 9 9\n" for cpu in range(3)) + "intr 1 2\n"


def test_ticks_are_of_the_cpus_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: user, nice, system, idle, iowait, irq, softirq, steal; a name with a bracket and spaces."""
    files = {
        "/proc/stat": STAT.format("1 2 4 8 16 32 64 128", "100 0 0 0 0 0 0 0", "1 1 1 1 1 1 1 1"),
        "/proc/7/stat": "7 (a) b (c) S " + " ".join(["0"] * 10) + " 3 4 5 6 0",
    }
    monkeypatch.setattr(Path, "read_text", lambda self: files[str(self)])
    assert contention._ticks([0, 2], [7]) == (255 + 8, 1 + 2 + 4 + 32 + 64 + 5, 129, 3 + 4 + 5 + 6)


def test_what_the_system_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """No /proc, no /sys, no load average, no NVML."""

    def missing(*_: Any) -> Any:
        raise OSError("not here")

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(os, "getloadavg", missing)
    watch = Watch(DeviceLock("GPU-0"))
    watch.start([os.getpid()])
    watch.stop()
    assert watch.seen() == dict.fromkeys(names(CONTENTION))
    assert warnings(watch.seen()) == [] and warnings(None) == []


def test_throttling_between_start_and_stop_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was counted meanwhile; the frequency is the lowest that was seen."""
    counter = tmp_path / "cpu0/thermal_throttle/core_throttle_count"
    clock = tmp_path / "cpu0/cpufreq/scaling_cur_freq"
    for path, text in ((counter, "5"), (clock, "3000"), (clock.with_name("cpuinfo_max_freq"), "4000")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(contention, "_CPU", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    seen = []
    for count, frequency in (("5", "2000"), ("6", "3000")):
        watch = Watch(DeviceLock("cpus_test"))
        watch.start([os.getpid()])
        clock.write_text(frequency)
        watch.look()
        counter.write_text(count)
        clock.write_text("4000")
        watch.stop()
        seen.append(watch.seen())
    assert ["CPU temperature" in one["throttled"] for one in seen] == [False, True]
    assert [one["cpu_frequency"] for one in seen] == [0.5, 0.75]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({}, None, id="quiet"),
        pytest.param(dict.fromkeys(QUIET), None, id="unknown"),
        pytest.param({"other_runs": 1}, "1 other run on this device (sweep.wait=true waits for them)", id="one_run"),
        pytest.param({"other_runs": 2}, "2 other runs on this device", id="two_runs"),
        pytest.param({"other_cpu": 0.48}, "other processes used 48% of the CPUs", id="others"),
        pytest.param({"load_average": 3.14}, "the load average was 3.1 for each CPU", id="load"),
        pytest.param({"steal": 0.25}, "the hypervisor took 25% of the CPUs", id="steal"),
        pytest.param({"throttled": "CPU quota"}, "throttled by CPU quota", id="throttled"),
        pytest.param({"cpu_frequency": 0.2}, None, id="a_low_clock_is_only_recorded"),
    ],
)
def test_a_busy_machine_is_one_line(change: dict[str, Any], words: str | None) -> None:
    """By each of its signs."""
    lines = warnings({**QUIET, **change})
    assert len(lines) == (words is not None)
    assert all(line.startswith(BUSY) and str(words) in line and "\n" not in line for line in lines)


def test_all_signs_stand_in_one_line() -> None:
    """In the order of what can be done about them."""
    (line,) = warnings({**QUIET, "other_runs": 1, "other_cpu": 0.5, "load_average": 2.0, "steal": 0.1})
    assert line.count("; ") == 3 and line.endswith("Latencies may be too long.")
