"""What a run looks at after the timing, each in passes of its own: routing, phases, roofline, quality, ..."""

from __future__ import annotations

import copy
import logging
import time
import traceback
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_lab.measure import kernels, phases, profile, roofline, routing_metrics
from moe_lab.measure.agreement import agreement
from moe_lab.measure.clocks import GraphStep, HotGraphStep, Step
from moe_lab.measure.kernels import Event
from moe_lab.measure.profile import Profile
from moe_lab.measure.quality import quality
from moe_lab.measure.route_flips import compare_routes
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.moe_layer import hooked, indexed_moe_layers, moe_layers
from moe_lab.models.parameters import shareable
from moe_lab.models.serving import Decode, Prefill, Serving
from moe_lab.models.soft_moe import SoftMoELayer
from moe_lab.models.transformer_decoder import TransformerDecoder
from moe_lab.records import identity
from moe_lab.records.phases import split
from moe_lab.records.schema import LAUNCH_BOUND
from moe_lab.records.store import TIMELINE
from moe_lab.records.trace import Tokens
from moe_lab.routers.base import Routing
from moe_lab.runs import build, passes, trained
from moe_lab.runs.built import Built
from moe_lab.runs.record import reason_of
from moe_lab.runs.trace import RunTrace, layers_of, pass_tokens, source_of
from moe_lab.runs.weight_changes import WeightChanges, described
from moe_lab.workloads import text

log = logging.getLogger("moe_lab")

_BUSY = 0.8  # share of the latency in which a GPU computes; below it the host's launches decide what is measured
_STEPS_OBSERVED = 16  # of decoding, for what is a mean over steps


class Observer:
    """Looks at a run that was verified and timed.

    Attributes:
        values: what was seen, by the record's field; None where it was not asked for.
        routing_arrays: what goes into `routing.npz`.
        trace: what goes into `routes.trace`, if `measure.record_routing` asks for it.
        timeline: the events of `timeline.json.gz`, if `measure.profile` asks for it.
        warnings: of what could not be seen.
    """

    def __init__(self, built: Built, p50_ms: float, flops: int):
        """`p50_ms` is the median latency, as it stands in the record."""
        self.built, self.p50_ms, self.flops = built, p50_ms, flops
        self.cfg = built.cfg
        self.values: dict[str, Any] = {}
        self.routing_arrays: dict[str, np.ndarray] = {}
        self.trace: RunTrace | None = None
        self.timeline: list[Event] | None = None
        self.warnings: list[str] = []

    def observe(self) -> None:
        """Look at everything that `measure` asks for. What fails is a warning, and its field null.

        Raises:
            MismatchError: the timed CUDA graph did not write its outputs.
        """
        measure, step = self.cfg.measure, self.built.step
        if isinstance(step, HotGraphStep):
            step.check()
        look_at_caches = self.cfg.execution.name == "cuda_graph" and measure.caches
        for wanted, name, look in (
            (look_at_caches, "latency_hot_ms", partial(self._cache, "hot")),
            (look_at_caches, "latency_cold_ms", partial(self._cache, "cold")),
            (self.cfg.execution.name == "eager" and self.built.x.is_cuda, "gpu_busy_ms", self._gpu_busy),
            (measure.routing or measure.record_routing, "routing", self._routing),
            (measure.reference_router is not None, "agreement", self._agreement),
            (measure.phases, "phases_ms", self._phases),
            (measure.profile, "profile", self._profile),
            (measure.roofline, "roofline", self._roofline),
            (measure.quality, "quality", self._quality),
            (True, "weight_changes", self._weight_changes),
        ):
            try:
                with torch.inference_mode():
                    self.values[name] = look() if wanted else None
            except Exception as error:
                log.error("%s", traceback.format_exc())
                self.warnings.append(f"{name} was not measured: {reason_of(error)}")

    def _cache(self, cache: str) -> float:
        """Median milliseconds with the caches in that state."""
        if cache == self.cfg.measure.cache:
            return self.p50_ms
        step = self.built.make_step(cache)
        once_ms = float(step.time_block(3).ms.min()) * step.calls
        seconds = min(0.1, self.cfg.measure.max_time_s / 10)
        ms = step.time_block(min(max(int(seconds * 1e3 / max(once_ms, 1e-3)), 3), 200)).ms
        if isinstance(step, HotGraphStep):
            step.check()
        return float(np.median(ms))

    def _gpu_busy(self) -> float:
        """Milliseconds that the GPU computes in one iteration; a warning where it mostly waits for the host."""
        busy_ms = self.built.ready_step().busy_ms()
        if (share := busy_ms / self.p50_ms) < _BUSY:
            advice = "compare kernels with execution=cuda_graph"
            if (part := build.not_capturable(self.cfg, self.built.model)) is not None:
                advice = f"{part} cannot be captured, so use a larger batch"
            self.warnings.append(f"{LAUNCH_BOUND}the GPU was busy {share:.0%} of the time; {advice}")
        return busy_ms

    def _routing(self) -> dict[str, Any] | None:
        """Metrics of the routing that the run's own execution realises; of decoding the mean over some of its steps."""
        layers, decodes = indexed_moe_layers(self.built.model), self.built.decodes
        if not layers:
            return None
        ids, steps = [index for index, _ in layers], []
        trace = RunTrace(layers_of(self.built.model), source_of(self.cfg, self.built.model))
        for output in self.built.outputs(_STEPS_OBSERVED if decodes else None):
            if self.cfg.measure.record_routing:
                trace.add(self._tokens(), output.routings)
            steps.append(self._routing_stats(output.routings))
        total = [sum(of_layer[1:], of_layer[0]) for of_layer in zip(*steps, strict=True)]
        self.routing_arrays |= {
            "layer": np.array(ids),
            "counts_LE": np.stack([stats.counts_E for stats in total]),
            "mean_score_LE": np.stack([stats.prob_sum_E / max(stats.tokens, 1) for stats in total]),
            "coactivation_LEE": np.stack([stats.pairs_EE for stats in total]).astype(np.int32),
        }
        self.trace = trace if trace.passes else None
        summary = routing_metrics.mean_of([routing_metrics.summarize(stats, ids) for stats in steps])
        return {**summary, "steps": len(steps)} if decodes else summary

    def _tokens(self) -> Tokens:
        """Of the pass that the run stands at."""
        task, x = self.built.task, self.built.x
        if isinstance(task, Decode):
            return pass_tokens(x, "decode", positions=task.position_g.cpu().numpy())
        if x.dim() == 2 and x.is_floating_point():  # [B * S, D] of a layer alone
            x = x.unflatten(0, (self.cfg.batch, -1))
        return pass_tokens(x, "prefill")

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

        with hooked(moe_layers(self.built.model), look):
            self.built.task(self.built.x, forced_routing=routings)
        return routing_metrics.by_layer(stats, len(routings))

    def _agreement(self) -> dict[str, Any] | None:
        """How far routes and outputs are from those of `measure.reference_router`, in a pass of its own."""
        built = self.built
        if not moe_layers(built.model):
            return None
        if built.forced is not None:
            key, remedy = f"workload.load={self.cfg.workload.load}", "workload.load=native"
            if self.cfg.workload.load == "native":
                key, remedy = "model.timed=experts", "model.timed=layer"
            self.warnings.append(
                f"measure.reference_router: with {key} no router runs, so there are no routes to compare; use {remedy}."
            )
            return None
        begun = time.perf_counter()
        cfg = copy.copy(self.cfg)
        cfg.router, cfg.execution.name = cfg.measure.reference_router, "eager"
        reference = build.build_model(cfg, built.device, shareable(built.model))
        build.require_runnable(cfg, reference, built.device)
        if getattr(reference, "looks_ahead", False) and not getattr(built.model, "looks_ahead", False):
            raise ValueError(
                "measure.reference_router=lookahead: the run's layers do not know what the layer before read; swap the "
                "two routers."
            )
        other: nn.Module = reference
        if isinstance(built.task, Serving):
            assert isinstance(reference, TransformerDecoder) and isinstance(built.task, Prefill | Decode)
            reference.ropes.reserve(passes.n_positions(cfg), built.x.device)
            other = built.task.on(reference)
        step = built.ready_step()
        difference = agreement(built.task, other, built.x, step(), fuses=step.fuses)
        name, seconds = identity.option_name(cfg.router), time.perf_counter() - begun
        log.info("compared with router=%s in %.2f s", name, seconds)
        return {"reference": name, "seconds": seconds, **difference}

    def _phases(self) -> dict[str, Any]:
        graph_p50_ms = self.p50_ms if self.cfg.execution.name == "cuda_graph" else None
        seconds = min(1.0, self.cfg.measure.max_time_s / 4)
        measured = phases.measure_phases(self.built.make_step("natural", "eager"), seconds, graph_p50_ms)
        if graph_p50_ms is not None:
            measured |= self._phases_of_the_replay()
        phases_ms, self.values["phases_share"] = split(measured, self.p50_ms)
        return phases_ms

    def _phases_of_the_replay(self) -> dict[str, Any]:
        """What the kernels of the captured graph tell; nothing, and a warning, if their phases are not known."""
        try:
            _, found = self._profiled
            if found.has_phases:
                return found.phases_ms()
            reason = found.difference()
        except Exception as error:
            log.error("%s", traceback.format_exc())
            reason = reason_of(error)
        self.warnings.append(f"phases_ms is of an eager pass, not of the CUDA graph: {reason}")
        return {}

    @cached_property
    def _profiled(self) -> tuple[Step, Profile]:
        """Steps of the run's own execution, with the caches as they come, and their profile."""
        built = self.built
        step = built.ready_step() if self.cfg.measure.cache == "natural" else built.make_step("natural")
        eager = built.make_step("natural", "eager") if isinstance(step, GraphStep) else None
        return step, Profile(step, eager)

    def _profile(self) -> dict[str, Any]:
        """The longest kernels of a step; all of them go into the timeline."""
        step, found = self._profiled
        every = found.kernels()
        self.timeline, left_out = kernels.bounded(found.events)
        on_cuda = self.built.x.is_cuda
        return {
            "execution": self.cfg.execution.name,
            "steps": len(found.steps),
            "phases_from": profile.phases_from(step, found),
            **kernels.table(every, kernels.implementation_of(self.built.implementation())),
            "ncu": kernels.ncu_command(every, list(self.cfg.overrides)) if on_cuda else None,
            "timeline": TIMELINE,
            "timeline_left_out": left_out,
        }

    def _roofline(self) -> dict[str, Any]:
        built = self.built
        moved = built.least_bytes(_STEPS_OBSERVED)
        return roofline.roofline(moved, self.flops, self.p50_ms, built.x.device, built.dtype)

    @cached_property
    def _unchanged(self) -> nn.Module:
        """The model before its weights were changed, with the run's router; the run's own if they were not."""
        built = self.built
        if getattr(built.model, "weight_changes", None) is None:
            return built.model
        return build.build_model(trained.unchanged(self.cfg), built.device)

    def _weight_changes(self) -> dict[str, Any] | None:
        """How the weights were changed, what their formats would store, and which routes that changes."""
        built = self.built
        changes: WeightChanges | None = getattr(built.model, "weight_changes", None)
        if changes is None:
            return None
        layers, steps = moe_layers(built.model), []
        stored = [changes.stored_bytes(layer.weights, of)[0] for layer, of in zip(layers, changes.layers, strict=True)]
        for output in built.outputs(_STEPS_OBSERVED if built.decodes else None):
            used = [routing.expert_ids_TK.unique().tolist() for routing in output.routings]
            steps.append(sum(of[e] for ids, of in zip(used, stored, strict=True) for e in ids if e >= 0))
        values = {**described(changes, built.model), "stored_expert_mb": float(np.mean(steps)) / 1e6}
        keeps_experts = values["experts"] == values["experts_before"]
        if not keeps_experts or built.forced is not None or isinstance(layers[0], SoftMoELayer):
            return values  # no sets to compare
        return values | compare_routes(built.model, self._unchanged, built.x)

    def _quality(self) -> dict[str, Any] | None:
        """What the router does to predictions of the workload's text, in whole sequences; None without a text."""
        cfg, built = self.cfg, self.built
        if cfg.workload.get("name") != "text" or cfg.workload.get("ids", "text") != "text":
            return None
        if built.decodes or built.forced is not None:
            return None  # whole sequences are not what decoding computes, nor a forced load what a router chooses
        if any(passes.chunk_warning(cfg, layer.router) is not None for layer in moe_layers(built.model)):
            self.warnings.append(
                "quality: left out, because it is that of whole sequences, and the routes of chunks are others "
                f"(workload.prefill_chunk={cfg.workload.prefill_chunk})."
            )
            return None
        vocab_size: Any = built.model.vocab_size
        domains = text.read_domains(cfg.workload.path, vocab_size, getattr(built.model, "tokenizer_file", None))
        wanted = cfg.measure.quality_tokens
        n_windows = None if wanted is None else max(wanted // (cfg.batch * cfg.seq_len), 1) * cfg.batch
        windows = text.windows(domains, cfg.seq_len, n_windows, cfg.seed)
        native: nn.Module | None = None
        if isinstance(built.model, Checkpoint):
            native = built.model
            if not trained.is_as_trained(cfg):
                native = build.build_model(trained.as_trained(cfg), built.device, shareable(self._unchanged))
        numbers, counts_LGE = quality(built.model, native, windows, cfg.batch, built.device)
        if counts_LGE.size:
            self.routing_arrays |= {"domain_counts_LGE": counts_LGE, "domain": np.array(windows.names)}
        if windows.left_out:
            self.warnings.append(
                f"quality: {', '.join(windows.left_out)}: shorter than one window (seq_len tokens) and left out."
            )
        return numbers
