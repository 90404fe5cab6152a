"""Who a result is: which configuration, which code, which machine. Known without torch.

`cell_id` names the directory and joins result sets; `code_id` and `env_id` say whether a result is still current.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from moe_lab.records import inputs
from moe_lab.records.weight_changes import active, other_keys

PACKAGE = Path(__file__).resolve().parent.parent

# Top-level keys that change nothing in the result: labels, what a sweep does with its cells, and who gets them.
_OUTSIDE = ("name", "overrides", "sweep", "tracker", "experiment", "debug", "hydra")
# Keys and groups that came later, each with the value at which it is left out: a cell that does not use it keeps the
# cell_id that it had before. Add a new key or group here with its default, and never change an entry. A key that every
# router gets is two entries, router.KEY and router.inner.KEY.
_LATER: dict[str, Any] = {
    "measure": {"cache": "natural"},
    "workload.trace_layer": None,
    "workload.window": 1,
    "workload.prefill_chunk": None,
    "workload.trace_consecutive": False,
    "workload.fit": "power_law",
    "workload.ids": "text",
    "model.timed": "layer",
    "model.top_k": None,
    "model.attention": "auto",
}
# The same for keys that only some routers got later, as others had one of that name before: by their `_target_`.
_LATER_OF_ROUTER: dict[str, dict[str, Any]] = {
    f"moe_lab.routers.{name}": {"renormalize": True}
    for name in (
        "sinkhorn.Sinkhorn",
        "dynamic_k.DynamicK",
        "batch_aware.OpportunisticActivation",
        "batch_aware.SharedBudget",
        "balancing_bias.QuantileBias",
    )
} | {"moe_lab.routers.scored_topk.ScoredTopK": {"hash_layers": 0}}
_LATER_OF_ROUTER["moe_lab.routers.batch_aware.SharedBudget"] |= {"keeps_best": True, "window": None}
_SOURCES = ("*.py", "*.cu", "*.cuh", "*.cpp", "*.h")
_TABLES = ("choices/*.json",)  # of the package alone: by what experts=auto chooses
# Rooms of the package that only talk to people or trackers, or read results: no run executes them.
_NOT_RUN = ("analyses", "api", "cli", "results", "trackers")
# Folders that lie in the package once it is installed and beside it in a checkout; so the place changes no code_id.
MAPPED = ("assets", "conf", "kernels")
ENV_FIELDS = ("device_name", "driver", "cuda", "torch", "triton", "python", "cpu", "threads")
# What `auto` means there; a result made by another choice is stale.
_ENV_FIELDS_OF_A_GPU = ("router_auto", "experts_auto")


_as_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=str).encode


def digest(value: Any) -> str:
    """12 hex digits of a JSON-like value."""
    return hashlib.sha256(_as_json(value).encode()).hexdigest()[:12]


def content(config: DictConfig | Mapping[str, Any], *, with_later: bool = False) -> dict[str, Any]:
    """Everything in a configuration (composed, or a record's `config`) that changes the result.

    What the model does not read is left out, and so is, unless `with_later`, what would change old cell_ids.
    """
    plain: Any = config
    if isinstance(config, DictConfig):
        plain = {str(key): _plain(config, key) for key in config if key not in _OUTSIDE}
    left_out = {*_OUTSIDE, *(plain["model"].get("ignores") or ())}
    found: dict[str, Any] = {
        str(key): dict(value) if isinstance(value, Mapping) else value  # a copy: keys are taken out below
        for key, value in plain.items()
        if key not in left_out
    }
    # How long and at what a run looks changes nothing; the state of the caches does. Old records have no such key.
    found["measure"] = {"cache": (plain.get("measure") or {}).get("cache", "natural")}
    # Where a pair is written does not change it, and without an export the group's other keys are not read.
    names_only = plain["export"].get("name", "none") == "none"
    for key in [key for key in found["export"] if key != "name"] if names_only else ("dir", "overwrite"):
        found["export"].pop(key, None)
    changes = active(found["model"])  # a change that is off is none
    kept = {key: found["model"][key] for key in other_keys(found["model"])}
    found["model"] = kept | {key: dict(node) for key, node in changes.items()}
    # What files hold, not where they lie.
    if changes.get("calibration", {}).get("path") is not None:
        found["model"]["calibration"]["path"] = inputs.text_id(changes["calibration"]["path"])
    if found["model"].get("path") is not None:
        found["model"]["path"] = inputs.checkpoint_id(str(found["model"]["path"]))
    if (workload := found.get("workload")) is not None:
        if workload.get("trace") is not None:
            workload["trace"] = inputs.trace_id(str(workload["trace"]))
        if workload.get("path") is not None:
            workload["path"] = inputs.text_id(workload["path"])
        if workload.get("phase") != "decode":
            workload.pop("context_len", None)
            workload.pop("window", None)
        if not _chunk(found):
            workload.pop("prefill_chunk", None)
    if with_later:
        return found
    for dotted in sorted(_LATER, key=lambda dotted: -dotted.count(".")):  # the keys of a group before the group
        found = _without(found, dotted, _LATER[dotted])
    return {key: _router_without_later(value) if key == "router" else value for key, value in found.items()}


def _chunk(config: DictConfig | Mapping[str, Any]) -> int | None:
    """Tokens of a sequence that are prefilled at once. None if all are, or if nothing is prefilled."""
    workload = config["workload"]
    lengths = {"prefill": config.get("seq_len"), "decode": workload.get("context_len")}
    length, chunk = lengths.get(workload.get("phase")), workload.get("prefill_chunk")
    return chunk if length is not None and chunk is not None and chunk < length else None


def _router_without_later(node: Any) -> Any:
    """A router's node, and those of the routers inside, without the keys of `_LATER_OF_ROUTER`."""
    if not isinstance(node, Mapping):
        return node
    later = _LATER_OF_ROUTER.get(str(node.get("_target_")), {})
    return {
        key: _router_without_later(value) if key == "inner" else value
        for key, value in node.items()
        if not (key in later and value == later[key])
    }


def _plain(config: DictConfig, key: Any) -> Any:
    """A value, resolved, as plain data; `???` if there is none yet."""
    value = "???" if OmegaConf.is_missing(config, key) else config[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _without(node: Any, dotted: str, value: Any) -> Any:
    """`node` without this key where it has this value; a copy, as a record's own configuration must not change."""
    key, _, rest = dotted.partition(".")
    if not isinstance(node, Mapping) or key not in node:
        return node
    if rest:
        return {**node, key: _without(node[key], rest, value)}
    return {name: content for name, content in node.items() if name != key} if node[key] == value else node


def cell_id(config: DictConfig | Mapping[str, Any]) -> str:
    """12 hex digits of `content`."""
    return digest(content(config))


def slug(cfg: DictConfig) -> str:
    """A readable start for the directory's name, for example `decoder_moe-sinkhorn-b2-s128-cpu-fp32`."""
    ignores = cfg.model.get("ignores", ())
    parts = [model_name(cfg.model)]
    if cfg.model.get("shape") is not None:
        parts.append(shape_name(cfg.model.shape))
    if "router" not in ignores:
        parts.append(option_name(cfg.router))
    if "experts" not in ignores:
        parts.append(option_name(cfg.experts))
    parts.append(f"b{cfg.batch}")
    if "seq_len" not in ignores:
        parts.append(f"s{cfg.seq_len}")
    if (phase := cfg.workload.get("phase", "forward")) != "forward":
        window = cfg.workload.get("window", 1)
        decode = f"{phase}{cfg.workload.context_len}" + (f"w{window}" if window > 1 else "")
        chunk = _chunk(cfg)
        parts.append((decode if phase == "decode" else phase) + (f"c{chunk}" if chunk else ""))
    parts += [cfg.device.name, cfg.dtype.name, cfg.execution.name]
    return "-".join(
        "".join(c if (c.isascii() and c.isalnum()) or c in "_." else "_" for c in str(part)) for part in parts
    )[:120]


def option_name(node: Mapping[Any, Any] | DictConfig) -> str:
    """The option's `name`; a user's YAML may leave it out, then the last word of its `_target_`."""
    return str(node.get("name") or str(node.get("_target_", "unnamed")).rsplit(".", 1)[-1])


def model_name(node: Mapping[Any, Any] | DictConfig) -> str:
    """As `option_name`; a checkpoint is called by its folder, where its path names that."""
    name = Path(str(node["path"])).name if node.get("path") is not None else ""
    return name if name not in ("", "..") else option_name(node)


def model_content(config: DictConfig | Mapping[str, Any]) -> str | None:
    """12 hex digits of a checkpoint's files; None of another model, and if they cannot be read."""
    path = config["model"].get("path")
    found = None if path is None else inputs.checkpoint_id(str(path))
    return None if found == path else found


def weight_changes(config: DictConfig | Mapping[str, Any]) -> dict[str, Any] | None:
    """What the configuration changes in the model's weights, files by their content; None if nothing."""
    return active(content(config)["model"]) or None


_SIZES = {"n_experts": "E", "top_k": "K", "d_model": "D", "mlp_hidden_dim": "F"}


def shape_name(node: Mapping[Any, Any] | DictConfig) -> str:
    """The name of a `model.shape` of the package; of other sizes these, `E48-K6-D1024-F512`, behind its own name.

    Sizes that were set beside an option keep its `name` in the configuration, so that alone may be untrue.
    """
    shape = {key: node.get(key) for key in _SIZES}
    sizes = "-".join(f"{letter}{shape[key]}" for key, letter in _SIZES.items())
    name = str(node.get("name") or "")
    known = _shapes().get(name)
    if known is not None:
        return name if known == shape else sizes
    return f"{name}-{sizes}" if name else sizes


@cache
def _shapes() -> dict[str, dict[str, Any]]:
    """The sizes of the package's own options of model/shape."""
    import yaml

    folder = importlib.resources.files("moe_lab.conf") / "model" / "shape"
    files = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    options = [yaml.safe_load(file.read_text()) for file in files]
    return {option["name"]: {key: option[key] for key in _SIZES} for option in options}


def _hash_files(roots: Iterable[Path], without: Sequence[str] = (), patterns: Sequence[str] = _SOURCES) -> str:
    """Hash of the files of `patterns` under `roots`, without what lies at their top under a name of `without`."""
    hashed = hashlib.sha256()
    for root in roots:
        for path in sorted(p for pattern in patterns for p in root.rglob(pattern) if p.is_file()):
            parts = path.relative_to(root).parts
            if parts[0] in without or any(part.startswith(".") for part in parts):
                continue  # hidden: a virtual environment, a version control folder, an editor's file
            hashed.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return hashed.hexdigest()[:12]


@cache
def _package_code_id() -> str:
    import moe_lab.kernels  # installed, it lies in the package; in a checkout, beside it

    kernels = Path(next(iter(moe_lab.kernels.__path__)))
    return _hash_files([PACKAGE, kernels], (*_NOT_RUN, *MAPPED), (*_SOURCES, *_TABLES))


def code_id(plugin_dirs: Iterable[Path] = ()) -> str:
    """12 hex digits of the source bytes that a run can execute: the package, its kernels, the plug-in folders."""
    plugins = [_hash_files([folder]) for folder in plugin_dirs]
    return digest([_package_code_id(), plugins]) if plugins else _package_code_id()


def env_id(environment: Mapping[str, Any]) -> str:
    """12 hex digits of the machine and its versions, from the fields of `measure.environment.capture`."""
    fields = {key: environment.get(key) for key in ENV_FIELDS}
    fields["python"] = ".".join(str(fields["python"]).split(".")[:2])
    fields |= {key: environment[key] for key in _ENV_FIELDS_OF_A_GPU if environment.get(key) is not None}
    return digest(fields)
