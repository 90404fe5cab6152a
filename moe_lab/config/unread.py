"""Keys that are read only beside certain others: who sets one that has no effect is told. Imports no torch.

What a target does not take at all is found by `targets`, what no node has by `checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from moe_lab.config.schemas import Sweep
from moe_lab.records.weight_changes import active


class _Rule(NamedTuple):
    keys: str
    """Of a group, those inside it too."""
    is_read: Callable[[DictConfig], bool]
    remedy: str
    is_refused: bool = True
    """False: the run goes on, and its record says so: it is a size of the model, or asks for more than the result."""


def _has_experts(cfg: DictConfig) -> bool:
    dense = cfg.model.get("n_dense_layers") is not None and cfg.model.n_dense_layers >= cfg.model.n_layers
    return "router" not in cfg.model.get("ignores", ()) and not dense


def own_top_k(router: DictConfig) -> str | None:
    """The key by which a router, or one inside it, has its own number of experts per token; None if the model says."""
    group, node = "router", router
    while isinstance(node, DictConfig):
        if node.get("name") == "soft":
            return f"{group}=soft"
        for key in ("top_k", "k_max"):
            if node.get(key) is not None:
                return f"{group}.{key}={node[key]}"
        group, node = f"{group}.inner", node.get("inner")
    return None


def _predicts_text(cfg: DictConfig) -> bool:
    workload = cfg.workload
    return bool(
        workload.get("name") == "text"
        and workload.get("ids", "text") == "text"
        and workload.get("phase") != "decode"
        and workload.get("load") == "native"
    )


def _longest_pass(cfg: DictConfig) -> int:
    """Tokens of a sequence in a pass that is timed."""
    workload, phase = cfg.workload, cfg.workload.get("phase", "forward")
    if phase == "decode":
        return int(workload.get("window", 1))
    chunk = workload.get("prefill_chunk") if phase == "prefill" else None
    return int(min(cfg.seq_len, chunk or cfg.seq_len))


_RULES = (
    _Rule(
        "workload.context_len workload.window",
        lambda c: c.workload.get("phase") == "decode",
        "only used with workload.phase=decode",
    ),
    _Rule(
        "workload.prefill_chunk",
        lambda c: c.workload.get("phase") in ("prefill", "decode"),
        "only used with workload.phase=prefill or decode",
    ),
    _Rule(
        "model.attention",
        lambda c: _longest_pass(c) > 1,
        "only used for timed passes over more than one token of a sequence; of decoding with workload.window=1 it "
        "computes the context, which is not timed",
    ),
    _Rule("workload.load", _has_experts, "the model has no layer of experts"),
    _Rule(
        "model.timed",
        lambda c: c.workload.get("load", "native") == "native",
        "with workload.load other than native no router runs, so the experts alone are timed",
        is_refused=False,
    ),
    _Rule("workload.zipf_exponent", lambda c: c.workload.get("load") == "zipf", "only used with workload.load=zipf"),
    _Rule(
        "workload.hot_experts workload.hot_share",
        lambda c: c.workload.get("load") == "hot",
        "only used with workload.load=hot",
    ),
    _Rule(
        "workload.trace workload.trace_layer",
        lambda c: c.workload.get("load") in ("replay", "fitted"),
        "only used with workload.load=replay or fitted",
    ),
    _Rule(
        "workload.trace_consecutive",
        lambda c: c.workload.get("load") == "replay",
        "only used with workload.load=replay",
    ),
    _Rule("workload.fit", lambda c: c.workload.get("load") == "fitted", "only used with workload.load=fitted"),
    _Rule(
        "router experts model.n_experts model.top_k",
        lambda c: _has_experts(c) or "n_dense_layers" not in c.model,
        "all layers are dense (model.n_dense_layers)",
        is_refused=False,
    ),
    _Rule(
        "model.dense_hidden_dim",
        lambda c: c.model.get("n_dense_layers", 1) > 0,
        "set model.n_dense_layers too",
        is_refused=False,
    ),
    _Rule(
        "model.top_k model.shape.top_k",
        lambda c: not _has_experts(c) or own_top_k(c.router) is None,
        "the router has its own number of experts per token",
        is_refused=False,
    ),
    _Rule("model.shape.mlp_hidden_dim", lambda c: c.model.get("name") != "router", "model=router has no experts"),
    _Rule(
        "model.shape.d_model",
        lambda c: c.model.get("name") != "router" or c.model.get("gate"),
        "only used with model.gate=true",
    ),
    _Rule(
        "model.calibration model.prune model.merge model.quantize_experts model.quantize_gate",
        _has_experts,
        "the model has no layer of experts",
    ),
    _Rule(
        "model.calibration",
        lambda c: "calibration" in active(c.model),
        "only used with model.prune, model.merge or model.quantize_experts.coldest",
        is_refused=False,
    ),
    _Rule("model.prune.by", lambda c: "prune" in active(c.model), "only used with model.prune.experts above 0", False),
    _Rule(
        "model.quantize_experts.group_size model.quantize_experts.coldest",
        lambda c: "quantize_experts" in active(c.model),
        "only used with model.quantize_experts.format",
    ),
    _Rule(
        "model.quantize_gate.group_size",
        lambda c: bool(active(c.model).get("quantize_gate", {}).get("format")),
        "only used with model.quantize_gate.format",
    ),
    _Rule("router.top_k", lambda c: c.router.get("k_max") is None, "router.k_max is used instead"),
    _Rule(
        "router.group_score",
        lambda c: c.router.get("top_groups", 0) < c.router.get("n_groups", 1),
        "only used with router.top_groups below router.n_groups",
    ),
    _Rule(
        "router.calibration_tokens",
        lambda c: c.router.get("threshold") is None,
        "only used with router.threshold=null",
    ),
    _Rule("router.factor", lambda c: c.router.get("policy") != "dropless", "not used with router.policy=dropless"),
    _Rule(
        "measure.routing measure.record_routing measure.reference_router",
        _has_experts,
        "the model has no layer of experts",
    ),
    _Rule(
        "measure.quality measure.quality_tokens",
        _predicts_text,
        "only used with workload=text of its own ids, workload.phase=forward or prefill, and workload.load=native",
        is_refused=False,
    ),
    _Rule("measure.quality_tokens", lambda c: c.measure.quality, "only used with measure.quality=true", False),
    _Rule("measure.caches", lambda c: c.execution.name == "cuda_graph", "only used with execution=cuda_graph", False),
    _Rule(
        "export.dir export.dynamic export.opset export.view export.verify export.overwrite",
        lambda c: c.export.name != "none",
        "only used with export=netron",
        is_refused=False,
    ),
    _Rule("sweep.slurm", lambda c: c.sweep.engine == "slurm", "only used with sweep.engine=slurm"),
    _Rule("sweep.timeout_s", lambda c: c.sweep.worker, "only used with sweep.worker=true"),
)
_ONLY_IN_A_SWEEP = _Rule(
    " ".join(["measure.replicates", *(f"sweep.{name}" for name in Sweep.__dataclass_fields__ if name != "wait")]),
    lambda c: False,
    "only used in a sweep (-m)",
)


def unread(cfg: DictConfig, overrides: Iterable[str], *, in_a_sweep: bool, only_refused: bool = True) -> dict[str, str]:
    """The overrides that have no effect in `cfg`, by key, each with a line that says why.

    What turns something off that is off has its effect: false, null, `workload.load=native`, one replicate.
    `only_refused` leaves out those with which a run goes on.
    """
    rules = [rule for rule in _RULES if rule.is_refused or not only_refused]
    if not in_a_sweep:
        rules.append(_ONLY_IN_A_SWEEP)
    found: dict[str, str] = {}
    ignores = () if in_a_sweep else cfg.model.get("ignores", ())  # there the cells are equal, which is said
    for override in overrides:
        key = key_of(override)
        if (group := key.split(".")[0]) in ignores:
            found[key] = f"{override}: model={cfg.model.get('name')} does not use {group}; remove it."
            continue
        value: Any = OmegaConf.select(cfg, key)
        if override.startswith("~") or value is None or value is False or (key, value) in _OFF:
            continue
        for rule in rules:
            if any(key == name or key.startswith(f"{name}.") for name in rule.keys.split()) and not rule.is_read(cfg):
                found.setdefault(key, f"{override}: has no effect; {rule.remedy}.")
    return found


_OFF = (
    ("workload.load", "native"),
    ("measure.replicates", 1),
    ("model.prune.experts", 0),
    ("model.merge.experts", 0),
    ("model.quantize_gate.noise", 0),
)


def key_of(override: str) -> str:
    """Where it stands: `router.inner` of `+router@router.inner=soft`, `model.shape` of `model/shape=x`."""
    key = override.lstrip("+~").split("=", 1)[0]
    return key.rpartition("@")[2].replace("/", ".")


def refuse_twice(overrides: Iterable[str], *, sweeps: bool = True) -> None:
    """Raise `ValueError` for a key with two values: Hydra keeps the last, and a word that is not read is a mistake.

    `sweeps`: several values of a key are possible, in a sweep.
    """
    seen: dict[str, str] = {}
    for word in overrides:
        if word.startswith("~"):  # ~KEY and +KEY=VALUE replace a node
            continue
        key = key_of(word)
        if key in seen:
            first, second = (text.partition("=")[2] for text in (seen[key], word))
            can_be_swept = sweeps and first != second and not key.startswith("hydra.")
            for_both = f", or write {key}={first},{second} with -m for both" if can_be_swept else ""
            raise ValueError(f"{word}: {key} is given twice ({seen[key]}); remove one{for_both}.")
        seen[key] = word
