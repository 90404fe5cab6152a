"""One run, end to end: build, verify, measure, observe, record.

`Run` holds the steps apart, so that a sweep can interleave `time_block` over several runs; `run` calls them in order.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from moe_lab.config import targets
from moe_lab.config.checks import validate
from moe_lab.config.unread import unread
from moe_lab.errors import MismatchError, UnavailableError
from moe_lab.measure import contention, energy, environment, memory, statistics
from moe_lab.measure.blocks import Blocks
from moe_lab.measure.clocks import Block, Step
from moe_lab.measure.device_lock import DeviceLock
from moe_lab.measure.energy import Meter
from moe_lab.measure.kernels import Event
from moe_lab.measure.tolerances import exact_products
from moe_lab.models import Output
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.moe_layer import moe_layers
from moe_lab.models.parameters import parameter_bytes
from moe_lab.models.serving import Decode, Prefill, Serving
from moe_lab.models.transformer_decoder import TransformerDecoder
from moe_lab.records import identity
from moe_lab.records.schema import UNFINISHED, Latency, Ratio, Record
from moe_lab.records.weight_changes import active
from moe_lab.routers.base import Router, Routing
from moe_lab.runs import after_timing, build, memory_estimate, passes, trained, weight_changes
from moe_lab.runs import record as recording
from moe_lab.runs.built import Built
from moe_lab.runs.export import exporter, make_inputs
from moe_lab.runs.observe import Observer
from moe_lab.runs.place import Place
from moe_lab.runs.record import TimedBlock
from moe_lab.runs.trace import RunTrace
from moe_lab.runs.unchanged import unchanged_process
from moe_lab.runs.verify import Verification, routers_watched, verify
from moe_lab.runs.verify_decode import verify_decode
from moe_lab.workloads.forced import load_difference, repeated

log = logging.getLogger("moe_lab")

_LOAD_TOLERANCE = 0.02  # share of the slots
_BLOCK_S = 0.1  # a block of iterations takes about so long: short beside drift, long beside bookkeeping


class Run:
    """One composed configuration, executed once. Call `build`, `verify`, `time_block`..., `observe`, then `record`."""

    def __init__(self, cfg: DictConfig, directory: Path | None = None):
        """`directory` is where its files go: those of an export lie there unless `export.dir` says otherwise."""
        self._spent_s, self._begun = 0.0, time.perf_counter()
        validate(cfg)
        self.cfg = cfg
        self.directory = (directory or default_directory(cfg)).absolute()  # a router may change the current folder
        self._process = os.getpid()
        self.code_id = identity.code_id(targets.folders_of(cfg))
        self.started = datetime.now(UTC)
        self.device: torch.device | None = None
        self.built: Built | None = None
        self.verification: Verification | None = None
        self._given: after_timing.Given | None = None  # before the first pass
        self._verified: after_timing.Pass | None = None
        self.peak_bytes: int | None = None
        self.blocks: list[TimedBlock] = []
        self.peers: list[str] = []  # cell_ids of the runs whose blocks were interleaved with these
        self.ratio: Ratio | None = None
        self.probe_ms: list[float] = []  # how fast the machine was, by replicate
        self.contention: dict[str, Any] | None = None  # what else the machine did while this was timed
        self.counter: dict[str, Any] | None = None  # of energy (`Meter.described`), if that is asked for
        self.observed: dict[str, Any] = {}
        self.routing_arrays: dict[str, np.ndarray] = {}
        self.trace: RunTrace | None = None
        self.timeline: list[Event] | None = None
        # Of a single run most were refused; in a sweep they may be another cell's.
        without_effect = unread(cfg, cfg.overrides, in_a_sweep=True, only_refused=False)
        self.warnings: list[str] = list(without_effect.values())

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """What is done inside counts as time spent on this run; what other runs do meanwhile does not."""
        if self._spent_s:  # else it has begun with `__init__`
            self._begun = time.perf_counter()
        try:
            yield
        finally:
            self._spent_s += time.perf_counter() - self._begun

    def build(self, donor: Mapping[str, Tensor] | None = None) -> None:
        """Make the model, its reference twin, the input and the step.

        With `donor` the model shares those parameters (`build.build_model`).

        Raises:
            UnavailableError: the device, the dtype on it, or an implementation cannot run here.
        """
        self.device = build.resolve_device(self.cfg)
        built = Built.of(self.cfg, self.device, donor)
        if self._export_dir is not None:
            exporter().require_exportable(self.cfg, built.model, self._export_dir)
        self.built = built
        if (tight := memory_estimate.warning(self.cfg, self.device)) is not None:
            self.warnings.append(tight)
        self._look_at_the_input(built)
        self._look_at_the_load(built)
        built.step = built.make_step(self._cache)
        log.info(
            "built %s on %s: %.1f MB of parameters",
            identity.option_name(self.cfg.model),
            built.device,
            parameter_bytes(built.model) / 1e6,
        )

    def made(self) -> Built:
        """What `build` made, which was called before."""
        assert self.built is not None, "call build first"
        return self.built

    @property
    def _cache(self) -> Any:
        return self.cfg.measure.cache

    def _look_at_the_input(self, built: Built) -> None:
        """Add warnings about the router, and about the input and biases of a trained model."""
        for layer in moe_layers(built.model):
            texts = layer.router.warnings(len(built.tokens()))
            if built.forced is None and (text := passes.chunk_warning(self.cfg, layer.router)) is not None:
                key = f"workload.prefill_chunk={self.cfg.workload.prefill_chunk}"
                texts.append(f"{key}: {text}; use workload.prefill_chunk=null.")
            for router in layer.router.modules():  # a router may wrap another
                if isinstance(router, Router) and router.fallback is not None:
                    texts.append(f"router.impl=auto uses {router.implementation()}: {router.fallback}.")
            if (text := layer.experts.warning(built.tokens())) is not None:
                texts.append(text)
            self.warnings += [text for text in texts if text not in self.warnings]
        self.warnings += weight_changes.warnings(active(self.cfg.model))
        if not isinstance(built.model, Checkpoint):
            return
        self.warnings += trained.warnings(self.cfg, built.model)
        key = "workload=random" if self.cfg.workload.get("name") == "random" else "workload.ids=uniform"
        if key == "workload=random" or self.cfg.workload.get("ids", "text") == "uniform":
            self.warnings.append(
                f"{key}: a trained model routes random ids differently from text, so load and latency are "
                "not realistic; use workload=text."
            )

    def _look_at_the_load(self, built: Built) -> None:
        """Add a warning if the load of a layer differs from the requested load, and of what a replay repeats."""
        if built.forced is not None and (says := repeated(self.cfg, built.n_tokens)) is not None:
            self.warnings.append(says)
        worst = load_difference(self.cfg, built.model, built.forced)
        if worst is not None and worst > _LOAD_TOLERANCE:
            self.warnings.append(
                f"workload.load={self.cfg.workload.load}: {worst:.1%} of the slots go to other experts than requested, "
                "because a token cannot use an expert twice; the row has the actual load."
            )

    def verify(self) -> None:
        """Take the peak memory of one iteration, then check the step's own output against the fp32 reference.

        Raises:
            MismatchError: the output differs from the fp32 reference.
            ValueError: router logits that are not finite; the message names the layer.
        """
        step = self.made().ready_step()
        self._given = after_timing.Given.of(self.made())
        with routers_watched(self.made().model) if type(step) is Step else nullcontext():
            step()  # what is allocated once is allocated now
        peak_bytes = memory.peak_bytes(step)  # before the reference leaves its traces
        self._verify_step()
        self.peak_bytes = peak_bytes

    def _verify_step(self) -> None:
        built, step = self.made(), self.made().ready_step()
        task, twin, options = built.task, built.twin, {"fuses": step.fuses, "forced": built.forced is not None}
        if isinstance(task, Decode):
            assert isinstance(twin, TransformerDecoder) and built.context is not None
            steps = [_kept(output) for output in built.outputs()]
            self._verified = after_timing.Pass.of(steps[0])
            self.verification = verify_decode(task, twin, built.x, steps, built.context, built.dtype, **options)
            task.seek(0)
        else:
            if isinstance(task, Prefill):
                assert isinstance(twin, TransformerDecoder)
                twin = task.on(twin)
            output = step()
            self._verified = after_timing.Pass.of(output)  # before another pass writes into it
            self.verification = verify(task, twin, built.x, output, built.dtype, **options)
        if built.x.is_cuda:
            torch.cuda.empty_cache()  # what the reference took
        log.info("verified: %s", self.verification.check)
        if self.verification.mismatch is not None:
            raise self.verification.mismatch

    def park(self) -> None:
        """Let go of what a step holds beside the model: a graph's memory, compiled code."""
        self.made().step = None

    def unpark(self) -> None:
        """Make the step anew. An eager one is the one that was verified; another is verified again."""
        built = self.made()
        built.step = built.make_step(self._cache)
        if self.cfg.execution.name != "eager":
            self._verify_step()

    def warm_up(self, block_s: float = _BLOCK_S) -> int:
        """Repeat the step for `measure.warmup_s`, at least once. Returns how many iterations fill `block_s`."""
        step = self.made().ready_step()
        deadline, once_ms = time.perf_counter() + self.cfg.measure.warmup_s, math.inf
        while True:
            once_ms = min(once_ms, float(step.time_block(1).ms[0]) * step.calls)  # one that was disturbed tells nothing
            if time.perf_counter() >= deadline:
                return max(1, int(block_s * 1e3 / max(once_ms, 1e-4)))

    def time_block(self, n: int) -> Block:
        """Time `n` iterations."""
        return self.made().ready_step().time_block(n)

    def samples_ms(self) -> np.ndarray:
        """Every sample so far, in order."""
        return recording.samples_ms(self.blocks)

    def alone(self) -> DeviceLock:
        """A context in which others see that this run uses its device; with `sweep.wait=true` it waits for them first.

        Raises:
            UnavailableError: the device is not here.
        """
        name = environment.device_id(build.resolve_device(self.cfg))
        waiting = logging.getLogger("moe_lab.waiting")
        text = "waiting for another run on this device (sweep.wait=true)"
        return DeviceLock(name, wait=bool(self.cfg.sweep.wait), on_wait=lambda: waiting.info(text))

    def measure(self, lock: DeviceLock) -> None:
        """Warm up, then time blocks until the median is known to `target_ci` or `max_time_s` is spent."""
        measure, max_time_s = self.cfg.measure, self.cfg.measure.max_time_s
        meter = Meter.of(lock.device_id, measure.cache) if measure.energy else None
        least, block_s = (energy.LEAST_BLOCKS, energy.BLOCK_S) if meter and meter.reads else (1, _BLOCK_S)
        n = self.warm_up(min(block_s, max_time_s))
        watch = contention.Watch(lock)
        blocks = Blocks(watch, meter, repeats=measure.throttled == "repeat")
        watch.start([os.getpid()])
        blocks.begin()
        deadline = time.perf_counter() + max_time_s
        while True:
            block, seen = blocks.timed(partial(self.time_block, n))
            self.blocks.append(TimedBlock(0, len(self.blocks), 0, block, seen))
            samples = self.samples_ms()
            is_known = len(self.blocks) >= least and statistics.is_known(samples, measure.target_ci)
            if is_known or time.perf_counter() >= deadline:
                break
        watch.stop()
        self.contention = watch.seen()
        self.counter = None if meter is None else meter.described()
        log.info("timed %d iterations, median %.4g ms", len(samples), np.median(samples))

    def observe(self) -> None:
        """Look at what `measure` asks for. The latency stands whether or not that succeeds (`Observer.observe`)."""
        self._verify_what_was_timed()
        assert self.verification is not None
        latency = self._latency()
        p50_ms = latency.p50 if latency is not None else math.nan
        observer = Observer(self.made(), p50_ms, self.verification.flops)
        try:
            observer.observe()
        finally:
            self.observed |= observer.values
            self.routing_arrays |= observer.routing_arrays
            self.trace, self.timeline = observer.trace, observer.timeline
            self.warnings += observer.warnings

    def _verify_what_was_timed(self) -> None:
        """See `after_timing`. Raises `MismatchError`; the times are then of something else, and are dropped."""
        verification, verified = self.verification, self._verified
        assert verification is not None and self._given is not None and verified is not None
        try:
            after_timing.require_the_same(self.made(), self._given, verified, self._verify_step)
        except MismatchError:
            verification.check.passed, self.blocks = False, []
            raise
        finally:
            self.verification = verification

    @property
    def _export_dir(self) -> Path | None:
        if self.cfg.export.name == "none":
            return None
        return self.directory / "netron" if self.cfg.export.dir is None else Path(self.cfg.export.dir)

    def export(self) -> None:
        """Write the model, whatever the phase that was timed, where `export` asks for it.

        Raises:
            ExportError: there is no pair.
            MismatchError: it computes something else than the model; what is known of it stands in the record.
        """
        if self._export_dir is None:
            return
        model = self.made().model
        try:
            self.observed["export"] = exporter().export(self.cfg, model, self._export_dir, make_inputs)
        except MismatchError as error:
            self.observed["export"] = error.found
            raise
        log.info("exported: %s", self.observed["export"])

    def failed_with(self, error: BaseException) -> tuple[str, str]:
        """(status, reason) of the record of this run that met `error`; the traceback goes into the log."""
        if isinstance(error, MismatchError):
            self.warnings.append(str(error))
        return recording.failure_of(error)

    def record(self, status: str = "ok", reason: str | None = None) -> Record:
        """What is known so far, as a record."""
        cfg, built, target_ci = self.cfg, self.built, self.cfg.measure.target_ci
        env = environment.capture(self.device) if self.device is not None else {}
        latency = self._latency()
        window = int(cfg.workload.get("window", 1)) if cfg.workload.get("phase") == "decode" else None
        return Record(
            status=status,  # type: ignore[arg-type]
            reason=reason,
            cell_id=identity.cell_id(cfg),
            code_id=self.code_id,
            env_id=identity.env_id(env) if env else None,
            name=cfg.name,
            overrides=list(cfg.overrides),
            interleaved_with=self.peers,
            config=OmegaConf.to_container(cfg, resolve=True),  # type: ignore[arg-type]
            implementation=built.implementation() if built is not None else {},
            latency_ms=latency,
            ratio_to_anchor=self.ratio,
            throughput=recording.throughput(latency.p50, passes.n_tokens(cfg), window=window) if latency else None,
            memory=self._memory(),
            check=self.verification.check if self.verification else None,
            router=built.router_properties() if built is not None else None,
            contention=self.contention,
            energy=(used := self._energy()),
            environment=env,
            started=self.started.isoformat(timespec="seconds"),
            elapsed_s=self._spent_s + time.perf_counter() - self._begun,
            warnings=[
                *self.warnings,
                *contention.warnings(self.contention),
                *recording.noise_warnings(latency, target_ci),
                *energy.warnings(used),
            ],
            **self.observed,
        )

    def _latency(self) -> Latency | None:
        return recording.latency_of(self.blocks, self.cfg.measure.target_ci, cache=self._cache, probe_ms=self.probe_ms)

    def _energy(self) -> dict[str, Any] | None:
        """The record's `energy`; None where it was not asked for, or before anything was timed."""
        if self.counter is None:
            return None
        calls = statistics.HOT_CALLS if self._cache == "hot" else 1
        return energy.summary(
            self.counter,
            [timed.seen.lap for timed in self.blocks],
            [timed.seen.throttled for timed in self.blocks],
            passes=calls * len(self.samples_ms()),
            tokens=passes.n_tokens(self.cfg),
            alone=not self.peers and self.cfg.measure.replicates == 1,
        )

    def _memory(self) -> dict[str, float | None] | None:
        if self.built is None:
            return None
        task, per_token, per_sequence = self.built.task, None, None
        if isinstance(task, Serving):
            per_token = task.cache.bytes_per_position / self.cfg.batch
            per_sequence = task.cache.state_bytes / self.cfg.batch
        return {
            "peak_mb": self.peak_bytes / 1e6 if self.peak_bytes is not None else None,
            "parameters_mb": parameter_bytes(self.built.model) / 1e6,
            "cache_bytes_per_token": per_token,
            "state_bytes_per_sequence": per_sequence,
        }

    def write(self, record: Record) -> None:
        """Write the record and everything beside it into the run's folder."""
        if os.getpid() != self._process:
            os._exit(1)  # a fork that a router made: the run is its parent's
        recording.write(record, self.blocks, self.routing_arrays, self.trace, self.timeline, self.directory)


def _kept(output: Output) -> Output:
    """A copy, for the next step may overwrite it."""
    routings = (Routing(routing.expert_ids_TK.clone(), routing.weights_TK.clone()) for routing in output.routings)
    return Output(output.y.clone(), tuple(routings))


def default_directory(cfg: DictConfig) -> Path:
    """`outputs/runs/<slug>-<cell_id>` below the current directory."""
    return Path("outputs/runs") / f"{identity.slug(cfg)}-{identity.cell_id(cfg)}"


def run(cfg: DictConfig, directory: str | Path | None = None) -> Record:
    """Execute `cfg` and leave its record in `directory` (default: `default_directory`).

    A failure while running is a record too: status `failed`, the cause in `reason`, the traceback in `run.log`. The
    record is begun before the run, so that a run that is killed has one. An earlier result of another configuration,
    code or machine is kept as `stale-*`; so is one that is ok if this one is not.

    Raises:
        ValueError: a mistake in the configuration; one line that names the key and the fix.
        UnavailableError: an implementation or a device that is not here. As after a mistake, the folder is as before.
        OSError: the directory cannot be written.
        KeyboardInterrupt: Ctrl-C; the record, `failed` with the reason `interrupted`, is written first.
    """
    shown = Path(directory) if directory is not None else default_directory(cfg)
    the_run = Run(cfg, shown)
    with Place(the_run.directory) as place:
        if place.unreadable is not None:
            the_run.warnings.append(f"an earlier result could not be read; it was renamed to {place.unreadable.name}")
        place.begin(the_run.record("failed", UNFINISHED))
        with unchanged_process():
            try:
                with recording.run_log(the_run.directory):
                    record = _execute(the_run)
            except (ValueError, UnavailableError):
                place.withdraw()
                raise
        place.end(record)
    record.directory = str(shown)
    if record.reason == "interrupted":
        raise KeyboardInterrupt
    return record


def _execute(the_run: Run) -> Record:
    status, reason = "ok", None
    try:
        with exact_products(), the_run.alone() as lock:  # fp32 means fp32, whatever this process has set
            the_run.build()
            the_run.verify()
            the_run.measure(lock)
            the_run.observe()
            the_run.export()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if _is_persons(error, the_run):
            raise
        status, reason = the_run.failed_with(error)
    record = the_run.record(status, reason)
    the_run.write(record)
    return record


def _is_persons(error: BaseException, the_run: Run) -> bool:
    """Whether it is a mistake of the person, or asks for what is not here: no run."""
    if isinstance(error, ValueError):
        return the_run.built is None or the_run.built.step is None  # before there was anything to run: a mistake
    return isinstance(error, UnavailableError)
