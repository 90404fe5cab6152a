"""A folder of the person's own with routers that fail in every way, and sweeps run in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from moe_lab.records.schema import Record
from moe_lab.records.store import read_record
from tests import quick

MOE_LAB = [sys.executable, "-m", "moe_lab"]

_MODULE = '''
import ctypes, os, signal, subprocess, sys, time
import torch
from moe_lab.routers.softmax_topk import SoftmaxTopK

class Faulty(SoftmaxTopK):
    """Fails in `select`, once it was called `after` times."""

    def __init__(self, n_experts, top_k, fault, after=0):
        super().__init__(n_experts, top_k, impl="auto", renormalize=True, gate_bias=False)
        self.fault, self.after, self.calls = fault, after, 0
        if fault == "exit_at_once":
            os._exit(3)

    def select(self, logits_TE, ctx=None):
        routing = super().select(logits_TE, ctx)
        self.calls += 1
        if self.calls <= self.after:
            return routing
        if self.fault == "raise":
            raise RuntimeError("planted")
        if self.fault == "exit":
            os._exit(3)
        if self.fault == "segfault":
            ctypes.string_at(0)
        if self.fault == "hang":
            time.sleep(3600)
        if self.fault == "device_assert":  # the CUDA context is lost with it
            torch.zeros(1, device=logits_TE.device)[torch.full((1,), 9, device=logits_TE.device)]
        if self.fault == "device_hang":
            torch.cuda._sleep(10**11)
        if self.fault == "memory":
            torch.ones(2**40)
        if self.fault == "slow":
            end = time.perf_counter() + 0.02
            while time.perf_counter() < end:
                pass
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "sys_exit":
            sys.exit(0)
        if self.fault == "interrupt":
            raise KeyboardInterrupt
        if self.fault == "chdir":
            os.chdir("/")
        if self.fault == "close":
            sys.stdout.close(), sys.stderr.close(), os.closerange(1, 3)
        if self.fault == "fork" and self.calls == 1 and os.fork() == 0:  # once: else its children fork too
            time.sleep(0.1)
        if self.fault == "readonly":
            folder = os.environ["READONLY"]
            subprocess.run(["chattr", "-R", "-f", "+i", folder], check=False)
        if self.fault == "wrong":
            return routing._replace(expert_ids_TK=routing.expert_ids_TK.flip(-1))
        return routing

    def use_reference(self):
        self.fault = "none"
'''

FAULTS = ("raise", "exit", "segfault", "hang", "memory", "wrong", "slow", "device_assert", "device_hang")
FAULTS += ("exit_at_once", "kill", "sys_exit", "interrupt", "chdir", "close", "fork", "readonly")


def plugin(folder: Path) -> Path:
    """A folder for --config-dir with a router for each of `FAULTS`: at once, and `late_` ones after it was verified."""
    (folder / "router").mkdir(parents=True)
    (folder / "faulty_router.py").write_text(_MODULE)
    for fault in FAULTS:
        yaml = f"_target_: faulty_router.Faulty\nname: {{}}{fault}\nfault: {fault}\n"
        (folder / "router" / f"{fault}.yaml").write_text(yaml.format(""))
        (folder / "router" / f"late_{fault}.yaml").write_text(yaml.format("late_") + "after: 200\n")
    return folder


def sweep(*arguments: str, cwd: Path, plugin: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """`moe-lab -m` with quick overrides of `moe_layer`; `sweep.name=s` puts the results in outputs/s."""
    command = command_of(*arguments, plugin=plugin)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)


def command_of(*arguments: str, plugin: Path | None = None) -> list[str]:
    """The command of `sweep`."""
    folder = ["--config-dir", str(plugin)] if plugin else []
    return [*MOE_LAB, "-m", *folder, *quick.overrides("moe_layer", "sweep.name=s", "sweep.report=false", *arguments)]


def records_list(cwd: Path, name: str = "s") -> list[Record]:
    """The records of a sweep, ordered by folder."""
    return [read_record(path.parent) for path in sorted((cwd / "outputs" / name).glob("*/result.json"))]


def records(cwd: Path, name: str = "s") -> dict[str, Record]:
    """The records of a sweep by router, or by router-batch where there are several."""
    found = records_list(cwd, name)
    batches = {record.config["batch"] for record in found}

    def key(record: Record) -> str:
        router = str(record.config["router"]["name"])
        return router if len(batches) == 1 else f"{router}-{record.config['batch']}"

    named = {key(record): record for record in found}
    assert len(named) == len(found)
    return named


def plan(cwd: Path, name: str = "s") -> dict[str, Any]:
    """plan.json of a sweep."""
    content: dict[str, Any] = json.loads((cwd / "outputs" / name / "plan.json").read_text())
    return content


def interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C, as a terminal sends it: to the whole process group."""
    os.killpg(process.pid, signal.SIGINT)
