"""A worker that is asked only what is not known yet: answers about a CPU are kept in the user's cache folder.

An answer is found again under everything it depends on: the code, the versions, the environment, the compilers, the
CPUs and the configuration. Where a GPU may be, the worker is asked every time. Imports no torch.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from moe_lab.config import targets
from moe_lab.records import files, identity, store
from moe_lab.runs.memory_estimate import Host, refusal
from moe_lab.sweep.engine import START_S, Worker

_PACKAGES = ("torch", "triton", "numpy", "scipy", "vllm", "sglang", "transformers")
_GPU = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_VARIABLES = (
    "OMP_",
    "MKL_",
    "KMP_",
    "GOMP_",
    "TORCH",
    "PYTORCH",
    "CUDA",
    "NVIDIA",
    "TRITON",
    "LD_",
    "CXX",
    "CC",
    "PATH",
)
_COMPILERS = ("g++", "c++", "clang++", "nvcc")


class Remembered(Worker):
    """Answers `look` and `refusals`; starts its process for what is not known."""

    def call(self, step: str, *arguments: Any, timeout_s: float = START_S) -> Any:
        """See `Engine.call`."""
        configs, *rest = arguments
        if step == "refusals":
            if all(map(_is_of_a_cpu, configs)):
                return [refusal(config, Host()) for config in configs]  # by arithmetic, from what is free now
            return super().call(step, *arguments, timeout_s=timeout_s)
        assert step == "look", step
        files_of = [_file([step, rest, *parts_of(config)]) if _is_of_a_cpu(config) else None for config in configs]
        answers = [_known(file) for file in files_of]
        unknown = [number for number, answer in enumerate(answers) if answer is None]
        if unknown:
            asked = super().call(step, [configs[number] for number in unknown], *rest, timeout_s=timeout_s)
            for number, answer in zip(unknown, asked, strict=True):
                answers[number] = answer
                _keep(files_of[number], answer)
        return answers


def kept(parts: Sequence[Any], ask: Callable[[], Any]) -> Any:
    """The answer to `ask`, from before if it was asked with these parts here. Where a GPU may be it is asked anew."""
    file = None if _may_have_gpu() else _file(parts)
    answer = _known(file)
    if answer is None:
        answer = ask()
        _keep(file, answer)
    return answer


def parts_of(config: Mapping[str, Any]) -> list[Any]:
    """What of a configuration decides whether it can run, and its code."""
    plugins = targets.folders_of(OmegaConf.create(dict(config)))
    same = ("seed",) if plugins else ("seed", "batch", "seq_len")  # a plug-in may choose its kernels by their size
    content = {key: part for key, part in identity.content(config).items() if key not in same}
    return [content, identity.code_id(plugins)]


def _is_of_a_cpu(config: Mapping[str, Any]) -> bool:
    device = config["device"]["name"]
    return bool(device == "cpu" or (device == "auto" and not _may_have_gpu()))


def _file(parts: Sequence[Any]) -> Path:
    """Where the answer to a question about a CPU is kept."""
    return _folder() / f"{identity.digest([*parts, _surroundings()])}.json"


def _folder() -> Path:
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "moe-lab" / "answers"


def _known(path: Path | None) -> Any:
    """A kept answer; None if there is none that can be read."""
    if path is None:
        return None
    try:
        return files.read_json(path)
    except (OSError, ValueError):
        return None


def _keep(path: Path | None, answer: Any) -> None:
    """A folder that cannot be written costs time, and nothing else."""
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write_atomic(path, json.dumps(answer).encode())


@cache
def _may_have_gpu() -> bool:
    return sys.platform != "linux" or any(Path(path).exists() for path in _GPU)


@cache
def _surroundings() -> dict[str, Any]:
    """What an answer about a CPU depends on beside the code and the configuration."""
    compilers = [os.environ.get("CXX", ""), *_COMPILERS]
    extension = _folder().parent / "extension"
    return {
        "python": [sys.version, sys.prefix],
        "packages": _versions(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
        "cpus": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": [*os.uname(), *_models_of_cpus()],
        "gpu": _may_have_gpu(),
        "compilers": [shutil.which(name) for name in compilers if name],
        "extension": sorted(str(path) for path in extension.rglob("*")),
    }


@cache
def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _models_of_cpus() -> list[str]:
    with suppress(OSError):
        return sorted({line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model" in line})
    return []
