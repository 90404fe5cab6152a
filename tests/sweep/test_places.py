"""sweep/places.py: which slots a sweep has, and the keys that say so."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_lab.cli.main import main
from moe_lab.errors import UnavailableError
from moe_lab.sweep import places, ray_variables
from tests.sweep import faulty, test_plan


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("sweep.engine=spark", "sweep.engine=spark: must be one of worker, ray", id="engine"),
        pytest.param("sweep.slots.cpu=0", "sweep.slots.cpu=0: must be a number >= 1", id="no-slot"),
        pytest.param("sweep.slots.cpus_each=2", "cpus_each=2: has no effect; set sweep.slots.cpu or", id="each"),
        pytest.param("sweep.shared=false", "sweep.shared=false: has no effect; only used with another", id="shared"),
        pytest.param("sweep.require=H200", "sweep.require=H200: must be fields of a record's", id="no-field"),
        pytest.param("sweep.require={devce_name: H200}", "Did you mean device_name?", id="unknown-field"),
    ],
)
def test_a_mistake_is_one_line(override: str, message: str, tmp_path: Path) -> None:
    """The key, what is wrong, and the remedy."""
    with pytest.raises(ValueError) as raised:
        test_plan.make(tmp_path, override)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "override", [pytest.param("sweep.slots.cpu=1", id="slots"), pytest.param("sweep.engine=ray", id="ray")]
)
def test_a_slot_needs_a_worker(override: str, tmp_path: Path) -> None:
    """A debugger's sweep runs in this process, which is no slot."""
    with pytest.raises(ValueError, match=r"a slot has a worker process; remove sweep.worker=false"):
        test_plan.make(tmp_path, override, "sweep.worker=false")


@pytest.mark.slow
def test_another_launcher_has_no_slots(tmp_path: Path) -> None:
    """It decides itself what runs when; nothing is left behind."""
    done = subprocess.run(
        faulty.command_of("sweep.slots.cpu=1", "hydra/launcher=basic"), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "sweep.slots.cpu=1: has no effect with another launcher than hydra/launcher=moe_lab" in done.stderr
    assert not list(tmp_path.rglob("result.json"))


def test_a_mistake_is_said_before_slots_are_opened(tmp_path: Path) -> None:
    """On the command line, where they are opened while Hydra composes."""
    done = subprocess.run(faulty.command_of("sweep.engine=spark"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "sweep.engine=spark: must be one of worker, ray" in done.stderr


def test_without_ray_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sweep: dict[str, Any] = {"engine": "ray", "shared": True, "slots": {}}
    with pytest.raises(UnavailableError, match=r"ray is not installed; run pip install 'moe-lab\[ray\]'"):
        places.open_pool(sweep, tmp_path, print)


@pytest.mark.slow
def test_slots_that_cannot_be_had_leave_nothing_behind(tmp_path: Path) -> None:
    """Neither a folder nor a lock: the next command gets in."""
    done = faulty.sweep("sweep.slots.cpu=10000", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "too few for 10000 slots; use fewer slots" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_ray_cluster_that_is_started_here_wants_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one each time; what the person set stays, and another cluster's variables are left alone."""
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr(os, "environ", {"RAY_ADDRESS": "head:6379"})
    ray_variables.prepare()
    assert os.environ == {"RAY_ADDRESS": "head:6379"}
    monkeypatch.setattr(os, "environ", {})
    ray_variables.prepare()
    first = dict(os.environ)
    assert (first["RAY_AUTH_MODE"], len(first["RAY_AUTH_TOKEN"])) == ("token", 64)
    monkeypatch.setattr(os, "environ", {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "3"})
    ray_variables.prepare()
    assert [os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_worker_niceness")] == ["disabled", "3"]
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["sweep.engine=foo"], "sweep.engine=foo: must be one of worker, ray, slurm.", id="unknown"),
        pytest.param(["sweep.slots.cpu=0"], "sweep.slots.cpu=0: must be a number >= 1.", id="no-slot"),
        pytest.param(["sweep.engine=slurm", "sweep.slurm.time=soon"], "sweep.slurm.time=soon: ", id="no-time"),
        pytest.param(
            ["sweep.engine=ray", "sweep.worker=false"], "sweep.engine=ray: a slot has a worker", id="in-process"
        ),
    ],
)
def test_a_mistake_is_told_before_slots_are_opened(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its key, in one line; nothing is left behind, and no cluster is needed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert main(["-m", "model=minimal", "device=cpu", "batch=1,2", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"moe-lab: {message}")
    assert list(tmp_path.iterdir()) == []
