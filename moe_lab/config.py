"""Typed schemas of the configuration and the checks that types cannot express. Imports no torch.

Every YAML under conf/ that belongs to the package starts from one of these dataclasses, stored in Hydra's ConfigStore
under `_schema/<group>`, so that a misspelt key or a value of the wrong type is an error before anything is built.
A user's own YAML (a router with its own keys, say) needs no schema.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

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
_GROUPS = ("model", "router", "experts", "workload", "device", "dtype", "execution", "measure", "export")
_LABELLED = (
    *("model", "model.shape", "router", "router.inner", "experts", "workload", "measure", "export"),
    "measure.reference_router",
)


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

    _target_: str = "moe_lab.models.moe_layer.MoELayerModel"
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
class BalancedAssignment(RouterOption):
    """The best assignment at even load."""

    _target_: str = "moe_lab.routers.balanced_assignment.BalancedAssignment"


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
    """One way to compute the expert MLPs; `_target_` is a function `experts_impl(x_TD, routing, weights, *, scale)`."""

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
        "base": BalancedAssignment,
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


def nearest(word: str, allowed: Iterable[str]) -> str:
    """' Did you mean ...?' for the closest of `allowed`, or an empty string when none is close."""
    match = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {match[0]}?" if match else ""


def _one_of(cfg: DictConfig, key: str, allowed: tuple[str, ...]) -> None:
    value = OmegaConf.select(cfg, key)
    if value is not None and value not in allowed:
        raise ValueError(f"{key}={value}: it must be one of {', '.join(allowed)}.{nearest(str(value), allowed)}")


def _at_least(cfg: DictConfig, keys: str, least: float) -> None:
    for key in keys.split():
        value = OmegaConf.select(cfg, key)
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < least:
            raise ValueError(f"{key}={value}: it must be a number of at least {least:g}.")


def _more_than_zero(cfg: DictConfig, keys: str) -> None:
    for key in keys.split():
        value = OmegaConf.select(cfg, key)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{key}={value}: it must be a number above 0.")


def is_whole(cfg: DictConfig) -> bool:
    """Whether every group has an option."""
    return all(isinstance(cfg.get(group), DictConfig) for group in _GROUPS)


def validate(cfg: DictConfig) -> None:
    """Raise `ValueError` for what types cannot express. The message names the key, the value and the mend."""
    if not is_whole(cfg):
        group = next(group for group in _GROUPS if not isinstance(cfg.get(group), DictConfig))
        raise ValueError(f"{group} has no option: choose one with {group}=... (moe-lab --help lists them).")
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]} has no value: give {missing[0]}=... on the command line or in the YAML.")

    unknown = sorted(str(key) for key in cfg if key not in Config.__dataclass_fields__ and key != "hydra")
    if unknown:
        raise ValueError(f"{unknown[0]}: nothing reads such a key.{nearest(unknown[0], Config.__dataclass_fields__)}")

    _at_least(cfg, "batch seq_len", 1)
    _at_least(cfg, "seed measure.warmup_s workload.trace_layer", 0)
    _more_than_zero(cfg, "measure.target_ci measure.max_time_s sweep.timeout_s")
    _at_least(cfg, "measure.replicates", 1)
    _one_of(cfg, "measure.cache", CACHES)
    _validate_sweep(cfg)
    _one_of(cfg, "workload.phase", PHASES)
    _at_least(cfg, "workload.context_len measure.quality_tokens", 1)
    if "path" in cfg.workload and not _is_paths(cfg.workload.path):
        raise ValueError(f"workload.path={cfg.workload.path}: give a file, a folder, or a list of those.")
    _one_of(cfg, "workload.load", LOADS)
    if cfg.workload.get("load") == "replay" and not cfg.workload.get("trace"):
        raise ValueError(
            "workload.load=replay: give workload.trace=RUN_DIR, the folder of a run with measure.record_routing=true."
        )
    _at_least(cfg, "workload.hot_experts", 1)
    _at_least(cfg, "workload.zipf_exponent", 0)
    if not 0 <= cfg.workload.get("hot_share", 0.0) <= 1:
        raise ValueError(f"workload.hot_share={cfg.workload.hot_share}: it is a share of the slots, between 0 and 1.")
    _one_of(cfg, "device.name", ("auto", "cpu", "cuda"))
    _one_of(cfg, "dtype.name", DTYPES)
    _one_of(cfg, "execution.name", EXECUTIONS)
    _one_of(cfg, "export.name", EXPORTS)
    _one_of(cfg, "export.view", VIEWS)
    if cfg.export.get("opset", 23) not in OPSETS:
        raise ValueError(f"export.opset={cfg.export.opset}: it must be one of {', '.join(map(str, OPSETS))}.")
    for axis in cfg.export.get("dynamic", ()):
        if axis not in AXES:
            raise ValueError(f"export.dynamic={axis}: an axis is one of {', '.join(AXES)}.{nearest(str(axis), AXES)}")
    if _is_ours(cfg.model):
        _validate_model(cfg)
    if _is_ours(cfg.router):
        _validate_router(cfg, "router")
    reference = cfg.measure.get("reference_router")
    if reference is not None and not isinstance(reference, DictConfig):
        raise ValueError(
            f"measure.reference_router={reference}: in a YAML it is chosen in the defaults list, as "
            "`override /router@measure.reference_router: torch`."
        )
    if reference is not None and _is_ours(reference):
        _validate_router(cfg, "measure.reference_router")


def _validate_sweep(cfg: DictConfig) -> None:
    sweep = cfg.sweep
    _one_of(cfg, "sweep.stale", STALE)
    for key in sweep.compare:
        if key not in _GROUPS:
            raise ValueError(f"sweep.compare={key}: it names groups: {', '.join(_GROUPS)}.{nearest(key, _GROUPS)}")
    partials = [("sweep.exclude", partial) for partial in sweep.exclude]
    if sweep.anchor is not None:
        partials.append(("sweep.anchor", sweep.anchor))
    for at, partial in partials:
        if not isinstance(partial, DictConfig) or not partial:
            raise ValueError(f"{at}={partial}: give keys and values of a configuration, as in {{router: torch}}.")
        for key in partial:
            if key not in Config.__dataclass_fields__:
                raise ValueError(f"{at}: {key!s} is no key.{nearest(str(key), Config.__dataclass_fields__)}")
    if cfg.measure.replicates > 1 and not sweep.worker:
        raise ValueError(
            f"measure.replicates={cfg.measure.replicates}: each is a fresh process; leave out sweep.worker=false."
        )


def _is_paths(value: Any) -> bool:
    paths = value if isinstance(value, ListConfig) else [value]
    return len(paths) > 0 and all(isinstance(path, str) and path for path in paths)


def _is_ours(node: DictConfig) -> bool:
    """A user's own class has keys of its own, which are for it to check."""
    return str(node.get("_target_")).startswith("moe_lab.")


def _validate_model(cfg: DictConfig) -> None:
    sizes = "hidden vocab_size d_model n_heads n_kv_heads head_dim n_layers mlp_hidden_dim dense_hidden_dim n_experts"
    _at_least(cfg, " ".join(f"model.{key}" for key in (*sizes.split(), "top_k")), 1)
    _at_least(cfg, "model.shared_expert_hidden_dim model.n_dense_layers", 0)
    _at_least(cfg, "model.shape.n_experts model.shape.top_k model.shape.d_model model.shape.mlp_hidden_dim", 1)
    _more_than_zero(cfg, "model.norm_eps model.rope_theta")
    _one_of(cfg, "model.qk_norm", ("none", "head", "full"))
    _one_of(cfg, "model.implementation", IMPLEMENTATIONS)
    _validate_decoder(cfg.model)
    for at, sizes_of in (("model", cfg.model), ("model.shape", cfg.model.get("shape"))):
        if sizes_of is not None and sizes_of.get("top_k") and sizes_of.top_k > sizes_of.n_experts:
            raise ValueError(
                f"{at}.top_k={sizes_of.top_k}: a token cannot choose more experts than there are "
                f"({at}.n_experts={sizes_of.n_experts}); lower {at}.top_k or raise {at}.n_experts."
            )


def _validate_decoder(model: DictConfig) -> None:
    if "n_heads" not in model:
        return
    if model.head_dim is None and model.d_model % model.n_heads:
        raise ValueError(
            f"model.n_heads={model.n_heads} does not divide model.d_model={model.d_model}: "
            "choose a divisor, or give model.head_dim."
        )
    head_dim = model.head_dim or model.d_model // model.n_heads
    if head_dim % 2:
        raise ValueError(f"model.head_dim={head_dim}: rotary embeddings turn pairs, so it must be even.")
    if model.n_kv_heads is not None and model.n_heads % model.n_kv_heads:
        raise ValueError(f"model.n_kv_heads={model.n_kv_heads}: it must divide model.n_heads={model.n_heads}.")
    if model.get("n_dense_layers", 0) > model.n_layers:
        raise ValueError(
            f"model.n_dense_layers={model.n_dense_layers}: there are only model.n_layers={model.n_layers}."
        )
    if model.get("shared_expert_gate") and not model.shared_expert_hidden_dim:
        raise ValueError("model.shared_expert_gate=true: give model.shared_expert_hidden_dim too.")


def _validate_router(cfg: DictConfig, at: str) -> None:
    """Of the router whose node is at this key."""
    node = OmegaConf.select(cfg, at)
    _one_of(cfg, f"{at}.impl", ROUTER_IMPLEMENTATIONS)
    _at_least(cfg, " ".join(f"{at}.{key}" for key in ("iters", "top_k", "k_max", "steps", "calibration_tokens")), 1)
    _at_least(cfg, f"{at}.tolerance", 0)
    _more_than_zero(cfg, " ".join(f"{at}.{key}" for key in ("temperature", "factor", "scale", "rate")))
    name, impl = node.get("name"), node.get("impl")
    if name in ("torch", "triton", "cuda_ext") and impl != name:
        raise ValueError(f"{at}.impl={impl}: router={name} fixes its implementation to {name}; leave {at}.impl out.")
    if name == "soft" and node.get("top_k"):
        raise ValueError(f"{at}.top_k={node.top_k}: router=soft gives every token all experts; leave {at}.top_k out.")


def check_overrides(cfg: DictConfig, overrides: Iterable[str], *, in_a_sweep: bool = False) -> None:
    """Raise `ValueError` for an override that would do nothing or lie.

    Nothing: what the chosen model does not read (seq_len for minimal); in a sweep another model may. A lie: the name of
    an option, by which results are labelled, and the list of what a model does not read.
    """
    ignores = set(cfg.model.get("ignores", ()))
    labels = {f"{group}.name" for group in _LABELLED} | {"model.ignores", "overrides"}
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0]
        if key in labels:
            raise ValueError(f"{override}: {key} says what an option is; choose another option of the group instead.")
        if key == "workload.context_len" and cfg.workload.get("phase") != "decode" and not in_a_sweep:
            raise ValueError(f"{override}: only workload.phase=decode reads it; leave it out, or give that phase.")
        group = key.split(".")[0].split("@")[0]
        if group in ignores and not in_a_sweep:
            raise ValueError(f"{override}: model={cfg.model.get('name')} does not read {group}; leave it out.")
