"""The slots of a cluster, dealt out to its nodes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_lab.errors import UnavailableError
from moe_lab.sweep.slots import Slot, cpus_each


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    id: str
    name: str
    n_cpus: int
    n_gpus: int


def slots_of(nodes: Sequence[Node], wanted: Mapping[str, Any]) -> dict[Slot, Node]:
    """The slots that `sweep.slots` asks for, dealt out to the nodes in turn.

    Without a number every GPU is one, or without GPUs every node.

    Raises:
        UnavailableError: the cluster has too few devices.
    """
    n_cpu, n_cuda = wanted["cpu"], wanted["cuda"]
    n_gpus = sum(node.n_gpus for node in nodes)
    if n_cpu is None and n_cuda is None:
        n_cuda, n_cpu = (n_gpus, 0) if n_gpus else (0, len(nodes))
    n_cpu, n_cuda = n_cpu or 0, n_cuda or 0
    if n_cuda > n_gpus:
        raise UnavailableError(f"sweep.slots.cuda={n_cuda}: the cluster has {n_gpus} GPUs; use fewer slots.")
    each = wanted["cpus_each"] or 1
    gpus = _dealt({node: min(node.n_gpus, node.n_cpus // each) for node in nodes}, n_cuda)
    cpus = _dealt({node: node.n_cpus // each - gpus[node] for node in nodes}, n_cpu)
    if sum(gpus.values()) < n_cuda or sum(cpus.values()) < n_cpu:
        raise UnavailableError(
            f"sweep.slots: {len(nodes)} nodes with {sum(node.n_cpus for node in nodes)} CPUs are too few for "
            f"{n_cpu + n_cuda} slots of {each} CPUs each; use fewer slots."
        )
    slots: dict[Slot, Node] = {}
    for node in nodes:
        if not (n_here := gpus[node] + cpus[node]):
            continue
        each = cpus_each(wanted["cpus_each"], node.n_cpus, n_here, node.name)
        names: list[tuple[str, str, str | None]]
        names = [(f"{node.name}-gpu{number}", "cuda", None) for number in range(gpus[node])]
        names += [(f"{node.name}-cpu{number}", "cpu", "") for number in range(cpus[node])]
        slots |= {Slot(name, node.name, device, each, gpu, n_here): node for name, device, gpu in names}
    return slots


def _dealt(room: Mapping[Node, int], n: int) -> dict[Node, int]:
    """`n` dealt out in turn to those that have room; fewer if they have not."""
    dealt = dict.fromkeys(room, 0)
    while sum(dealt.values()) < n and (open_ := [node for node in room if dealt[node] < room[node]]):
        for node in open_[: n - sum(dealt.values())]:
            dealt[node] += 1
    return dealt
