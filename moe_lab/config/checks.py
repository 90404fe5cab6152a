"""The checks of a composed configuration that types cannot express. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from moe_lab.config import entries, remedies, slurm_options, trackers
from moe_lab.config.schemas import (
    ATTENTIONS,
    AXES,
    CHOICES,
    DTYPES,
    EXECUTIONS,
    EXPORTS,
    GROUPS,
    IMPLEMENTATIONS,
    OPSETS,
    ROUTER_IMPLEMENTATIONS,
    Config,
    Device,
    Dtype,
    Execution,
    Export,
    Measure,
    Shape,
    Sweep,
)
from moe_lab.config.unread import key_of, own_top_k, unread
from moe_lab.errors import nearest
from moe_lab.records import weight_changes
from moe_lab.records.fields import ENVIRONMENT

MOST_LAYERS = 10_000
"""Far more than any model has: so many modules take minutes to make."""

_LABELLED = (
    "model",
    "model.shape",
    "router",
    "router.inner",
    "experts",
    "workload",
    "measure",
    "measure.reference_router",
    "export",
)


_OF_FEW = (
    "measure.cache",
    "measure.throttled",
    "workload.phase",
    "workload.load",
    "workload.fit",
    "workload.ids",
    "export.view",
)
"""Keys with the values of `CHOICES`, of every configuration that has them."""


def is_whole(cfg: DictConfig) -> bool:
    """Whether every group has an option."""
    return all(isinstance(cfg.get(group), DictConfig) for group in GROUPS)


def validate(cfg: DictConfig) -> None:
    """Raise `ValueError` for what types cannot express. The message names the key, the value and the fix."""
    if not is_whole(cfg):
        group = next(group for group in GROUPS if not isinstance(cfg.get(group), DictConfig))
        raise ValueError(f"{group}: choose an option with {group}=... (moe-lab --help lists them).")
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]} has no value: set {missing[0]}=... on the command line or in the YAML file.")

    _refuse_unknown_keys(cfg)
    _require_keys(cfg)
    _refuse_wide_numbers(cfg)
    _at_least(cfg, "batch seq_len", 1)
    _at_least(cfg, "seed measure.warmup_s workload.trace_layer workload.zipf_exponent", 0)
    _more_than_zero(cfg, "measure.target_ci measure.max_time_s sweep.timeout_s")
    _at_least(cfg, "measure.replicates measure.quality_tokens", 1)
    validate_sweep(cfg)
    for key in _OF_FEW:
        _one_of(cfg, key, CHOICES[key])
    _at_least(cfg, "workload.context_len workload.prefill_chunk workload.window workload.hot_experts", 1)
    if cfg.workload.phase == "decode" and cfg.seq_len % (cfg.workload.get("window") or 1):
        raise ValueError(
            f"workload.window={cfg.workload.window}: must divide seq_len={cfg.seq_len}, the number of tokens that are "
            "decoded; choose another seq_len."
        )
    if "path" in cfg.workload and not _is_paths(cfg.workload.path):
        raise ValueError(
            f"workload.path={cfg.workload.path}: must be a file, a folder, or a list of files and folders."
        )
    if (load := cfg.workload.get("load")) in ("replay", "fitted") and not cfg.workload.get("trace"):
        raise ValueError(
            f"workload.load={load}: set workload.trace to a trace file, or to the folder of a run with "
            "measure.record_routing=true."
        )
    if not 0 <= cfg.workload.get("hot_share", 0.0) <= 1:
        raise ValueError(
            f"workload.hot_share={cfg.workload.hot_share}: must be between 0 and 1 (a share of the slots)."
        )
    _one_of(cfg, "device.name", ("auto", "cpu", "cuda"))
    _one_of(cfg, "dtype.name", DTYPES)
    _one_of(cfg, "execution.name", EXECUTIONS)
    _one_of(cfg, "export.name", EXPORTS)
    if cfg.export.opset not in OPSETS:
        raise ValueError(f"export.opset={cfg.export.opset}: must be one of {', '.join(map(str, OPSETS))}.")
    for axis in cfg.export.dynamic:
        if axis not in AXES:
            raise ValueError(f"export.dynamic={axis}: must be one of {', '.join(AXES)}.{nearest(str(axis), AXES)}")
    if _is_ours(cfg.model):
        _validate_model(cfg)
    if _is_ours(cfg.router):
        _validate_router(cfg, "router")
    reference = cfg.measure.reference_router
    if reference is not None and not isinstance(reference, DictConfig):
        raise ValueError(
            f"measure.reference_router={reference}: in a YAML file set it in the defaults list: "
            "`override /router@measure.reference_router: torch`."
        )
    if reference is not None and _is_ours(reference):
        _validate_router(cfg, "measure.reference_router")


def _refuse_unknown_keys(cfg: DictConfig) -> None:
    """Of nodes without a `_target_`, whose keys nothing else looks at. Those of a target are its arguments."""
    known = [key for key in Config.__dataclass_fields__ if key != "overrides"]
    for key in sorted(str(key) for key in cfg if key not in (*known, "overrides", "hydra")):
        raise ValueError(f"{key}: unknown key; the configuration has {', '.join(known)}.{nearest(key, known)}")
    for group in ("experiment", "debug"):
        if cfg.get(group) is not None:
            raise ValueError(
                f"{group}.{next(iter(cfg[group]), '')}: unknown key; the options of {group} set keys of other groups, "
                "so their YAML files start with `# @package _global_`."
            )
    kinds: dict[str, Any] = {
        "device": Device,
        "dtype": Dtype,
        "execution": Execution,
        "measure": Measure,
        "export": Export,
        "sweep": Sweep,
    }
    if _is_ours(cfg.model) and isinstance(cfg.model.get("shape"), DictConfig):
        kinds["model.shape"] = Shape
    for group in ("model", "router", "experts", "workload"):  # of the package's own options
        if _is_ours(cfg[group]):
            refuse_unknown(cfg[group], group)
    for group, kind in kinds.items():
        known = kind.__dataclass_fields__
        for key in OmegaConf.select(cfg, group) or ():
            if key not in known:
                raise ValueError(
                    f"{group}.{key}: unknown key; {group} has {', '.join(known)}.{nearest(str(key), known)}"
                )


def _refuse_wide_numbers(node: Any, place: str = "") -> None:
    """Raise `ValueError` for an integer that no column of a table holds."""
    if isinstance(node, int) and not -(2**63) <= node < 2**63:
        raise ValueError(f"{place}={node}: must be between -2^63 and 2^63 - 1.")
    keys: Iterable[Any] = range(len(node)) if isinstance(node, ListConfig) else ()
    for key in map(str, node) if isinstance(node, DictConfig) else keys:
        if not OmegaConf.is_missing(node, key):
            _refuse_wide_numbers(node[key], f"{place}.{key}".lstrip("."))


def refuse_unknown(node: DictConfig, place: str) -> None:
    """Raise `ValueError` for a key that a node's schema does not have, here or deeper; `+` gets past Hydra's look."""
    kind: Any = OmegaConf.get_type(node)
    known = getattr(kind, "__dataclass_fields__", None)
    for key in map(str, node):
        if known is not None and key not in known and f"{place}.{key}" != "hydra.env":  # of which Hydra has no schema
            has = ", ".join(name for name in known if name not in ("_target_", "ignores"))
            raise ValueError(f"{place}.{key}: unknown key; {place} has {has}.{nearest(str(key), known)}")
        if not OmegaConf.is_missing(node, key) and isinstance(value := node._get_node(key), DictConfig):
            refuse_unknown(value, f"{place}.{key}")


def _require_keys(cfg: DictConfig) -> None:
    """Every run reads all keys of these groups, so a user's own option must have them."""
    for group, schema, base in (("measure", Measure, "/measure/default"), ("export", Export, "/_base/export/export")):
        for key in schema.__dataclass_fields__:
            if key not in cfg[group]:
                raise ValueError(
                    f"{group}.{key} has no value: start the defaults list of the YAML file with {base}@_here_."
                )


def validate_sweep(cfg: DictConfig) -> None:
    """Raise `ValueError` for a value of `sweep` or `tracker` that cannot be."""
    trackers.check(cfg)
    sweep = cfg.sweep
    _one_of(cfg, "sweep.stale", CHOICES["sweep.stale"])
    for choice in ("sweep.plotly", "sweep.engine"):
        _one_of(cfg, choice, CHOICES[choice])
    _at_least(cfg, "sweep.max_cells sweep.slots.cpu sweep.slots.cuda sweep.slots.cpus_each", 1)
    _validate_places(sweep)
    if not sweep.compare:
        raise ValueError("sweep.compare=[]: must name a group at least, such as [router].")
    for key in sweep.compare:
        if key not in GROUPS:
            raise ValueError(
                f"sweep.compare={key}: must be a list of groups: {', '.join(GROUPS)}.{nearest(key, GROUPS)}"
            )
    entries.overrides_of(sweep.variants, may_have_axes=True)  # a sweeper that does not read them refuses them
    partials = [("sweep.exclude", partial) for partial in sweep.exclude]
    if sweep.anchor is not None:
        partials.append(("sweep.anchor", sweep.anchor))
    for option, partial in partials:
        if not isinstance(partial, DictConfig) or not partial:
            raise ValueError(
                f"{option}={partial}: must be keys and values of a configuration, such as {{router: torch}}."
            )
        for key in partial:
            first = str(key).replace("/", ".").partition(".")[0]
            if first not in Config.__dataclass_fields__:
                raise ValueError(f"{option}: unknown key {key!s}.{nearest(first, Config.__dataclass_fields__)}")
    if cfg.measure.replicates > 1 and not sweep.worker:
        raise ValueError(
            f"measure.replicates={cfg.measure.replicates}: replicates need a worker process; remove sweep.worker=false."
        )


def _validate_places(sweep: DictConfig) -> None:
    """Where groups run: what has no effect without the rest."""
    has_slots = sweep.slots.cpu is not None or sweep.slots.cuda is not None
    if sweep.engine == "worker":
        if not sweep.shared:
            raise ValueError("sweep.shared=false: has no effect; only used with another sweep.engine than worker.")
        if sweep.slots.cpus_each is not None and not has_slots:
            raise ValueError(
                f"sweep.slots.cpus_each={sweep.slots.cpus_each}: has no effect; set sweep.slots.cpu or "
                "sweep.slots.cuda too."
            )
    if sweep.engine == "slurm":
        slurm_options.check(sweep)
    if not sweep.worker and (has_slots or sweep.engine != "worker"):
        key = "sweep.slots" if has_slots else f"sweep.engine={sweep.engine}"
        raise ValueError(f"{key}: a slot has a worker process; remove sweep.worker=false.")
    if sweep.require is not None:
        known = [field.name for field in ENVIRONMENT if field.name != "*"]
        if not isinstance(sweep.require, DictConfig) or not sweep.require:
            raise ValueError(
                f"sweep.require={sweep.require}: must be fields of a record's environment, such as "
                "{device_name: H200}."
            )
        for name in map(str, sweep.require):
            if name not in known:
                raise ValueError(f"sweep.require: unknown key {name}; use {', '.join(known)}.{nearest(name, known)}")


def _validate_model(cfg: DictConfig) -> None:
    sizes = "hidden vocab_size d_model n_heads n_kv_heads head_dim n_layers mlp_hidden_dim dense_hidden_dim n_experts"
    _at_least(cfg, " ".join(f"model.{key}" for key in sizes.split()), 1)
    _at_least(cfg, "model.shared_expert_hidden_dim model.n_dense_layers", 0)
    if cfg.model.get("n_layers", 1) > MOST_LAYERS and _is_ours(cfg.model):
        raise ValueError(f"model.n_layers={cfg.model.n_layers}: must be <= {MOST_LAYERS}.")
    _at_least(cfg, "model.shape.n_experts model.shape.top_k model.shape.d_model model.shape.mlp_hidden_dim", 1)
    _more_than_zero(cfg, "model.norm_eps model.rope_theta")
    _one_of(cfg, "model.qk_norm", ("none", "head", "full"))
    _one_of(cfg, "model.implementation", IMPLEMENTATIONS)
    _one_of(cfg, "model.attention", ATTENTIONS)
    _validate_decoder(cfg.model)
    shape = cfg.model.get("shape")
    if shape is not None and shape.top_k > shape.n_experts:
        raise ValueError(
            f"model.shape.top_k={shape.top_k}: must be <= model.shape.n_experts={shape.n_experts}; "
            "lower model.shape.top_k or raise model.shape.n_experts."
        )
    load = cfg.workload.get("load", "native")
    if cfg.model.get("name") == "router" and load != "native" and not cfg.model.sort:
        raise ValueError(
            f"workload.load={load}: no router runs with it, so model=router has nothing to compute; set "
            "model.sort=true to time the sorting of its slots, or use model=moe_layer."
        )
    _validate_top_k(cfg)
    _validate_weight_changes(cfg)


def _validate_top_k(cfg: DictConfig) -> None:
    """`model.top_k`; a checkpoint, whose sizes stand in its config.json, is asked again when it is built."""
    model = cfg.model
    if "top_k" not in model or (model.top_k is None and "n_experts" not in model):
        return
    n_layers = model.n_layers - model.n_dense_layers if "n_experts" in model else None
    if (mistake := top_k_mistake(model.top_k, n_layers, model.get("n_experts"))) is not None:
        raise ValueError(mistake)
    own = own_top_k(cfg.router)
    if own is not None and (isinstance(model.top_k, ListConfig) or "n_experts" not in model):
        raise ValueError(f"model.top_k={model.top_k}: contradicts {own}, which the router uses; remove one of them.")


def top_k_mistake(top_k: Any, n_layers: int | None, n_experts: int | None) -> str | None:
    """What is wrong with `model.top_k`, if anything, for so many layers with experts; None: not known yet."""
    ks = list(top_k) if isinstance(top_k, list | tuple | ListConfig) else [top_k]
    if not ks or any(not isinstance(k, int) or isinstance(k, bool) or k < 1 for k in ks):
        return f"model.top_k={top_k}: must be an integer >= 1, or a list of one for each layer with experts."
    if n_experts is not None and max(ks) > n_experts:
        return f"model.top_k={top_k}: must be <= {n_experts}, the number of the model's experts."
    if n_layers is not None and ks != [top_k] and len(ks) != n_layers:
        return f"model.top_k={top_k}: has {len(ks)} numbers, but the model has {n_layers} layers with experts."
    return None


def _validate_weight_changes(cfg: DictConfig) -> None:
    _at_least(cfg, "model.prune.experts model.merge.experts model.quantize_gate.noise", 0)
    _at_least(cfg, "model.calibration.tokens model.calibration.seq_len model.quantize_experts.coldest", 1)
    _at_least(cfg, "model.quantize_experts.group_size model.quantize_gate.group_size", 1)
    for key in ("model.prune.by", "model.quantize_experts.format", "model.quantize_gate.format"):
        _one_of(cfg, key, CHOICES[key])
    changes = weight_changes.active(cfg.model)
    if "prune" in changes and "merge" in changes:
        raise ValueError(
            f"model.merge.experts={cfg.model.merge.experts}: experts are removed already "
            f"(model.prune.experts={cfg.model.prune.experts}); set one of the two to 0."
        )
    if "calibration" in changes:
        path = cfg.model.calibration.path
        if path is None and "path" in cfg.model:
            raise ValueError(
                "model.calibration.path has no value: experts are chosen by what they do on a text; give a file or "
                "folder of other text than workload.path."
            )
        if path is not None and not _is_paths(path):
            raise ValueError(
                f"model.calibration.path={path}: must be a file, a folder, or a list of files and folders."
            )


def _validate_decoder(model: DictConfig) -> None:
    if "n_heads" not in model:
        return
    mistake = head_mistake(model.d_model, model.n_heads, model.n_kv_heads, model.head_dim, lambda key: f"model.{key}")
    if mistake is not None:
        raise ValueError(mistake)
    if model.get("n_dense_layers", 0) > model.n_layers:
        raise ValueError(f"model.n_dense_layers={model.n_dense_layers}: must be <= model.n_layers={model.n_layers}.")
    if model.get("shared_expert_gate") and not model.shared_expert_hidden_dim:
        raise ValueError("model.shared_expert_gate=true: also set model.shared_expert_hidden_dim.")


def head_mistake(
    d_model: int, n_heads: int, n_kv_heads: int | None, head_dim: int | None, name: Callable[[str], str]
) -> str | None:
    """What is wrong with the heads of a decoder, if anything; `name` gives the name under which a size was set."""
    if head_dim is None and d_model % n_heads:
        return (
            f"{name('n_heads')}={n_heads}: must divide {name('d_model')}={d_model}; "
            f"choose a divisor or set {name('head_dim')}."
        )
    if (head_dim or d_model // n_heads) % 2:
        return (
            f"{name('head_dim')}={head_dim or d_model // n_heads}: must be even, because rotary embeddings rotate "
            "pairs of dimensions."
        )
    if n_kv_heads is not None and n_heads % n_kv_heads:
        return f"{name('n_kv_heads')}={n_kv_heads}: must divide {name('n_heads')}={n_heads}."
    return None


def _validate_router(cfg: DictConfig, group: str) -> None:
    """Check the router of this group (`router` or `measure.reference_router`)."""
    node = OmegaConf.select(cfg, group)
    _one_of(cfg, f"{group}.impl", ROUTER_IMPLEMENTATIONS)
    whole = ("iters", "top_k", "k_max", "steps", "tile", "window", "calibration_tokens")
    _at_least(cfg, " ".join(f"{group}.{key}" for key in whole), 1)
    _at_least(cfg, f"{group}.tolerance {group}.hash_layers", 0)
    _more_than_zero(cfg, " ".join(f"{group}.{key}" for key in ("temperature", "factor", "scale", "rate")))
    inner = node.get("inner")
    if inner is not None and not isinstance(inner, DictConfig):
        raise ValueError(f"{group}.inner={inner}: is a group; write router@{group}.inner={inner}.")
    n_experts = OmegaConf.select(cfg, "model.n_experts") or OmegaConf.select(cfg, "model.shape.n_experts")
    for key in ("top_k", "k_max"):
        if n_experts is not None and node.get(key) is not None and node[key] > n_experts:
            raise ValueError(f"{group}.{key}={node[key]}: must be <= {n_experts}, the number of the model's experts.")
    name, impl = node.get("name"), node.get("impl")
    if name in ("torch", "triton", "cuda_ext") and impl != name:
        raise ValueError(f"{group}.impl={impl}: router={name} always uses {name}; remove {group}.impl.")
    if name == "soft" and node.get("top_k"):
        raise ValueError(
            f"{group}.top_k={node.top_k}: router=soft uses all experts for every token; remove {group}.top_k."
        )


def check_overrides(cfg: DictConfig, overrides: Iterable[str], *, in_a_sweep: bool = False) -> None:
    """Raise `ValueError` for an override that has no effect or would mislabel the results.

    No effect: a key that the chosen model does not use (seq_len for minimal), or that is only read beside others
    (`unread`); in a sweep another cell may use it.
    Mislabels: the name of an option, and `model.ignores`.
    """
    overrides = list(overrides)
    labels = {f"{group}.name" for group in _LABELLED} | {"model.ignores", "overrides"}
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0]
        if key in labels:
            raise ValueError(
                f"{override}: {key} labels the option and cannot be set; choose another option of the group."
            )
        is_number = re.fullmatch(r"-?\d+", override.partition("=")[2]) and not override.endswith(("=0", "=1"))
        if is_number and isinstance(OmegaConf.select(cfg, key), bool):  # OmegaConf takes any number for true
            raise ValueError(f"{override}: must be true or false; write {key}=true or {key}=false.")
    if not in_a_sweep:
        for line in unread(cfg, overrides, in_a_sweep=False).values():
            raise ValueError(line)


def refuse_other_keys(overrides: Iterable[str], read: Collection[str], command: str) -> None:
    """Raise `ValueError` for an override that a command does not read; `model.*` is the group and all of its keys."""
    for override in overrides:
        key = key_of(override)
        if key not in read and f"{key.split('.')[0]}.*" not in read:
            raise ValueError(f"{override}: has no effect; {command} only uses {', '.join(read)}.")


def refuse_hydras_keys(overrides: Iterable[str], *, in_a_sweep: bool) -> None:
    """Raise `ValueError` for an override of Hydra's own that is only read in a sweep, or only in a single run."""
    names = ("hydra.run",) if in_a_sweep else ("hydra.sweep", "hydra.sweeper", "hydra.launcher")
    remedy = "in a sweep the folder is hydra.sweep.dir" if in_a_sweep else "only used in a sweep (-m)"
    if isinstance(overrides, ListConfig):  # as they were typed: `${hydra.job.num}` stands for nothing yet
        overrides = map(str, OmegaConf.to_container(overrides, resolve=False) or ())
    for override in overrides:
        key = key_of(override)
        if any(key == name or key.startswith(f"{name}.") for name in names):
            raise ValueError(f"{override}: has no effect; {remedy}.")


def _one_of(cfg: DictConfig, key: str, allowed: tuple[Any, ...]) -> None:
    value = OmegaConf.select(cfg, key)
    if value is not None and value not in allowed:
        near = nearest(remedies.usual_name(key.split(".")[0], str(value)), allowed)
        raise ValueError(f"{key}={value}: must be one of {', '.join(allowed)}.{near}")


def _at_least(cfg: DictConfig, keys: str, least: float) -> None:
    for key in keys.split():
        value = OmegaConf.select(cfg, key)
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < least:
            raise ValueError(f"{key}={value}: must be a number >= {least:g}.")


def _more_than_zero(cfg: DictConfig, keys: str) -> None:
    for key in keys.split():
        value = OmegaConf.select(cfg, key)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{key}={value}: must be a number > 0.")


def _is_paths(value: Any) -> bool:
    paths = value if isinstance(value, ListConfig) else [value]
    return len(paths) > 0 and all(isinstance(path, str) and path for path in paths)


def _is_ours(node: DictConfig) -> bool:
    """Whether the class is from moe_lab. A user's own class checks its own keys."""
    return str(node.get("_target_")).startswith("moe_lab.")
