"""Typed schemas of the configuration and the checks that types cannot express. Imports no torch.

Every YAML under conf/ that belongs to the package starts from one of these dataclasses, stored in Hydra's ConfigStore
under `_schema/<group>`, so that a misspelt key or a value of the wrong type is an error before anything is built.
A user's own YAML (a router with its own keys, say) needs no schema.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from moe_lab.records.variants import COMPARE

DTYPES = ("fp32", "fp16", "bf16")
IMPLEMENTATIONS = ("auto", "torch", "triton")
ROUTER_IMPLEMENTATIONS = (*IMPLEMENTATIONS, "cuda_ext", "vllm", "sglang", "transformers")
LOADS = ("native", "balanced", "random", "zipf", "hot", "one_hot", "replay")
PHASES = ("forward", "prefill", "decode")
CACHES = ("natural", "cold", "hot")
EXECUTIONS = ("eager", "compile", "cuda_graph")
EXPORTS, VIEWS, OPSETS, AXES = ("none", "netron"), ("modules", "flat"), (18, 23), ("batch", "seq_len")
STALE = ("rerun", "keep", "refuse")
GROUPS = ("model", "router", "experts", "workload", "device", "dtype", "execution", "measure", "export")


@dataclass
class Minimal:
    """model=minimal: y = RMSNorm(x + x W^T), x [batch, hidden]."""

    _target_: str = "moe_lab.models.minimal.Minimal"
    name: str = "minimal"
    ignores: list[str] = field(default_factory=lambda: ["seq_len", "router", "experts"])
    hidden: int = 1024
    norm_eps: float = 1e-6
    implementation: str = "auto"


@dataclass
class TransformerDecoder:
    """model=transformer_decoder: a decoder-only Transformer with dense SwiGLU MLPs."""

    _target_: str = "moe_lab.models.transformer_decoder.TransformerDecoder"
    name: str = "transformer_decoder"
    ignores: list[str] = field(default_factory=lambda: ["router", "experts"])
    vocab_size: int = 32000
    d_model: int = 512
    n_heads: int = 8
    n_kv_heads: int | None = None
    head_dim: int | None = None
    n_layers: int = 6
    mlp_hidden_dim: int = 2048
    qk_norm: str = "none"
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    implementation: str = "auto"


@dataclass
class DecoderMoE(TransformerDecoder):
    """model=decoder_moe: the same decoder with an MoE layer in place of each MLP."""

    _target_: str = "moe_lab.models.decoder_moe.DecoderMoE"
    name: str = "decoder_moe"
    ignores: list[str] = field(default_factory=list)
    n_experts: int = 8
    top_k: int = 2
    shared_expert_hidden_dim: int = 0
    shared_expert_gate: bool = False
    n_dense_layers: int = 0
    dense_hidden_dim: int | None = None


@dataclass
class Shape:
    """model/shape: the sizes of one MoE layer."""

    name: str = MISSING
    n_experts: int = MISSING
    top_k: int = MISSING
    d_model: int = MISSING
    mlp_hidden_dim: int = MISSING


@dataclass
class MoELayerModel:
    """model=moe_layer: one MoE layer alone, T = batch * seq_len hidden states."""

    _target_: str = "moe_lab.models.layer_only.MoELayerModel"
    name: str = "moe_layer"
    ignores: list[str] = field(default_factory=list)
    shape: Shape = field(default_factory=Shape)


@dataclass
class RouterModel:
    """model=router: a router alone, T = batch * seq_len rows of logits."""

    _target_: str = "moe_lab.models.router_only.RouterModel"
    name: str = "router"
    ignores: list[str] = field(default_factory=lambda: ["experts"])
    n_experts: int = MISSING
    top_k: int = MISSING
    sort: bool = False
    d_model: int | None = None


@dataclass
class Checkpoint:
    """model=checkpoint: a trained model in Hugging Face format; its sizes stand in its own config.json."""

    _target_: str = "moe_lab.models.checkpoint.Checkpoint"
    name: str = "checkpoint"
    ignores: list[str] = field(default_factory=list)
    path: str = MISSING
    implementation: str = "auto"


@dataclass
class RouterOption:
    """What every router of the package has."""

    _target_: str = MISSING
    name: str = MISSING
    impl: str = "auto"
    top_k: int | None = None
    """Instead of the model's."""


@dataclass
class Native(RouterOption):
    """The router that a checkpoint was trained with."""

    _target_: str = "moe_lab.routers.native.native"


@dataclass
class SoftmaxTopK(RouterOption):
    """Softmax over the experts, then the k largest."""

    _target_: str = "moe_lab.routers.softmax_topk.SoftmaxTopK"
    renormalize: bool = True
    gate_bias: bool = False


@dataclass
class ScoredTopK(RouterOption):
    """Top-k of a score with a selection bias, within limited groups."""

    _target_: str = "moe_lab.routers.scored_topk.ScoredTopK"
    score: str = "sigmoid"
    bias: bool = False
    n_groups: int = 1
    top_groups: int = 1
    group_score: str = "top2"
    renormalize: bool = True
    scale: float = 1.0
    scales_input: bool = False


@dataclass
class Sinkhorn(RouterOption):
    """Top-k of a balanced transport plan between tokens and experts."""

    _target_: str = "moe_lab.routers.sinkhorn.Sinkhorn"
    iters: int = 10
    temperature: float = 1.0
    tolerance: float = 0.0


@dataclass
class ExpertChoice(RouterOption):
    """Every expert takes its best tokens."""

    _target_: str = "moe_lab.routers.expert_choice.ExpertChoice"
    factor: float = 1.0


@dataclass
class BASELayers(RouterOption):
    """The best assignment at even load."""

    _target_: str = "moe_lab.routers.base_layers.BASELayers"


@dataclass
class TokenHash(RouterOption):
    """A hash of the token's id."""

    _target_: str = "moe_lab.routers.token_hash.TokenHash"


@dataclass
class UniformRandom(RouterOption):
    """Drawn at random."""

    _target_: str = "moe_lab.routers.token_hash.UniformRandom"
    seed: int = 0


@dataclass
class SoftMoE(RouterOption):
    """Every token with every expert, in mixtures."""

    _target_: str = "moe_lab.routers.soft.SoftMoE"


@dataclass
class BalancingBias(RouterOption):
    """A bias fitted in a calibration pass."""

    steps: int = 20
    calibration_tokens: int = 4096


@dataclass
class LossFreeBias(BalancingBias):
    _target_: str = "moe_lab.routers.balancing_bias.LossFreeBias"
    rate: float = 0.01


@dataclass
class QuantileBias(BalancingBias):
    _target_: str = "moe_lab.routers.balancing_bias.QuantileBias"


@dataclass
class DynamicK(RouterOption):
    """Fewer experts for tokens that need fewer."""

    _target_: str = "moe_lab.routers.dynamic_k.DynamicK"
    rule: str = MISSING
    threshold: float | None = None
    k_max: int | None = None
    calibration_tokens: int = 4096


@dataclass
class OpportunisticActivation(RouterOption):
    """Few experts of its own for every token, and those of the others."""

    _target_: str = "moe_lab.routers.batch_aware.OpportunisticActivation"
    k0: int = 1


@dataclass
class SharedBudget(RouterOption):
    """A set of experts that the batch shares."""

    _target_: str = "moe_lab.routers.batch_aware.SharedBudget"
    budget: float = 0.5


@dataclass
class Capacity(RouterOption):
    """Another router with limited room at each expert."""

    _target_: str = "moe_lab.routers.capacity.Capacity"
    inner: Any = MISSING
    factor: float = 1.25
    policy: str = "weight"


@dataclass
class Experts:
    """One way to compute the expert MLPs; `_target_` is a class derived from `moe_lab.experts.base.Experts`."""

    _target_: str = MISSING
    name: str = MISSING


@dataclass
class Workload:
    """Which tokens come in, in which phase, and which load the experts get."""

    _target_: str = MISSING
    name: str = MISSING
    phase: str = "forward"
    context_len: int = 128
    load: str = "native"
    zipf_exponent: float = 1.0
    hot_experts: int = 1
    hot_share: float = 0.5
    trace: str | None = None
    trace_layer: int | None = None


@dataclass
class Text(Workload):
    """Real text."""

    _target_: str = "moe_lab.workloads.text.text_input"
    path: Any = MISSING


@dataclass
class Device:
    name: str = MISSING


@dataclass
class Dtype:
    name: str = MISSING


@dataclass
class Execution:
    name: str = MISSING


@dataclass
class Measure:
    """How long to look, and at what; of these keys only `cache` changes the result."""

    name: str = "default"
    routing: bool = True
    record_routing: bool = False
    reference_router: Any = None
    phases: bool = True
    roofline: bool = True
    quality: bool = True
    quality_tokens: int | None = 65536
    cache: str = "natural"
    caches: bool = True
    target_ci: float = 0.02
    max_time_s: float = 10.0
    warmup_s: float = 0.5
    replicates: int = 1


@dataclass
class Export:
    """See conf/export/netron.yaml."""

    name: str = "none"
    dir: str | None = None
    dynamic: list[str] = field(default_factory=lambda: ["batch", "seq_len"])
    opset: int = 23
    view: str = "modules"
    verify: bool = True
    overwrite: bool = False


@dataclass
class Sweep:
    """How a multirun goes about its cells; see conf/config.yaml."""

    name: str | None = None
    compare: list[str] = field(default_factory=lambda: list(COMPARE))
    anchor: Any = None
    exclude: list[Any] = field(default_factory=list)
    interleave: bool = True
    worker: bool = True
    timeout_s: float = 600.0
    stale: str = "rerun"
    retry_failed: bool = False
    fail_fast: bool = False
    report: bool = True


@dataclass
class Config:
    """The top level. Group slots are `Any`, so that each option brings its own schema, and a user's option none."""

    model: Any = MISSING
    router: Any = MISSING
    experts: Any = MISSING
    workload: Any = MISSING
    device: Any = MISSING
    dtype: Any = MISSING
    execution: Any = MISSING
    measure: Any = MISSING
    export: Any = MISSING
    sweep: Sweep = field(default_factory=Sweep)
    experiment: Any = None
    debug: Any = None
    batch: int = 2
    seq_len: int = 128
    seed: int = 0
    name: str | None = None
    overrides: list[str] = field(default_factory=list)


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
    "router": {
        "native": Native,
        "softmax_topk": SoftmaxTopK,
        "scored_topk": ScoredTopK,
        "sinkhorn": Sinkhorn,
        "expert_choice": ExpertChoice,
        "base": BASELayers,
        "token_hash": TokenHash,
        "random": UniformRandom,
        "soft": SoftMoE,
        "loss_free": LossFreeBias,
        "quantile": QuantileBias,
        "dynamic_k": DynamicK,
        "oea": OpportunisticActivation,
        "xshare": SharedBudget,
        "capacity": Capacity,
    },
    "experts": {"experts": Experts},
    "workload": {"workload": Workload, "text": Text},
    "device": {"device": Device},
    "dtype": {"dtype": Dtype},
    "execution": {"execution": Execution},
    "measure": {"measure": Measure},
    "export": {"export": Export},
}


def register() -> None:
    """Put the schemas where the YAML files look for them."""
    store = ConfigStore.instance()
    store.store(name="base_config", node=Config)
    for group, schemas in SCHEMAS.items():
        for name, node in schemas.items():
            store.store(group=f"_schema/{group}", name=name, node=node)
