"""Typed schemas of the configuration: names and types. The YAML files under conf/ hold the values. Imports no torch.

Every YAML of the package starts from one of these dataclasses, stored in Hydra's ConfigStore under `_schema/<group>`,
so that a misspelt key or a value of the wrong type is an error before anything is built. What several options share is
in a YAML under conf/_base. A user's own YAML (a router with its own keys, say) needs no schema.

A field without a default is OmegaConf's `???`: a configuration that leaves one without a value does not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore

from moe_lab.config.analyses import ANALYSES, Analyze
from moe_lab.config.router_options import ROUTERS
from moe_lab.config.trackers import TRACKERS
from moe_lab.config.weight_changes import FORMATS, IMPORTANCES, WeightChanges

DTYPES = ("fp32", "fp16", "bf16")
IMPLEMENTATIONS = ("auto", "torch", "triton")
TRANSFORMERS_EXPERTS = ("grouped_mm", "batched_mm", "deepgemm", "sonicmoe")
ATTENTIONS = ("auto", "flash", "cudnn", "efficient", "math")
ROUTER_IMPLEMENTATIONS = (*IMPLEMENTATIONS, "cuda_ext", "vllm", "sglang", "transformers")
LOADS = ("native", "balanced", "random", "zipf", "hot", "one_hot", "replay", "fitted")
FITS = ("power_law", "dirichlet")
PHASES = ("forward", "prefill", "decode")
CACHES = ("natural", "cold", "hot")
THROTTLED = ("keep", "repeat")
TIMED = ("layer", "experts")
EXECUTIONS = ("eager", "compile", "cuda_graph")
EXPORTS, VIEWS, OPSETS, AXES = ("none", "netron"), ("modules", "flat"), (18, 23), ("batch", "seq_len")
STALE = ("rerun", "keep", "refuse")
PLOTLY = ("inline", "directory", "none")
ENGINES = ("worker", "ray", "slurm")
CHOICES: dict[str, tuple[Any, ...]] = {
    "workload.load": LOADS,
    "workload.fit": FITS,
    "workload.ids": ("text", "uniform"),
    "workload.phase": PHASES,
    "measure.cache": CACHES,
    "measure.throttled": THROTTLED,
    "export.view": VIEWS,
    "export.opset": OPSETS,
    "sweep.stale": STALE,
    "sweep.plotly": PLOTLY,
    "sweep.engine": ENGINES,
    "router.impl": ROUTER_IMPLEMENTATIONS,
    "experts.impl": TRANSFORMERS_EXPERTS,
    "model.implementation": IMPLEMENTATIONS,
    "model.attention": ATTENTIONS,
    "model.timed": TIMED,
    "model.prune.by": IMPORTANCES,
    "model.quantize_experts.format": FORMATS,
    "model.quantize_gate.format": FORMATS,
}
"""The values of keys that have few: `checks` holds them to these, and a shell completes them."""
GROUPS = ("model", "router", "experts", "workload", "device", "dtype", "execution", "measure", "export")


@dataclass
class Model:
    """What every model of the package has."""

    _target_: str
    name: str
    ignores: list[str]
    """What it does not read: seq_len, router, experts."""


@dataclass
class Minimal(Model):
    """model=minimal: y = RMSNorm(x + x W^T), x [batch, hidden]."""

    hidden: int
    norm_eps: float
    implementation: str


@dataclass
class TransformerDecoder(Model):
    """model=transformer_decoder: a decoder-only Transformer with dense SwiGLU MLPs."""

    vocab_size: int
    d_model: int
    n_heads: int
    n_kv_heads: int | None
    head_dim: int | None
    n_layers: int
    mlp_hidden_dim: int
    qk_norm: str
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    implementation: str
    attention: str


@dataclass
class DecoderMoE(WeightChanges, TransformerDecoder):
    """model=decoder_moe: the same decoder with an MoE layer in place of each MLP."""

    n_experts: int
    top_k: Any
    """An integer, or a list with one for each MoE layer."""
    shared_expert_hidden_dim: int
    shared_expert_gate: bool
    n_dense_layers: int
    dense_hidden_dim: int | None


@dataclass
class Shape:
    """model/shape: the sizes of one MoE layer."""

    name: str
    n_experts: int
    top_k: int
    d_model: int
    mlp_hidden_dim: int


@dataclass
class MoELayerModel(WeightChanges, Model):
    """model=moe_layer: one MoE layer alone, T = batch * seq_len hidden states."""

    shape: Shape
    timed: str


@dataclass
class RouterModel(Model):
    """model=router: a router alone, T = batch * seq_len rows of logits or hidden states."""

    shape: Shape
    gate: bool
    sort: bool


@dataclass
class Checkpoint(WeightChanges, Model):
    """model=checkpoint: a trained model in Hugging Face format; its sizes stand in its own config.json."""

    path: str
    top_k: Any
    """An integer, or a list with one for each MoE layer, in place of what config.json says."""
    implementation: str
    attention: str


@dataclass
class Experts:
    """One way to compute the expert MLPs; `_target_` is a class derived from `moe_lab.experts.base.Experts`."""

    _target_: str
    name: str


@dataclass
class TunedExperts(Experts):
    """experts=sonic and flashinfer: kernels with tiles to choose from."""

    tune: bool


@dataclass
class DeepGemmExperts(Experts):
    """experts=deepgemm."""

    layout: str


@dataclass
class TransformersExperts(Experts):
    """experts=transformers."""

    impl: str


@dataclass
class Workload:
    """Which tokens come in, in which phase, and which load the experts get."""

    _target_: str
    name: str
    phase: str
    context_len: int
    prefill_chunk: int | None
    window: int
    load: str
    zipf_exponent: float
    hot_experts: int
    hot_share: float
    trace: str | None
    trace_layer: int | None
    trace_consecutive: bool
    fit: str


@dataclass
class Text(Workload):
    """Real text, or random ids in its place."""

    path: Any
    ids: str


@dataclass
class Device:
    name: str


@dataclass
class Dtype:
    name: str


@dataclass
class Execution:
    name: str


@dataclass
class Measure:
    """How long to look, and at what; of these keys only `cache` changes the result."""

    name: str
    routing: bool
    record_routing: bool
    reference_router: Any
    phases: bool
    roofline: bool
    quality: bool
    quality_tokens: int | None
    cache: str
    caches: bool
    energy: bool
    profile: bool
    throttled: str
    target_ci: float
    max_time_s: float
    warmup_s: float
    replicates: int


@dataclass
class Export:
    """See conf/_base/export/export.yaml."""

    name: str
    dir: str | None
    dynamic: list[str]
    opset: int
    view: str
    verify: bool
    overwrite: bool


@dataclass
class Slots:
    """How many groups run at once; see conf/config.yaml."""

    cpu: int | None
    cuda: int | None
    cpus_each: int | None


@dataclass
class Slurm:
    """The jobs of `sweep.engine=slurm`; see conf/config.yaml."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    gres: str | None
    mem: str | None
    time: str
    options: dict[str, Any]
    setup: list[str]
    python: str | None


@dataclass
class Search:
    """hydra/sweeper=moe_lab_optuna; see its YAML."""

    _target_: str
    objectives: list[str]
    constraints: Any
    n_trials: int
    n_jobs: int
    sampler: str
    population: int
    seed: int
    params: dict[str, Any]


@dataclass
class Sweep:
    """How a multirun goes about its cells; see conf/config.yaml."""

    name: str | None
    variants: Any
    compare: list[str]
    anchor: Any
    exclude: list[Any]
    interleave: bool
    worker: bool
    timeout_s: float
    stale: str
    retry_failed: bool
    engine: str
    slots: Slots
    slurm: Slurm
    require: Any
    shared: bool
    wait: bool
    fail_fast: bool
    max_cells: int
    report: bool
    plotly: str


@dataclass
class Config:
    """The top level. Group slots are `Any`, so that each option brings its own schema, and a user's option none."""

    model: Any
    router: Any
    experts: Any
    workload: Any
    device: Any
    dtype: Any
    execution: Any
    measure: Any
    export: Any
    tracker: Any
    sweep: Sweep
    experiment: Any
    debug: Any
    batch: int
    seq_len: int
    seed: int
    name: str | None
    overrides: list[str]


SCHEMAS: dict[str, dict[str, type]] = {
    "model": {
        "minimal": Minimal,
        "transformer_decoder": TransformerDecoder,
        "decoder_moe": DecoderMoE,
        "moe_layer": MoELayerModel,
        "router": RouterModel,
        "checkpoint": Checkpoint,
    },
    "model/shape": {"shape": Shape},
    "router": ROUTERS,
    "experts": {
        "experts": Experts,
        "tuned": TunedExperts,
        "deepgemm": DeepGemmExperts,
        "transformers": TransformersExperts,
    },
    "workload": {"workload": Workload, "text": Text},
    "device": {"device": Device},
    "dtype": {"dtype": Dtype},
    "execution": {"execution": Execution},
    "measure": {"measure": Measure},
    "export": {"export": Export},
    "tracker": TRACKERS,
    "analysis": ANALYSES,
    "hydra/sweeper": {"search": Search},
}


def register() -> None:
    """Put the schemas where the YAML files look for them, once."""
    store = ConfigStore.instance()
    if "base_config.yaml" in store.repo:
        return
    store.store(name="base_config", node=Config)
    store.store(name="base_analyze", node=Analyze)
    for group, schemas in SCHEMAS.items():
        for name, node in schemas.items():
            store.store(group=f"_schema/{group}", name=name, node=node)
