"""What a result was measured on and with. One subprocess (git), and only in a checkout."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moe_lab.experts.auto import preferred
from moe_lab.measure.device_lock import CPUS
from moe_lab.routers.base import fastest


def capture(device: torch.device) -> dict[str, Any]:
    """The record's `environment`; what is unknown is None."""
    on_cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_cuda else None
    return {
        "moe_lab": _version("moe-lab"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "hydra": _version("hydra-core"),
        "numpy": _version("numpy"),
        "cuda": torch.version.cuda if on_cuda else None,
        "driver": _driver() if on_cuda else None,
        "device": device.type,
        "device_name": properties.name if properties else _cpu_name(),
        "device_memory_mb": properties.total_memory / 1e6 if properties else None,
        "compute_capability": f"{properties.major}.{properties.minor}" if properties else None,
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_set": _cpu_set(),
        "node": platform.node() or None,
        "job": _slurm_job(),
        "nice": os.getpriority(os.PRIO_PROCESS, 0) if hasattr(os, "getpriority") else None,
        "threads": torch.get_num_threads(),
        "router_auto": fastest(device) if on_cuda else None,
        "experts_auto": preferred(device) if on_cuda else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "host_memory_mb": _host_memory_mb(),
        "system": f"{platform.system()} {platform.release()}",
        **_git(),
    }


def device_id(device: torch.device) -> str:
    """Names what a run has for itself: a GPU by its UUID, or a set of CPUs."""
    if device.type == "cuda":
        return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return f"{CPUS}_{_cpu_set()}"


def _cpu_set() -> str:
    """The CPUs that this process may use, `0-3_8-8`."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    starts = [cpu for cpu in cpus if cpu - 1 not in cpus]
    ends = [cpu for cpu in cpus if cpu + 1 not in cpus]
    return "_".join(f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


def _slurm_job() -> str | None:
    """As `squeue --array` calls the job that this process is in."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ.get("SLURM_JOB_ID")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine() or None


def _driver() -> str | None:
    """The NVIDIA kernel driver's version."""
    for path in (Path("/sys/module/nvidia/version"), Path("/proc/driver/nvidia/version")):
        if path.exists():
            match = re.search(r"\d+\.\d+(\.\d+)?", path.read_text())
            if match:
                return match.group(0)
    return None


def _host_memory_mb() -> float | None:
    info = Path("/proc/meminfo")
    match = re.search(r"^MemTotal:\s*(\d+) kB", info.read_text(), re.MULTILINE) if info.exists() else None
    return int(match.group(1)) * 1024 / 1e6 if match else None


@cache
def _git() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that the package runs from; None when it was installed."""
    root = Path(__file__).resolve().parents[2]
    unknown = {"git_sha": None, "git_dirty": None}
    if not (root / ".git").exists():
        return unknown
    try:
        status = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain=v2", "--branch", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return unknown
    sha = next((line.split()[2] for line in status if line.startswith("# branch.oid ")), None)
    return {
        "git_sha": None if sha == "(initial)" else sha,
        "git_dirty": any(not line.startswith("#") for line in status),
    }
