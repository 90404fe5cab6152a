"""What a configuration became: the objects that a run executes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from moe_lab.measure import roofline
from moe_lab.measure.clocks import Step, make_step
from moe_lab.models import Output
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.gated_delta_net import GatedDeltaNet
from moe_lab.models.layers import AddLayerNorm, AddRMSNorm, Linear
from moe_lab.models.moe_layer import MoELayer, moe_layers
from moe_lab.models.parameters import reference_twin
from moe_lab.models.serving import Decode, Prefill, Serving
from moe_lab.models.transformer_decoder import Block, TransformerDecoder
from moe_lab.ops.gemv import MOST_ROWS
from moe_lab.ops.library import DTYPES, asked_of
from moe_lab.routers.base import PROPERTIES, Routing
from moe_lab.runs import build, passes
from moe_lab.workloads.forced import force_load


@dataclass
class Built:
    """The model of a configuration, its input, and the step that is repeated.

    Attributes:
        model: its output for `x` is what is verified.
        twin: the same parameters, computed in fp32 by plain torch.
        task: the model, or a phase of serving it (`build.build_task`); this is what runs.
        context: the routing of the cached context while decoding.
        forced: the routing of each MoE layer under a forced load.
        step: None while parked.
    """

    cfg: DictConfig
    device: torch.device
    dtype: torch.dtype
    model: nn.Module
    twin: nn.Module
    x: Tensor
    task: nn.Module
    context: tuple[Routing, ...] | None
    forced: tuple[Routing, ...] | None
    step: Step | None = None

    @classmethod
    def of(cls, cfg: DictConfig, device: torch.device, donor: Mapping[str, Tensor] | None = None) -> Built:
        """Everything but the step. With `donor` the model shares those parameters (`build.build_model`).

        Raises:
            UnavailableError: the device, the dtype on it, or an implementation cannot run here.
        """
        model = build.build_model(cfg, device, donor)
        build.require_runnable(cfg, model, device)
        x = build.build_input(cfg, model, device)
        task, context = build.build_task(cfg, model, x)
        forced = force_load(cfg, task, x)
        return cls(cfg, device, DTYPES[cfg.dtype.name], model, reference_twin(model), x, task, context, forced)

    def make_step(self, cache: str, execution: str | None = None) -> Step:
        """A step of this execution, the caches in the state `cache`."""
        return make_step(execution or self.cfg.execution.name, cache, self.task, self.x, self.forced)

    def ready_step(self) -> Step:
        """The step, which is not parked."""
        assert self.step is not None, "the run is parked"
        return self.step

    @property
    def decodes(self) -> bool:
        return isinstance(self.task, Decode)

    @property
    def n_tokens(self) -> int:
        """Tokens of one iteration; of decoding, one for each sequence."""
        return passes.n_tokens(self.cfg)

    def tokens(self) -> Tensor:
        """[T, 0], what a layer is given without its columns: for who asks by device, dtype and number of tokens.

        Of the first pass, if there are several.
        """
        return self._rows(passes.tokens_at_once(self.cfg)[0])

    def _rows(self, n: int) -> Tensor:
        return self.x.new_empty(n, 0, dtype=self.dtype)

    def outputs(self, most: int | None = None) -> Iterator[Output]:
        """What the run's own execution computes: one pass, or every step of decoding (or `most`, evenly spread).

        When a step is given out, the run stands at its position; its tensors hold until the next is asked for.
        """
        step = self.ready_step()
        if not isinstance(self.task, Decode):
            yield step()
            return
        n = self.task.n_steps
        wanted = {i * n // (most or n) for i in range(most or n)}
        for index in range(max(wanted) + 1) if self.task.cache.in_order else sorted(wanted):
            self.task.seek(index)
            output = step()
            if index in wanted:
                yield output

    def least_bytes(self, most: int | None = None) -> int:
        """That any implementation of a pass moves; of decoding, the mean of the steps (see `outputs`)."""
        moved = []
        for output in self.outputs(most):
            read = self.x.index_select(1, self.task.position_g) if isinstance(self.task, Decode) else self.x
            cached = self.task.cached_bytes() if isinstance(self.task, Serving) else 0
            moved.append(roofline.least_bytes(self.model, read, output) + cached)
        return round(sum(moved) / len(moved))

    def implementation(self) -> dict[str, str]:
        """Who computes what in the passes of an iteration (`passes.of_all_passes`)."""
        with asked_of(self.cfg.execution.name):
            ran = passes.of_all_passes(self._in_pass(self._rows(n)) for n in passes.tokens_at_once(self.cfg))
            attention = self._attention()
        for part in ("linear", "gate"):  # torch is named only beside a kernel
            if ran.get(part) == "torch":
                del ran[part]
        if isinstance(self.model, Checkpoint) and self.model.form is not None:
            ran["weights"] = str(self.model.form)
        if attention:
            ran["attention"] = attention
        return ran

    def _in_pass(self, x_T0: Tensor) -> dict[str, str]:
        """As `implementation`, for one pass and without attention."""
        ran: dict[str, str] = {}
        linear: dict[str, None] = {}
        joined: set[nn.Module] = set()  # norms that are computed with what reads them
        for module in self.model.modules():
            if isinstance(module, TransformerDecoder) and len(x_T0) <= MOST_ROWS:
                joined |= module.joined_norms(x_T0.new_empty(len(x_T0), module.d_model))
            if isinstance(module, AddRMSNorm):
                if module not in joined:
                    ran["add_rms_norm"] = module.implementation
            elif isinstance(module, Block) and isinstance(module.mlp, MoELayer) and self.forced is None:
                if module.mlp.norms_input(x_T0, module.mlp_norm):
                    ran["mlp_norm"] = module.mlp.router.implementation()
                    joined.add(module.mlp_norm)
            elif isinstance(module, AddLayerNorm):
                ran["add_layer_norm"] = "torch"
            elif isinstance(module, GatedDeltaNet):
                ran["delta_net"] = f"torch: {'recurrent' if len(x_T0) == self.cfg.batch else 'chunked'}"
            elif isinstance(module, Linear):
                reads_last = isinstance(self.task, Prefill) and module is self.task.decoder.head
                linear[module.implementation(self._rows(self.cfg.batch) if reads_last else x_T0)] = None
        for layer in moe_layers(self.model):
            ran["router"] = (
                layer.router.implementation() if self.forced is None else f"forced: {self.cfg.workload.load}"
            )
            if self.forced is None:
                ran["gate"] = layer.router.implementation() if layer.multiplies_gate(x_T0) else "torch"
            ran |= layer.experts.implementation(x_T0, layer.weights)
        return ran | ({"linear": "+".join(linear)} if linear else {})

    def _attention(self) -> str:
        """Who computes attention, and by which of torch's backends that of many tokens; empty if nobody does."""
        given = (self.cfg, self.model, self.device)
        if not isinstance(self.task, Decode):
            backends = passes.prefill_backends(*given)
            return f"torch:{'+'.join(backends)}" if backends else ""
        ran = {attention.decoded_by(self.task.window) for attention in passes.attentions_of(self.model)}
        if backends := passes.step_backends(*given):
            ran = ran - {"torch"} | {f"torch:{'+'.join(backends)}"}
        return "+".join(sorted(ran))

    def router_properties(self) -> dict[str, bool | None] | None:
        """What the router declares, None where it says nothing; None for a model without one."""
        layers = moe_layers(self.model)
        declared = {name: getattr(layers[0].router, name) for name in PROPERTIES} if layers else None
        return declared and {name: None if value is None else bool(value) for name, value in declared.items()}
