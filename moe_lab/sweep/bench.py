"""The runs that one process holds, and the steps that a sweep asks of them. The worker's side of a sweep."""

from __future__ import annotations

import faulthandler
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from moe_lab.config import targets
from moe_lab.errors import UnavailableError
from moe_lab.measure import environment, memory
from moe_lab.measure.blocks import Seen
from moe_lab.measure.clocks import Block
from moe_lab.measure.probe import Probe
from moe_lab.measure.profile import has_used_cupti
from moe_lab.measure.tolerances import exact_products
from moe_lab.models.parameters import parameter_bytes, shareable
from moe_lab.records import identity, store
from moe_lab.records.schema import Ratio
from moe_lab.runs import build
from moe_lab.runs.describe import describe
from moe_lab.runs.memory_estimate import refusal
from moe_lab.runs.record import TimedBlock, run_log
from moe_lab.runs.run import Run
from moe_lab.runs.unchanged import unchanged_process
from moe_lab.sweep.engine import CellFailedError


class Bench:
    """Runs by cell_id. Each method is one step; arguments and results are plain data that can be sent."""

    def __init__(self, trusted: Sequence[str] = ()):
        self.timeout_s: float | None = None
        """In a process of its own: when the present step will be ended from outside."""
        for folder in trusted:
            targets.trust(folder)
        self._runs: dict[str, Run] = {}
        self._probe: Probe | None = None
        self._donor: tuple[str, dict[str, Tensor]] = ("", {})  # the parameters of the last model built, and of which

    def look(self, configs: list[dict[str, Any]], makes_parts: bool = True) -> list[dict[str, Any]]:
        """Whether each configuration can run here, and how; without its parts only where.

        {env, env_id, device_id, available_bytes, skip: a reason or None, implementation: who would compute what,
        builds: whether the extension is built first}.
        """
        return [_look(OmegaConf.create(config), makes_parts) for config in configs]

    def refusals(self, configs: list[dict[str, Any]]) -> list[str | None]:
        """Why each configuration does not fit into the memory; None if it may, or if `look` says what is wrong."""
        return [_refusal(config) for config in configs]

    def describe(self, group: str, configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """See `runs.describe`; the fields of each `Description`."""
        return [describe(group, OmegaConf.create(config))._asdict() for config in configs]

    def build(self, config: dict[str, Any], directory: str) -> None:
        """Make the run of `config`, whose files go to `directory`; parameters of an equal model are shared."""
        cfg = OmegaConf.create(config)
        folder = store.own_folder(Path(directory).absolute())
        (folder / store.LOG).unlink(missing_ok=True)
        run = Run(cfg, folder)
        cell_id = identity.cell_id(cfg)
        self._runs[cell_id] = run
        with self._step(cell_id):
            key = build.weights_key(cfg, build.resolve_device(cfg))
            if self._donor[0] != key:
                self._donor = ("", {})  # before the next is made
            run.build(self._donor[1] or None)
            self._donor = key, shareable(run.made().model)

    def verify(self, cell_id: str) -> dict[str, int | None]:
        """Peak memory and verification. Returns {peak_bytes, parameter_bytes}."""
        with self._step(cell_id) as run:
            run.verify()
            return {"peak_bytes": run.peak_bytes, "parameter_bytes": parameter_bytes(run.made().model)}

    def park(self, cell_id: str) -> None:
        """See `Run.park`."""
        self._runs[cell_id].park()
        _free()

    def unpark(self, cell_id: str) -> None:
        """See `Run.unpark`."""
        with self._step(cell_id) as run:
            run.unpark()

    def warm_up(self, cell_id: str, block_s: float) -> int:
        """Warm up; how many iterations fill a block of `block_s`."""
        with self._step(cell_id) as run:
            return run.warm_up(block_s)

    def block(self, cell_id: str, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Time `n` iterations: milliseconds of each, and the host's clock."""
        with self._step(cell_id) as run:
            block = run.time_block(n)
            return block.ms, block.stamp_s

    def has_used_cupti(self) -> bool:
        """See `measure.profile`."""
        return has_used_cupti()

    def probe(self, cell_id: str) -> float | None:
        """Milliseconds of a fixed piece of work on the device of this run; None if no memory is left for it."""
        device = self._runs[cell_id].made().device
        try:
            with exact_products():
                if self._probe is None:
                    self._probe = Probe(device)
                    self._probe.ms()  # the first is slower
                return self._probe.ms()
        except Exception as error:
            if not memory.is_exhausted_by(error):
                raise
            self._probe = None
            _free()
            return None

    def observe(
        self,
        cell_id: str,
        blocks: list[tuple[int, int, int, np.ndarray, np.ndarray, Seen]],
        peers: list[str],
        ratio: Ratio | None,
        peak_bytes: int | None,
        probe_ms: list[float],
        failure: tuple[str, str] | None = None,
        contention: dict[str, Any] | None = None,
        counter: dict[str, Any] | None = None,
    ) -> None:
        """Observe and write the record, with the samples of all processes. With `failure` only write."""
        with self._step(cell_id) as run:
            run.blocks = [TimedBlock(*of[:3], Block(*of[3:5]), of[5]) for of in blocks]
            run.peers, run.ratio, run.peak_bytes, run.probe_ms = peers, ratio, peak_bytes, probe_ms
            run.contention, run.counter = contention, counter
            if failure is None:
                run.observe()
                run.export()
            run.write(run.record(*(failure or ())))

    def release(self, cell_id: str) -> None:
        """Let go of a run; the parameters stay until another model is built."""
        self._runs.pop(cell_id, None)
        if not self._runs:
            self._probe = None  # its memory is not to be in the peak of the next
        _free()

    @contextmanager
    def _step(self, cell_id: str) -> Iterator[Run]:
        """One step of a run: exact products, its log open, and what goes wrong is its record."""
        run = self._runs[cell_id]
        with run_log(run.directory) as stream, exact_products(), run.at_work():
            if self.timeout_s is not None:  # a crash or a hang leaves its traceback in the run's log
                faulthandler.enable(stream)
                faulthandler.dump_traceback_later(0.9 * self.timeout_s, file=stream)
            try:
                with unchanged_process():
                    yield run
            except (Exception, KeyboardInterrupt, SystemExit) as error:
                if isinstance(error, KeyboardInterrupt):
                    if self.timeout_s is None:  # in the person's own process it is their Ctrl-C
                        raise
                    error = RuntimeError("KeyboardInterrupt was raised in the run")
                status, reason = run.failed_with(error)
                run.write(run.record(status, reason))
                failed = CellFailedError(status, reason, lost_device=_has_lost_device(run))
            else:
                return
            finally:
                if self.timeout_s is not None:
                    faulthandler.cancel_dump_traceback_later()
                    faulthandler.enable()
        del run
        self.release(cell_id)
        raise failed


def _refusal(config: dict[str, Any]) -> str | None:
    wanted = config["device"]["name"]
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        return None
    device = torch.device("cuda" if has_cuda and wanted != "cpu" else "cpu")
    try:
        return refusal(config, device)
    except ValueError:  # a checkpoint that cannot be read
        return None


def _look(cfg: DictConfig, makes_parts: bool) -> dict[str, Any]:
    device, skip = None, None
    implementation: dict[str, str] = {}
    try:
        device, implementation = build.check_available(cfg) if makes_parts else (build.resolve_device(cfg), {})
    except UnavailableError as error:
        skip = f"unavailable: {error}"
    except ValueError as error:
        skip = f"impossible: {error}{targets.place_of(error)}"
    except (Exception, SystemExit):  # a part that cannot be made without memory: building it will tell
        device = build.resolve_device(cfg)
    env = environment.capture(device) if device is not None else {}
    return {
        "env": env,
        "env_id": identity.env_id(env) if env else None,
        "device_id": environment.device_id(device) if device is not None else None,
        "available_bytes": memory.available_bytes(device) if device is not None else None,
        "skip": skip,
        "implementation": implementation,
        "builds": device is not None and build.builds_extension(implementation, device),
    }


def _free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _has_lost_device(run: Run) -> bool:
    """Whether the CUDA context no longer works, as after an illegal access."""
    if run.built is None or run.built.device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(run.built.device)
    except RuntimeError:
        return True
    return False
