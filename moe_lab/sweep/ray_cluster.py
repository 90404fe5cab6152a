"""A Ray cluster: connecting to it, its nodes, and which of them will do. Imports no torch."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe_lab.errors import UnavailableError
from moe_lab.sweep import parcel
from moe_lab.sweep.engine import START_S
from moe_lab.sweep.nodes import Node
from moe_lab.sweep.ray_variables import STARTED_HERE
from moe_lab.sweep.slots import usable_cpus

NAMESPACE = "moe-lab"
_CONNECT_S = 5.0
_NEW_S = 15.0  # until a node that has just come is known to all


def connect(modules: list[str], say: Callable[[str], None]) -> bool:
    """Connect to the cluster of `RAY_ADDRESS`, or start one here. Returns whether it was started here.

    Args:
        modules: the folders of packages that travel to the nodes.
        say: shows a line.

    Raises:
        UnavailableError: it is not there, or cannot be started.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    common: dict[str, Any] = {
        "namespace": NAMESPACE,
        "runtime_env": {"py_modules": modules},
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address in STARTED_HERE:
        n_cpus = len(usable_cpus())
        say(f"sweep.engine=ray: RAY_ADDRESS is not set, so a cluster of this machine is started ({n_cpus} CPUs)")
        try:
            ray.init(address="local", num_cpus=n_cpus, include_dashboard=False, **common)
        except Exception as error:  # of many kinds, as below
            raise UnavailableError(f"sweep.engine=ray: a cluster cannot be started here: {line_of(error)}") from error
        return True
    remedy = "start one with ray start --head, or unset RAY_ADDRESS to start one here"
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or "/" in host or not port.isdigit():
            raise UnavailableError(f"RAY_ADDRESS={address}: must be HOST:PORT of the cluster's head; {remedy}.")
        try:
            socket.create_connection((host, int(port)), _CONNECT_S).close()
        except OSError as error:
            raise UnavailableError(f"RAY_ADDRESS={address}: no cluster answers there ({error}); {remedy}.") from error
    try:
        ray.init(address=address, **common)
    except Exception as error:  # of many kinds: no cluster, another version of ray or of Python
        raise UnavailableError(f"RAY_ADDRESS={address}: {line_of(error)}; {remedy}.") from error
    return False


def nodes_of_cluster() -> list[Node]:
    """The nodes that are alive; of several on one machine the names have a number."""
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"]))
    hosts = [str(node["NodeManagerHostname"]) for node in alive]
    found = []
    for place, (node, host) in enumerate(zip(alive, hosts, strict=True)):
        name = f"{host}-{hosts[:place].count(host)}" if hosts.count(host) > 1 else host
        resources = node["Resources"]
        found.append(Node(node["NodeID"], name, int(resources.get("CPU", 0)), int(resources.get("GPU", 0))))
    return found


def fit_nodes(nodes: Sequence[Node], say: Callable[[str], None], *, are_here: bool) -> list[Node]:
    """Those with what moe-lab needs; of others a line says what they lack.

    Args:
        nodes: all.
        say: shows a line.
        are_here: they have this process's environment, so it is looked up here: no process of Ray has to start first.

    Raises:
        UnavailableError: no node will do.
    """
    needed = parcel.requirements()
    if are_here:
        lacking = dict.fromkeys(nodes, parcel.lacking(needed))
    else:
        refs = {node: _asked_of(node, needed) for node in nodes}  # all at once
        lacking = {node: _lacks(node, needed, ref) for node, ref in refs.items()}
    fit, mistakes = [], []
    for node, lacks in lacking.items():
        if lacks:
            mistakes.append(f"{node.name} lacks what moe-lab needs: {', '.join(lacks)}; install it there")
        else:
            fit.append(node)
    if not fit:
        raise UnavailableError(f"sweep.engine=ray: {'; '.join(mistakes) or 'the cluster has no node'}.")
    for line in mistakes:
        say(f"{line}; the sweep goes on without this node")
    return fit


def _asked_of(node: Node, needed: Sequence[str]) -> Any:
    return ray.remote(num_cpus=0)(parcel.lacking).options(scheduling_strategy=on(node)).remote(needed)


def _lacks(node: Node, needed: Sequence[str], ref: Any) -> list[str]:
    ends_at = time.monotonic() + _NEW_S
    while True:
        try:
            return list(ray.get(ref, timeout=START_S))
        except TaskUnschedulableError as error:  # a node that has just come is not known everywhere
            if time.monotonic() > ends_at:
                return [line_of(error)]
            time.sleep(1)
            ref = _asked_of(node, needed)
        except (RayError, GetTimeoutError) as error:
            return [line_of(error)]


def on(node: Node) -> NodeAffinitySchedulingStrategy:
    """Run there and nowhere else."""
    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def line_of(error: BaseException) -> str:
    """Ray's messages have many lines; the first that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)[:200]
