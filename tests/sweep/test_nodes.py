"""sweep/nodes.py: the slots of a cluster, dealt out to its nodes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from moe_lab.errors import UnavailableError
from moe_lab.sweep.nodes import Node, slots_of

CPU_NODES = [Node("1", "a", 4, 0), Node("2", "b", 2, 0)]
GPU_NODES = [Node("1", "a", 16, 2), Node("2", "b", 16, 4), Node("3", "c", 8, 0)]


def wanted(cpu: int | None = None, cuda: int | None = None, cpus_each: int | None = None) -> dict[str, Any]:
    return {"cpu": cpu, "cuda": cuda, "cpus_each": cpus_each}


@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        pytest.param(CPU_NODES, wanted(), {"a-cpu0": 4, "b-cpu0": 2}, id="a-node-each"),
        pytest.param(CPU_NODES, wanted(cpu=3), {"a-cpu0": 2, "a-cpu1": 2, "b-cpu0": 2}, id="in-turn"),
        pytest.param(
            CPU_NODES, wanted(cpu=6), {f"a-cpu{n}": 1 for n in range(4)} | {"b-cpu0": 1, "b-cpu1": 1}, id="all"
        ),
        pytest.param(CPU_NODES, wanted(cpu=2, cpus_each=1), {"a-cpu0": 1, "b-cpu0": 1}, id="of-one-cpu"),
        pytest.param(CPU_NODES, wanted(cpu=1, cpus_each=4), {"a-cpu0": 4}, id="where-there-is-room"),
        pytest.param(
            GPU_NODES,
            wanted(),
            {"a-gpu0": 8, "a-gpu1": 8, "b-gpu0": 4, "b-gpu1": 4, "b-gpu2": 4, "b-gpu3": 4},
            id="every-gpu",
        ),
        pytest.param(GPU_NODES, wanted(cuda=2), {"a-gpu0": 16, "b-gpu0": 16}, id="gpus-in-turn"),
        pytest.param(GPU_NODES, wanted(cuda=1, cpu=2, cpus_each=8), {"a-gpu0": 8, "a-cpu0": 8, "b-cpu0": 8}, id="both"),
    ],
)
def test_slots_are_dealt_out(nodes: list[Node], asked: dict[str, Any], expected: dict[str, int]) -> None:
    """In turn, with the node's CPUs shared; a slot without a GPU sees none, another what the cluster gives it."""
    found = slots_of(nodes, asked)
    assert {slot.name: slot.n_cpus for slot in found} == expected
    for slot, node in found.items():
        assert slot.node == node.name
        assert slot.n_on_node == sum(other.node == slot.node for other in found)
        assert (slot.device, slot.gpu) == (("cuda", None) if "gpu" in slot.name else ("cpu", ""))


@pytest.mark.parametrize(
    ("nodes", "asked", "message"),
    [
        pytest.param(GPU_NODES, wanted(cuda=7), "sweep.slots.cuda=7: the cluster has 6 GPUs", id="gpus"),
        pytest.param(CPU_NODES, wanted(cpu=7), "sweep.slots: 2 nodes with 6 CPUs are too few for 7 slots", id="cpus"),
        pytest.param(CPU_NODES, wanted(cpu=2, cpus_each=3), "too few for 2 slots of 3 CPUs each", id="whole-on-a-node"),
    ],
)
def test_what_the_cluster_has_not_is_one_line(nodes: list[Node], asked: dict[str, Any], message: str) -> None:
    """The key, what there is, and the remedy."""
    with pytest.raises(UnavailableError, match=f"{re.escape(message)}.*; use fewer slots"):
        slots_of(nodes, asked)
