"""measure/memory.py: the peak of one iteration."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe_lab.measure import memory
from moe_lab.measure.clocks import Step
from moe_lab.models import Output
from tests import tiny

MB = 1_000_000
needs_high_water_mark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK) or memory.resident_peak_bytes() is None,
    reason="this kernel does not reset the resident high-water mark",
)


class Hungry(nn.Module):
    """Takes `megabytes` for a moment in each forward pass and gives them back before it returns."""

    def __init__(self, megabytes: int):
        super().__init__()
        self.megabytes = megabytes

    def forward(self, x: Tensor) -> Output:
        taken = torch.ones(self.megabytes * MB // 4, device=x.device)
        y = x + taken[:1]
        del taken
        return Output(y)


@needs_high_water_mark
def test_200_mb_taken_and_given_back_within_the_step_stand_in_the_peak() -> None:
    """The peak is seen although nothing is left of it after the step."""
    quiet = memory.peak_bytes(Step(Hungry(1), torch.zeros(1)))
    hungry = memory.peak_bytes(Step(Hungry(200), torch.zeros(1)))
    assert quiet is not None and hungry is not None
    assert 190 * MB < hungry - quiet < 230 * MB


@needs_high_water_mark
def test_the_peak_of_one_step_does_not_stand_in_the_next() -> None:
    """The high-water mark is reset before each look."""
    hungry = memory.peak_bytes(Step(Hungry(200), torch.zeros(1)))
    quiet = memory.peak_bytes(Step(Hungry(1), torch.zeros(1)))
    assert hungry is not None and quiet is not None
    assert hungry - quiet > 150 * MB


def test_a_peak_that_cannot_be_known_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the kernel has no such file (or does not let us write it) nothing is guessed."""
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "no folder" / "clear_refs")
    assert memory.peak_bytes(Step(Hungry(1), torch.zeros(1))) is None


@needs_high_water_mark
def test_a_run_records_more_at_its_peak_than_its_parameters_take() -> None:
    """memory.peak_mb is of the process on a CPU, so it holds at least the model."""
    run = tiny.built(tiny.decoder_moe())
    run.verify()
    recorded = run.record().memory
    assert recorded is not None and recorded["peak_mb"] is not None and recorded["parameters_mb"] is not None
    assert recorded["peak_mb"] > recorded["parameters_mb"] > 0


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="this system has no /proc/meminfo")
def test_available_is_what_the_process_has_and_what_is_free() -> None:
    """The 800 MB that it holds count as well, and together it is no more than the machine has."""
    taken = torch.ones(800 * MB // 4)
    available = memory.available_bytes(torch.device("cpu"))
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    assert available is not None
    assert free + taken.nbytes / 2 < available <= total  # others on the machine take and give meanwhile


def test_memory_that_is_not_told_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file, or no such line in it."""
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert memory.available_bytes(torch.device("cpu")) is None
    (tmp_path / "status").write_text("Name: python\n")
    assert memory.available_bytes(torch.device("cpu")) is None
    assert memory.resident_peak_bytes() is None
    (tmp_path / "status").write_text("VmHWM:\t  3 kB\n")
    assert memory.resident_peak_bytes() == 3 * 1024


@pytest.mark.parametrize(
    ("lines", "files", "limit"),
    [
        pytest.param("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "3000"}, 3000, id="v2_above"),
        pytest.param("0::/a/b", {"a/b/memory.max": "2000", "a/memory.max": "3000"}, 2000, id="v2_own"),
        pytest.param("0::/a", {"memory.max": "4000"}, 4000, id="v2_in_a_container"),
        pytest.param("4:memory:/a", {"memory/a/memory.limit_in_bytes": "5000"}, 5000, id="v1"),
        pytest.param("4:memory:/x/y", {"memory/memory.limit_in_bytes": "6000"}, 6000, id="v1_in_a_container"),
        pytest.param(
            "4:memory:/a\n0::/",
            {"memory/a/memory.limit_in_bytes": "9223372036854771712", "memory.max": "7000"},
            7000,
            id="both",
        ),
        pytest.param("3:cpu:/a\n0::/a", {"cpu/a/memory.max": "1", "a/memory.max": "max"}, None, id="none"),
    ],
)
def test_the_limit_of_a_control_group_counts(
    lines: str, files: dict[str, str], limit: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The smallest of its own and of those above, in both versions."""
    (tmp_path / "cgroup").write_text(lines + "\n")
    for name, content in files.items():
        (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / name).write_text(content + "\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "sys")
    available = memory.available_bytes(torch.device("cpu"))
    assert available is not None and (available == limit if limit else available > 100 * MB)


@pytest.mark.parametrize(
    "limit", [pytest.param("AS", id="AS"), pytest.param("DATA", id="DATA", marks=pytest.mark.slow)]
)
def test_the_limit_of_the_process_counts(limit: str) -> None:
    """As `ulimit` sets it: with 2 GB more than it takes now, no more than that and what is resident."""
    code = (
        "import resource, sys, torch\n"
        "from moe_lab.measure import memory\n"
        "field = {'AS': 'VmSize:', 'DATA': 'VmData:'}[sys.argv[1]]\n"
        "most = memory._kilobytes(memory._STATUS, field) + 2 * 10**9\n"
        "resource.setrlimit(getattr(resource, 'RLIMIT_' + sys.argv[1]), (most, most))\n"
        "print(memory.available_bytes(torch.device('cpu')) - memory._kilobytes(memory._STATUS, 'VmRSS:'))\n"
    )
    assert 1.9e9 < int(tiny.python(code, limit)) < 2.1e9


@pytest.mark.gpu
def test_200_mb_taken_within_the_step_stand_in_the_allocators_peak() -> None:
    """On CUDA the allocator counts, so the difference is exact to its rounding."""
    x = torch.zeros(1, device="cuda")
    quiet, hungry = (memory.peak_bytes(Step(Hungry(size), x)) for size in (1, 200))
    assert quiet is not None and hungry is not None
    assert abs(hungry - quiet - 199 * MB) < 4 * MB


@pytest.mark.gpu
def test_available_on_cuda_is_what_is_free_and_what_the_allocator_holds() -> None:
    """Taking and giving back changes it by less than it took."""
    device = torch.device("cuda", torch.cuda.current_device())
    before = memory.available_bytes(device)
    taken = torch.ones(200 * MB // 4, device=device)
    after = memory.available_bytes(device)
    assert before is not None and after is not None
    assert abs(after - before) < 100 * MB < taken.nbytes
    assert after <= torch.cuda.get_device_properties(device).total_memory
