"""sweep/slots.py: what a slot has, and that nobody else has it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moe_lab.errors import UnavailableError
from moe_lab.sweep import slots
from moe_lab.sweep.slots import Claim, Slot, by_core, cpus_each, gpus_here, slots_here, usable_cpus
from tests import tiny

N = len(usable_cpus())
needs_two = pytest.mark.skipif(N < 2, reason="one CPU")


@pytest.fixture(autouse=True)
def _claims_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests have slots at the same time; nobody waits here."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setattr(slots, "_SOON_S", 0)


def slot(n_cpus: int = 1, gpu: str | None = "", name: str = "here-cpu0") -> Slot:
    return Slot(name, "here", "cuda" if gpu else "cpu", n_cpus, gpu)


@needs_two
def test_no_two_slots_share_a_cpu_until_one_is_released() -> None:
    """The third of two CPUs is refused with what to do, and gets the one that was given free."""
    claims = [Claim(slot()) for _ in range(N)]
    assert sorted(cpu for claim in claims for cpu in claim.cpus) == usable_cpus()
    with pytest.raises(UnavailableError, match=r"sweep.slots: late needs 1 free CPUs, .* on here .*; wait for"):
        Claim(slot(name="late"))
    free = claims[1].cpus
    claims[1].release()
    last = Claim(slot())
    assert last.cpus == free
    for claim in (claims[0], *claims[2:], last):
        claim.release()


def test_what_cannot_be_had_whole_is_not_taken_in_part() -> None:
    """One CPU too many: all of them are free afterwards."""
    with pytest.raises(UnavailableError, match=f"needs {N + 1} free CPUs"):
        Claim(slot(N + 1))
    Claim(slot(N)).release()


@needs_two
def test_a_gpu_has_one_slot() -> None:
    """A second slot of the same GPU is refused, and one of another is not."""
    first = Claim(slot(gpu="3"))
    with pytest.raises(UnavailableError, match="needs GPU 3, "):
        Claim(slot(gpu="3"))
    second = Claim(slot(gpu="4"))
    first.release()
    second.release()


def test_the_claims_of_a_process_that_was_killed_are_free() -> None:
    """As after kill -9 of a driver."""
    code = "from tests.sweep.test_slots import *; Claim(slot(N)); print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes, cwd=tiny.ROOT)  # type: ignore[call-overload]
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(UnavailableError):
        Claim(slot())
    process.kill()
    process.wait()
    process.stdout.close()
    assert process.stdin is not None
    process.stdin.close()
    Claim(slot(N)).release()


@needs_two
def test_only_the_thread_that_is_pinned_is(tmp_path: Path) -> None:
    """And the processes that it starts."""
    claim = Claim(slot())
    seen: list[set[int]] = []

    def pinned() -> None:
        claim.pin()
        code = "import os; print(*os.sched_getaffinity(0))"
        words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        seen.extend([os.sched_getaffinity(0), set(map(int, words))])

    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join()
    assert seen == [set(claim.cpus)] * 2
    assert sorted(os.sched_getaffinity(0)) == usable_cpus()
    claim.release()


def test_the_threads_of_a_core_stand_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages of two cores of two threads, numbered as Linux does; without a topology, by number."""
    for cpu in range(8):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        core = cpu % 4
        (topology / "physical_package_id").write_text(f"{core // 2}\n")
        (topology / "thread_siblings_list").write_text(f"{core},{core + 4}\n")
    monkeypatch.setattr(slots, "_CPUS", tmp_path)
    assert by_core(range(8)) == [0, 4, 1, 5, 2, 6, 3, 7]
    monkeypatch.setattr(slots, "_CPUS", tmp_path / "nowhere")
    assert by_core([3, 1, 2]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("wanted", "n_cpus", "n_slots", "each"),
    [
        pytest.param(None, 64, 8, 8, id="shared-equally"),
        pytest.param(None, 65, 8, 8, id="rounded-down"),
        pytest.param(4, 64, 8, 4, id="as-asked-for"),
    ],
)
def test_the_cpus_of_a_node_are_shared(wanted: int | None, n_cpus: int, n_slots: int, each: int) -> None:
    """Equally, or as many as `sweep.slots.cpus_each` says."""
    assert cpus_each(wanted, n_cpus, n_slots, "n") == each


def test_slots_that_a_machine_has_not_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key, what there is, and the remedy."""
    with pytest.raises(UnavailableError, match=f"sweep.slots: n has {N} CPUs, too few for {N + 1} slots; use fewer"):
        slots_here({"cpu": N + 1, "cuda": None, "cpus_each": None}, "n")
    with pytest.raises(
        UnavailableError, match=f"sweep.slots.cpus_each: n has {N} CPUs, too few for 1 slots of {N + 1}"
    ):
        slots_here({"cpu": 1, "cuda": None, "cpus_each": N + 1}, "n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UnavailableError, match=r"sweep.slots.cuda=1: n has 0 GPUs .*CUDA_VISIBLE_DEVICES"):
        slots_here({"cpu": None, "cuda": 1, "cpus_each": None}, "n")


@needs_two
def test_a_list_of_gpus_by_hand_is_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slot sees its own; one without a GPU sees none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,5")
    assert gpus_here() == ["GPU-a", "5"]
    found = slots_here({"cpu": 1, "cuda": 1, "cpus_each": 1}, "n")
    assert found == [Slot("n-gpu0", "n", "cuda", 1, "GPU-a", 2), Slot("n-cpu0", "n", "cpu", 1, "", 2)]
