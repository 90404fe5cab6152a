"""Slots: one device and some CPUs of one machine, for one group at a time. Imports no torch.

What a slot has is claimed by locked files, so that no two slots of this user share a CPU or a GPU, whatever started
them: another sweep, or a second node of a cluster on the same machine. The kernel releases the claims of a process that
died.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from moe_lab.errors import UnavailableError
from moe_lab.measure.device_lock import folder_of

_CPUS = Path("/sys/devices/system/cpu")
_NVIDIA = Path("/proc/driver/nvidia/gpus")
VISIBLE = "CUDA_VISIBLE_DEVICES"
_SOON_S = 10.0  # of a driver that was killed the slots end in about a second


@dataclass(frozen=True)
class Slot:
    """Where one group at a time runs."""

    name: str
    node: str
    device: str
    """`cpu` or `cuda`."""
    n_cpus: int
    gpu: str | None = None
    """What `CUDA_VISIBLE_DEVICES` is to be there: nothing for a slot without a GPU; None: as the node sets it."""
    n_on_node: int = 1
    """How many slots of the sweep share the memory of the node."""


class Claim:
    """The CPUs and the GPU of a slot, until `release` or the end of the process."""

    def __init__(self, slot: Slot):
        """Take them. Raises `UnavailableError` if there are not enough that are free, or get free soon."""
        self.cpus: tuple[int, ...] = ()
        self._descriptors: list[int] = []
        folder = folder_of("claims")
        if folder is None:
            raise UnavailableError(
                f"sweep.slots: {slot.name} cannot claim its CPUs; set XDG_RUNTIME_DIR to a folder of your own."
            )
        ends_at = time.monotonic() + _SOON_S
        while missing := self._try(slot, folder):
            self.release()
            if time.monotonic() > ends_at:
                raise UnavailableError(
                    f"sweep.slots: {slot.name} needs {missing}, and other slots on {slot.node} have them; wait for "
                    "their sweep, or use fewer slots or a smaller sweep.slots.cpus_each."
                )
            time.sleep(0.2)

    def _try(self, slot: Slot, folder: Path) -> str:
        """Take what the slot needs, as far as it is free; what is not."""
        turn = os.open(folder / "turn", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(turn, fcntl.LOCK_EX)  # one after the other: else two slots take each half of what both need
            free = (cpu for cpu in by_core(usable_cpus()) if self._take(folder / f"cpu-{cpu}"))
            self.cpus = tuple(sorted(islice(free, slot.n_cpus)))
            if len(self.cpus) < slot.n_cpus:
                return f"{slot.n_cpus} free CPUs"
            if slot.gpu and not self._take(folder / f"gpu-{slot.gpu}"):
                return f"GPU {slot.gpu}"
            return ""
        finally:
            os.close(turn)

    def _take(self, path: Path) -> bool:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptors.append(descriptor)
        return True

    def pin(self) -> None:
        """Let this thread, and the processes that it starts, run on these CPUs only."""
        os.sched_setaffinity(0, self.cpus)

    def release(self) -> None:
        """Give them free."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def usable_cpus() -> list[int]:
    """The CPUs that this process may use. Raises `UnavailableError` where the system cannot pin."""
    if not hasattr(os, "sched_getaffinity"):
        raise UnavailableError("sweep.slots: this system cannot pin processes to CPUs; leave sweep.slots out.")
    return sorted(os.sched_getaffinity(0))


def by_core(cpus: Iterable[int]) -> list[int]:
    """Packages one after the other, and the threads of one core beside each other: a slot is to have whole cores."""

    def place(cpu: int) -> tuple[int, int, int]:
        with suppress(OSError, ValueError):
            topology = _CPUS / f"cpu{cpu}" / "topology"
            package = int((topology / "physical_package_id").read_text())
            core = int((topology / "thread_siblings_list").read_text().replace(",", "-").split("-")[0])
            return package, core, cpu
        return 0, cpu, cpu

    return sorted(cpus, key=place)


def gpus_here() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls each GPU of this machine: as that variable lists them, else by number."""
    given = os.environ.get(VISIBLE)
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(number) for number, _ in enumerate(_NVIDIA.iterdir())] if _NVIDIA.is_dir() else []


def cpus_each(wanted: int | None, n_cpus: int, n_slots: int, node: str) -> int:
    """The CPUs of each of the slots of a node. Raises `UnavailableError` if it has too few."""
    each = wanted or n_cpus // n_slots
    if not each or each * n_slots > n_cpus:
        keys = "sweep.slots.cpus_each" if wanted else "sweep.slots"
        needs = f"{n_slots} slots of {wanted}" if wanted else f"{n_slots} slots"
        raise UnavailableError(f"{keys}: {node} has {n_cpus} CPUs, too few for {needs}; use fewer slots.")
    return each


def slots_here(wanted: Mapping[str, Any], node: str) -> list[Slot]:
    """The slots of this machine that `sweep.slots` asks for. Raises `UnavailableError` if it has too few devices."""
    n_cpu, n_cuda = wanted["cpu"] or 0, wanted["cuda"] or 0
    gpus = gpus_here()
    if n_cuda > len(gpus):
        raise UnavailableError(
            f"sweep.slots.cuda={n_cuda}: {node} has {len(gpus)} GPUs that moe-lab may use ({VISIBLE}); use fewer slots."
        )
    n = n_cpu + n_cuda
    each = cpus_each(wanted["cpus_each"], len(usable_cpus()), n, node)
    of_gpus = [Slot(f"{node}-gpu{number}", node, "cuda", each, gpus[number], n) for number in range(n_cuda)]
    return [*of_gpus, *(Slot(f"{node}-cpu{number}", node, "cpu", each, "", n) for number in range(n_cpu))]
