"""One run, end to end: build, verify, measure, observe, record.

`Run` holds the steps apart, so that a sweep can interleave `time_block` over several runs; `run` calls them in order.
"""

from __future__ import annotations

import copy
import importlib
import logging
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from moe_lab import build, targets
from moe_lab.agreement import agreement
from moe_lab.config import validate
from moe_lab.errors import ExportError, MismatchError, UnavailableError
from moe_lab.measure import environment, memory, phases, roofline, routing_metrics, statistics
from moe_lab.measure.clocks import Block, HotGraphStep, Step, make_step
from moe_lab.models import Output
from moe_lab.models.attention import Attention
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.layers import AddRMSNorm
from moe_lab.models.parameters import parameter_bytes, reference_twin, shareable
from moe_lab.models.serving import Decode, Prefill, Serving
from moe_lab.models.transformer_decoder import TransformerDecoder
from moe_lab.ops import few_tokens, segment_mm
from moe_lab.ops.library import HAS_TRITON
from moe_lab.quality import quality
from moe_lab.records import identity, store
from moe_lab.records.schema import Latency, Ratio, Record
from moe_lab.routers.base import PROPERTIES, Routing
from moe_lab.verify import Verification, exact_products, moe_layers, verify, verify_decode
from moe_lab.workloads import text

log = logging.getLogger("moe_lab")

_LOAD_TOLERANCE = 0.02  # share of the slots
_STEPS_OBSERVED = 16  # of decoding, for what is a mean over steps
_BLOCK_S = 0.1  # a block of iterations takes about so long: short beside drift, long beside bookkeeping
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the first is ten times as fast, where libyaml is


class TimedBlock(NamedTuple):
    """A block of samples and when it was timed: in which process, which round, at which place in the round."""

    replicate: int
    round: int
    order: int
    block: Block


class Run:
    """One composed configuration, executed once. Call `build`, `verify`, `time_block`..., `observe`, then `record`."""

    def __init__(self, cfg: DictConfig, directory: Path | None = None):
        """`directory` is where its files go: those of an export lie there unless `export.dir` says otherwise."""
        self._spent_s, self._begun = 0.0, time.perf_counter()
        validate(cfg)
        self.cfg = cfg
        self.directory = directory or default_directory(cfg)
        self.code_id = identity.code_id(targets.folders_of(cfg))
        self.implementation: dict[str, str] = {}
        self.started = datetime.now(UTC)
        self.device: torch.device | None = None
        self.dtype = build.DTYPES[cfg.dtype.name]
        self.warnings: list[str] = []
        self.blocks: list[TimedBlock] = []
        self.peers: list[str] = []  # cell_ids of the runs whose blocks were interleaved with these
        self.ratio: Ratio | None = None
        self.probe_ms: list[float] = []  # how fast the machine was, by replicate
        self.verification: Verification | None = None
        self.peak_bytes: int | None = None
        self.observed: dict[str, Any] = {}
        self.routing_arrays: dict[str, np.ndarray] = {}

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
        cfg = self.cfg
        self.device = build.resolve_device(cfg)
        self.model: nn.Module = build.build_model(cfg, self.device, donor)
        build.require_runnable(cfg, self.model)
        if self._export_dir is not None:
            exporter().require_exportable(cfg, self.model, self._export_dir)
        self.x = build.build_input(cfg, self.model, self.device)
        self.task, self.context = build.build_task(cfg, self.model, self.x)
        self.twin: nn.Module = reference_twin(self.model)
        self._look_at_the_input()
        self.forced = build.force_load(cfg, self.task, self.x)
        self.implementation = self._implementation()
        self.step = self._make_step()
        self._look_at_the_load()
        log.info(
            "built %s on %s: %.1f MB of parameters",
            identity.option_name(cfg.model),
            self.device,
            parameter_bytes(self.model) / 1e6,
        )

    def _make_step(self) -> Step:
        return make_step(self.cfg.execution.name, self._cache, self.task, self.x, self.forced)

    @property
    def _cache(self) -> Any:
        return self.cfg.measure.get("cache", "natural")

    def _look_at_the_input(self) -> None:
        """Warnings for a router that is told too little, and for a trained model that is told nothing."""
        for _, layer in moe_layers(self.model):
            self.warnings += [text for text in layer.router.warnings(self.n_tokens) if text not in self.warnings]
        if not isinstance(self.model, Checkpoint):
            return
        if self.cfg.workload.get("name") == "random":
            self.warnings.append(
                "workload=random: a trained model routes random ids otherwise than text, so load and latency are not "
                "those of its use; use workload=text."
            )
        if untrained := self.model.untrained():
            self.warnings.append(
                f"router={identity.option_name(self.cfg.router)}: checkpoints hold no {', '.join(untrained)} for it, "
                "so that is 0 in every layer."
            )

    def _look_at_the_load(self) -> None:
        """A warning for a layer whose experts are loaded otherwise than they were asked to be."""
        worst = build.load_difference(self.cfg, self.model, self.forced)
        if worst is not None and worst > _LOAD_TOLERANCE:
            self.warnings.append(
                f"workload.load={self.cfg.workload.load}: {worst:.1%} of the slots go elsewhere than asked, for no "
                "token has an expert twice and slots are whole; the realised load stands in the row."
            )

    @property
    def n_tokens(self) -> int:
        """Tokens of one iteration; of decoding, one for each sequence."""
        is_one = "seq_len" in self.cfg.model.get("ignores", ()) or self._decodes
        return int(self.cfg.batch) * (1 if is_one else int(self.cfg.seq_len))

    @property
    def _decodes(self) -> bool:
        return bool(self.cfg.workload.get("phase") == "decode")

    def _outputs(self, most: int | None = None) -> Iterator[Output]:
        """What the run's own execution computes: one pass, or every step of decoding (or `most`, evenly spread).

        When a step is given out, the run stands at its position; its tensors hold until the next is asked for.
        """
        if not isinstance(self.task, Decode):
            yield self.step()
            return
        n = self.task.n_steps
        for index in sorted({i * n // (most or n) for i in range(most or n)}):
            self.task.seek(index)
            yield self.step()

    def verify(self) -> None:
        """Take the peak memory of one iteration, then check the step's own output against the fp32 reference.

        Raises:
            MismatchError: the run computes something else than its label says.
            ValueError: router logits that are not finite; the message names the layer.
        """
        self.step()  # what is allocated once is allocated now
        peak_bytes = memory.peak_bytes(self.step)  # before the reference leaves its traces
        self._verify_step()
        self.peak_bytes = peak_bytes

    def _verify_step(self) -> None:
        how = {"fuses": self.step.fuses, "forced": self.forced is not None}
        if isinstance(self.task, Decode):
            assert isinstance(self.twin, TransformerDecoder) and self.context is not None
            steps = [_kept(output) for output in self._outputs()]
            self.verification = verify_decode(self.task, self.twin, self.x, steps, self.context, self.dtype, **how)
            self.task.seek(0)
        else:
            twin = self.twin
            if isinstance(self.task, Prefill):
                assert isinstance(twin, TransformerDecoder)
                twin = self.task.on(twin)
            self.verification = verify(self.task, twin, self.x, self.step(), self.dtype, **how)
        if self.x.is_cuda:
            torch.cuda.empty_cache()  # what the reference took
        log.info("verified: %s", self.verification.check)
        if self.verification.mismatch is not None:
            raise self.verification.mismatch

    def park(self) -> None:
        """Let go of what a step holds beside the model: a graph's memory, compiled code."""
        del self.step

    def unpark(self) -> None:
        """Make the step anew. An eager one is the one that was verified; another is verified again."""
        self.step = self._make_step()
        if self.cfg.execution.name != "eager":
            self._verify_step()

    def warm_up(self, block_s: float = _BLOCK_S) -> int:
        """Repeat the step for `measure.warmup_s`, at least once. Returns how many iterations fill `block_s`."""
        deadline = time.perf_counter() + self.cfg.measure.warmup_s
        while True:
            once_ms = float(self.step.time_block(1).ms[0]) * self.step.calls
            if time.perf_counter() >= deadline:
                return max(1, int(block_s * 1e3 / max(once_ms, 1e-4)))

    def time_block(self, n: int, *, replicate: int = 0, round_: int = 0, order: int = 0) -> TimedBlock:
        """Time `n` iterations and keep the samples."""
        timed = TimedBlock(replicate, round_, order, self.step.time_block(n))
        self.blocks.append(timed)
        return timed

    def samples_ms(self) -> np.ndarray:
        """Every sample so far, in order."""
        return np.concatenate([timed.block.ms for timed in self.blocks]) if self.blocks else np.empty(0)

    def measure(self) -> None:
        """Warm up, then time blocks until the median is known to `target_ci` or `max_time_s` is spent."""
        max_time_s = self.cfg.measure.max_time_s
        n = self.warm_up(min(_BLOCK_S, max_time_s))
        deadline = time.perf_counter() + max_time_s
        round_ = 0
        while True:
            self.time_block(n, round_=round_)
            round_ += 1
            samples = self.samples_ms()
            if statistics.is_known(samples, self.cfg.measure.target_ci) or time.perf_counter() >= deadline:
                break
        log.info("timed %d iterations, median %.4g ms", len(samples), np.median(samples))

    def observe(self) -> None:
        """Routing metrics, phases and roofline, each from passes of its own after the timing.

        The latency stands whether or not these succeed: one that fails is a warning, and its field null.

        Raises:
            MismatchError: the graph that was timed does not write its outputs again.
        """
        measure = self.cfg.measure
        if isinstance(self.step, HotGraphStep):
            self.step.check()
        look_at_caches = self.cfg.execution.name == "cuda_graph" and measure.get("caches", True)
        for wanted, name, look in (
            (look_at_caches, "latency_hot_ms", partial(self._observe_cache, "hot")),
            (look_at_caches, "latency_cold_ms", partial(self._observe_cache, "cold")),
            (measure.routing or measure.record_routing, "routing", self._observe_routing),
            (measure.get("reference_router") is not None, "agreement", self._observe_agreement),
            (measure.phases, "phases_ms", self._observe_phases),
            (measure.roofline, "roofline", self._observe_roofline),
            (measure.get("quality", True), "quality", self._observe_quality),
        ):
            try:
                with torch.inference_mode():
                    self.observed[name] = look() if wanted else None
            except Exception as error:
                log.error("%s", traceback.format_exc())
                self.warnings.append(f"{name} could not be observed: {_reason(error)}")

    @property
    def _export_dir(self) -> Path | None:
        if self.cfg.export.get("name", "none") == "none":
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
        try:
            self.observed["export"] = exporter().export(self.cfg, self.model, self._export_dir)
        except MismatchError as error:
            self.observed["export"] = error.found
            raise
        log.info("exported: %s", self.observed["export"])

    def _observe_cache(self, cache: str) -> float:
        """Median milliseconds with the caches in that state."""
        if cache == self._cache:
            return float(np.median(self.samples_ms()))
        step = make_step(self.cfg.execution.name, cache, self.task, self.x, self.forced)
        once_ms = float(step.time_block(3).ms.min()) * step.calls
        seconds = min(0.1, self.cfg.measure.max_time_s / 10)
        ms = step.time_block(min(max(int(seconds * 1e3 / max(once_ms, 1e-3)), 3), 200)).ms
        if isinstance(step, HotGraphStep):
            step.check()
        return float(np.median(ms))

    def _observe_routing(self) -> dict[str, Any] | None:
        """Metrics of the routing that the run's own execution realises; of decoding the mean over some of its steps."""
        layers = moe_layers(self.model)
        if not layers:
            return None
        ids, found, recorded = [index for index, _ in layers], [], []
        for output in self._outputs(_STEPS_OBSERVED if self._decodes else None):
            found.append(self._routing_stats(output.routings))
            recorded.append([routing.expert_ids_TK.cpu() for routing in output.routings])
        total = [sum(of_layer[1:], of_layer[0]) for of_layer in zip(*found, strict=True)]
        self.routing_arrays = {
            "layer": np.array(ids),
            "counts_LE": np.stack([one.counts_E for one in total]),
            "mean_score_LE": np.stack([one.prob_sum_E / max(one.tokens, 1) for one in total]),
            "coactivation_LEE": np.stack([one.pairs_EE for one in total]).astype(np.int32),
        }
        if self.cfg.measure.record_routing:
            widest = max(ids_TK.shape[1] for of_step in recorded for ids_TK in of_step)
            padded = [[_padded(ids_TK, widest) for ids_TK in of_step] for of_step in recorded]
            self.routing_arrays["expert_ids_LTK"] = np.concatenate([np.stack(of_step) for of_step in padded], axis=1)
        summary = routing_metrics.mean_of([routing_metrics.summarize(stats, ids) for stats in found])
        return {**summary, "steps": len(found)} if self._decodes else summary

    def _routing_stats(self, routings: Sequence[Routing]) -> list[routing_metrics.RoutingStats]:
        """Of each MoE layer, in an eager pass by these routings."""
        stats: list[routing_metrics.RoutingStats] = []

        def look(layer: Any, arguments: tuple[Any, ...], result: tuple[Any, ...]) -> None:
            logits_TE = layer.logits(arguments[0])
            stats.append(
                routing_metrics.RoutingStats.of(
                    logits_TE,
                    result[1],
                    seq_start_B1=arguments[1].seq_start_B1,
                    bytes_per_expert=layer.weights.bytes_per_expert,
                )
            )

        handles = [layer.register_forward_hook(look) for _, layer in moe_layers(self.model)]
        try:
            self.task(self.x, forced_routing=routings)
        finally:
            for handle in handles:
                handle.remove()
        return stats

    def _observe_agreement(self) -> dict[str, Any] | None:
        """How far routes and outputs are from those of `measure.reference_router`, in a pass of its own."""
        assert self.device is not None
        if not moe_layers(self.model):
            return None
        if self.forced is not None:
            self.warnings.append(
                f"measure.reference_router: with workload.load={self.cfg.workload.load} no router chose the experts, "
                "so there is no agreement to look for; use workload.load=native."
            )
            return None
        begun = time.perf_counter()
        cfg = copy.copy(self.cfg)
        cfg.router, cfg.execution.name = cfg.measure.reference_router, "eager"
        reference = build.build_model(cfg, self.device, shareable(self.model))
        build.require_runnable(cfg, reference)
        other = reference
        if isinstance(self.task, Serving):
            assert isinstance(reference, TransformerDecoder) and isinstance(self.task, Prefill | Decode)
            reference.rope.reserve(build.n_positions(cfg), self.x.device)
            other = self.task.on(reference)
        found = agreement(self.task, other, self.x, self.step(), fuses=self.step.fuses)
        name, seconds = identity.option_name(cfg.router), time.perf_counter() - begun
        log.info("agreement with router=%s looked at in %.2f s", name, seconds)
        return {"reference": name, "seconds": seconds, **found}

    def _observe_phases(self) -> dict[str, Any]:
        graph_p50_ms = float(np.median(self.samples_ms())) if self.cfg.execution.name == "cuda_graph" else None
        seconds = min(1.0, self.cfg.measure.max_time_s / 4)
        return phases.measure_phases(Step(self.task, self.x, self.forced), seconds, graph_p50_ms)

    def _observe_roofline(self) -> dict[str, Any]:
        assert self.verification is not None
        p50_ms = float(np.median(self.samples_ms()))
        moved = []
        for output in self._outputs(_STEPS_OBSERVED):
            read = self.x if not isinstance(self.task, Decode) else self.x.index_select(1, self.task.position_1)
            cached = self.task.cached_bytes() if isinstance(self.task, Serving) else 0
            moved.append(roofline.least_bytes(self.model, read, output) + cached)
        return roofline.roofline(
            round(float(np.mean(moved))), self.verification.flops, p50_ms, self.x.device, self.dtype
        )

    def _observe_quality(self) -> dict[str, Any] | None:
        """What the router does to predictions of the workload's text, in whole sequences; None without a text."""
        cfg = self.cfg
        if cfg.workload.get("name") != "text" or self._decodes or self.forced is not None:
            return None  # whole sequences are not what decoding computes, nor a forced load what a router chooses
        assert self.device is not None
        vocab_size: Any = self.model.vocab_size
        domains = text.read_domains(cfg.workload.path, vocab_size, getattr(self.model, "tokenizer_file", None))
        wanted = cfg.measure.get("quality_tokens")
        n_windows = None if wanted is None else max(wanted // (cfg.batch * cfg.seq_len), 1) * cfg.batch
        windows = text.windows(domains, cfg.seq_len, n_windows, cfg.seed)
        native: nn.Module | None = None
        if isinstance(self.model, Checkpoint):
            native = self.model
            if not build.is_native(cfg.router) or cfg.router.top_k is not None:
                other = copy.copy(cfg)
                other.router = build.native_router(cfg)
                native = build.build_model(other, self.device, shareable(self.model))
        found, counts_LGE = quality(self.model, native, windows, cfg.batch, self.device)
        if counts_LGE.size:
            self.routing_arrays |= {"domain_counts_LGE": counts_LGE, "domain": np.array(windows.names)}
        if windows.left_out:
            self.warnings.append(f"quality: too short for one window of seq_len tokens: {', '.join(windows.left_out)}.")
        return found

    def _implementation(self) -> dict[str, str]:
        """Who computes what."""
        ran: dict[str, str] = {}
        for module in self.model.modules():
            if isinstance(module, AddRMSNorm):
                ran["add_rms_norm"] = module.implementation
            elif isinstance(module, Attention) and self._decodes:
                ran["attention"] = "triton" if module.fuses else "torch"
        for _, layer in moe_layers(self.model):
            ran["router"] = (
                layer.router.implementation() if self.forced is None else f"forced: {self.cfg.workload.load}"
            )
            if self.forced is None and layer.multiplies_gate(self.x.new_empty(self.n_tokens, 0, dtype=self.dtype)):
                ran["gate"] = layer.router.implementation()
            ran["experts"] = layer.experts.__name__
            if layer.experts.__name__ == "grouped" and self._has_few_tokens:
                ran["experts"] = "grouped:few_tokens"
            elif layer.experts.__name__ == "grouped":
                ran["segment_mm"] = segment_mm.implementation_for(
                    self.x.device, self.dtype, *layer.weights.w_down_EDF.shape[1:]
                )
        return ran

    @property
    def _has_few_tokens(self) -> bool:
        return self.x.is_cuda and HAS_TRITON and self.n_tokens <= few_tokens.MOST

    def _properties(self) -> dict[str, bool] | None:
        """What the router declares, for a reader of the results; None for a model without one."""
        layers = moe_layers(self.model)
        return {name: bool(getattr(layers[0][1].router, name)) for name in PROPERTIES} if layers else None

    def failed_with(self, error: BaseException) -> tuple[str, str]:
        """(status, reason) of the record of a run that met `error`; the traceback goes into the log."""
        if isinstance(error, UnavailableError):
            log.warning("unavailable: %s", error)
            return "skipped", f"unavailable: {error}"
        if isinstance(error, KeyboardInterrupt):
            log.warning("interrupted")
            return "failed", "interrupted"
        if isinstance(error, MismatchError):
            log.error("%s", error)
            self.warnings.append(str(error))
            return "failed", f"mismatch: {error.where}" + (f": {error.clause}" if error.clause else "")
        log.error("%s", "".join(traceback.format_exception(error)))
        if isinstance(error, ExportError):
            return "failed", f"error: export: {error}"
        return "failed", f"error: {error}" if isinstance(error, ValueError) else _reason(error)

    def _replicates(self) -> list[np.ndarray]:
        """The samples of each process."""
        numbers = sorted({timed.replicate for timed in self.blocks})
        return [np.concatenate([t.block.ms for t in self.blocks if t.replicate == number]) for number in numbers]

    def _noise(self, latency: Latency | None) -> list[str]:
        if latency is None or latency.stable:
            return []
        if latency.ci95_low is None or latency.ci95_high is None:
            width = "unknown"
        else:
            width = f"{(latency.ci95_high - latency.ci95_low) / latency.p50:.1%} of it"
        return [
            f"latency is not stable: the median's 95 % interval is {width} after {latency.n} samples "
            f"(measure.target_ci={self.cfg.measure.target_ci}); raise measure.max_time_s or quieten the machine."
        ]

    def _throughput(self, p50_ms: float) -> dict[str, float]:
        found = {
            "tokens_per_s": self.n_tokens / (p50_ms / 1e3),
            "time_per_token_us": p50_ms * 1e3 / self.n_tokens,
        }
        return {**found, "time_per_output_token_ms": p50_ms} if self._decodes else found

    def record(self, status: str = "ok", reason: str | None = None) -> Record:
        """What is known so far, as a record."""
        cfg = self.cfg
        env = environment.capture(self.device) if self.device is not None else {}
        samples, check = self.samples_ms(), self.verification.check if self.verification else None
        latency = statistics.summarize(samples, cfg.measure.target_ci, self._replicates()) if len(samples) else None
        if latency is not None:
            latency.replicate_probe_ms = self.probe_ms
            latency.cache = self._cache
        built = hasattr(self, "model")
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
            implementation=self.implementation,
            latency_ms=latency,
            ratio_to_anchor=self.ratio,
            throughput=self._throughput(latency.p50) if latency else None,
            memory={
                "peak_mb": self.peak_bytes / 1e6 if self.peak_bytes is not None else None,
                "parameters_mb": parameter_bytes(self.model) / 1e6,
            }
            if built
            else None,
            check=check,
            router=self._properties() if built else None,
            environment=env,
            started=self.started.isoformat(timespec="seconds"),
            elapsed_s=self._spent_s + time.perf_counter() - self._begun,
            warnings=[*self.warnings, *self._noise(latency)],
            **self.observed,
        )


def _kept(output: Output) -> Output:
    """A copy, for the next step may overwrite it."""
    routings = (Routing(one.expert_ids_TK.clone(), one.weights_TK.clone()) for one in output.routings)
    return Output(output.y.clone(), tuple(routings))


def _padded(ids_TK: Tensor, width: int) -> np.ndarray:
    """Rows of `width` slots, the additional ones unused."""
    return np.asarray(nn.functional.pad(ids_TK, (0, width - ids_TK.shape[1]), value=-1).cpu())


def exporter() -> ModuleType:
    """The module that exports; what it is made with comes with an extra.

    Raises:
        UnavailableError: that is not installed.
    """
    try:
        return importlib.import_module("moe_lab.export.export")
    except ImportError as error:
        if error.name is not None and error.name.startswith("moe_lab"):
            raise
        raise UnavailableError(f"export=netron: it needs {error.name}; pip install 'moe-lab[export]'") from error


def default_directory(cfg: DictConfig) -> Path:
    """`outputs/runs/<slug>-<cell_id>` below the current directory."""
    return Path("outputs/runs") / f"{identity.slug(cfg)}-{identity.cell_id(cfg)}"


def run(cfg: DictConfig, directory: str | Path | None = None) -> Record:
    """Execute `cfg` and leave its record in `directory` (default: `default_directory`).

    A failure while running is a record too: status `failed`, the cause in `reason`, the traceback in `run.log`.

    Raises:
        ValueError: a mistake in the configuration; one line that names the key and the mend.
        UnavailableError: an implementation or a device that is not here. Its record, `skipped`, is written first.
        OSError: the directory cannot be written.
        KeyboardInterrupt: Ctrl-C; the record, `failed` with the reason `interrupted`, is written first.
    """
    the_run = Run(cfg, Path(directory) if directory is not None else None)
    folder = the_run.directory
    folder.mkdir(parents=True, exist_ok=True)
    (folder / store.LOG).unlink(missing_ok=True)
    with run_log(folder):
        return _execute(the_run, folder)


def _execute(the_run: Run, folder: Path) -> Record:
    raised: BaseException | None = None
    status, reason = "ok", None
    try:
        with exact_products():  # fp32 means fp32, whatever this process has set
            the_run.build()
            the_run.verify()
            the_run.measure()
            the_run.observe()
            the_run.export()
    except (Exception, KeyboardInterrupt) as error:
        status, reason = the_run.failed_with(error)
        if _is_persons(error, the_run):
            raised = error
    record = the_run.record(status, reason)
    write(the_run, record, folder)
    record.directory = str(folder)
    if raised is not None:
        raise raised
    return record


def _is_persons(error: BaseException, the_run: Run) -> bool:
    """Whether a single run passes the error on to the person: a mistake of theirs, or their Ctrl-C."""
    if isinstance(error, ValueError):
        return not hasattr(the_run, "step")  # before there was anything to run: a mistake
    return isinstance(error, UnavailableError | KeyboardInterrupt)


def _reason(error: BaseException) -> str:
    if memory.is_exhausted_by(error):
        return "out_of_memory"
    lines: Sequence[str] = str(error).strip().splitlines() or [""]
    return f"error: {type(error).__name__}: {lines[0]}"


def write(the_run: Run, record: Record, folder: Path) -> None:
    """`result.json` last: where it stands, the rest does too. What an earlier run left and this one has not goes."""
    if (aside := store.set_aside_unreadable(folder)) is not None:
        record.warnings.append(f"an earlier result could not be read; it is kept as {aside.name}")
    store.write_atomic(folder / "config.yaml", yaml.dump(record.config, Dumper=_DUMPER, sort_keys=False).encode())
    samples: dict[str, np.ndarray] = {}
    if the_run.blocks:
        lengths = [len(timed.block.ms) for timed in the_run.blocks]
        samples = {
            "ms": the_run.samples_ms(),
            "replicate": np.repeat([timed.replicate for timed in the_run.blocks], lengths),
            "round": np.repeat([timed.round for timed in the_run.blocks], lengths),
            "order": np.repeat([timed.order for timed in the_run.blocks], lengths),
            "stamp_s": np.concatenate([timed.block.stamp_s for timed in the_run.blocks]),
        }
    for name, arrays in ((store.SAMPLES, samples), (store.ROUTING, the_run.routing_arrays)):
        if arrays:
            store.write_arrays(folder / name, arrays)
        else:
            (folder / name).unlink(missing_ok=True)
    store.write_record(folder, record)


@contextmanager
def run_log(folder: Path) -> Iterator[TextIO]:
    """Send the `moe_lab` logger to the end of `run.log`."""
    handler = logging.FileHandler(folder / store.LOG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        assert handler.stream is not None
        yield handler.stream
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        handler.close()
