"""measure/environment.py: what a result was measured on."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_lab
from moe_lab.measure import environment
from moe_lab.records.identity import env_id
from tests import tiny

CPU = torch.device("cpu")
NAMED_IN_THE_DESIGN = (
    "python",
    "torch",
    "triton",
    "cuda",
    "driver",
    "device_name",
    "cpu",
    "threads",
    "git_sha",
    "git_dirty",
    "moe_lab",
)


@pytest.fixture(autouse=True)
def _nothing_captured_before_or_after() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    """Empty every cache of the module."""
    for value in vars(environment).values():
        getattr(value, "cache_clear", lambda: None)()


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every command that the module starts; they still run."""
    started: list[list[str]] = []
    real = subprocess.run

    def counting(command: list[str], **options: Any) -> Any:
        started.append(command)
        return real(command, **options)

    monkeypatch.setattr(environment.subprocess, "run", counting)
    return started


def test_the_fields_of_the_design_are_there() -> None:
    """Unknown is None, but the key stands."""
    assert set(NAMED_IN_THE_DESIGN) <= set(environment.capture(CPU))


def test_versions_are_those_of_this_process() -> None:
    """Not of what some file says."""
    found = environment.capture(CPU)
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["moe_lab"] == moe_lab.__version__
    assert found["device"] == "cpu" and found["cuda"] is None and found["driver"] is None


def test_the_environment_is_json() -> None:
    """Nothing in it needs a converter."""
    found = environment.capture(CPU)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_at_most_one_process_is_started(commands: list[list[str]]) -> None:
    """git once, however often the environment is asked for."""
    for _ in range(3):
        environment.capture(CPU)
    assert len(commands) <= 1
    assert all(command[0] == "git" for command in commands)


@pytest.mark.skipif(not (tiny.ROOT / ".git").exists(), reason="not a checkout")
def test_commit_is_that_of_the_checkout() -> None:
    """As git itself says."""
    head = subprocess.run(
        ["git", "-C", str(tiny.ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    found = environment.capture(CPU)
    assert found["git_sha"] == head
    assert isinstance(found["git_dirty"], bool)


def test_an_installed_package_has_no_commit_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, commands: list[list[str]]
) -> None:
    """Outside a checkout git is not even asked."""
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "moe_lab" / "measure" / "environment.py"))
    found = environment.capture(CPU)
    assert found["git_sha"] is None and found["git_dirty"] is None
    assert commands == []


def test_a_machine_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run does not fail for want of a label."""
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "moe_lab" / "measure" / "environment.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = environment.capture(CPU)
    assert found["git_sha"] is None and found["git_dirty"] is None


def test_env_id_changes_with_the_thread_count() -> None:
    """A thread count changed in this process is in the next environment: one thread and two are two machines."""
    before = torch.get_num_threads()
    one = environment.capture(CPU)
    try:
        torch.set_num_threads(before + 1)
        other = environment.capture(CPU)
    finally:
        torch.set_num_threads(before)
    assert other["threads"] == before + 1
    assert env_id(one) != env_id(other)


@pytest.mark.gpu
def test_a_gpu_is_described() -> None:
    """Name, memory, capability, CUDA and the driver."""
    found = environment.capture(torch.device("cuda", torch.cuda.current_device()))
    assert found["device"] == "cuda"
    assert found["device_name"] == torch.cuda.get_device_name()
    assert found["cuda"] == torch.version.cuda
    assert found["device_memory_mb"] > 0
    assert found["compute_capability"] == ".".join(map(str, torch.cuda.get_device_capability()))
