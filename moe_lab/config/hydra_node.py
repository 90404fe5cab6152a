"""What a YAML may set of Hydra's own node: nothing that runs code or says where files go.

Hydra makes its callbacks, launcher and log handlers before the application runs, and an experiment found through a
search path may name them. So names are compared whole, and whatever names a place or sets the environment must have
been typed. What was checked is written back without interpolations: what Hydra then reads is what was looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import PurePath
from typing import Any

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from moe_lab.config import targets, trackers

_CALLBACKS = ("moe_lab.cli.foreign.ForeignLauncher", "hydra.experimental.callbacks.LogJobReturnCallback")
_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir", "export.dir", "sweep.name")
_PLACES = (*_FOLDERS, *trackers.PLACES)
_RUN_CODE = ("sweep.slurm.setup", "sweep.slurm.python", "sweep.slurm.options")
"""Lines of shell, a command, and options of sbatch, of which some name scripts."""
_PACKAGES = ("hydra.conf", "moe_lab.conf")
_DATA = ("params", "max_batch_size", "objectives", "constraints", "n_trials", "n_jobs", "sampler", "population", "seed")
"""Keys of a sweeper that name no place and run nothing."""


def check(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Raise `ValueError`, one line, if `cfg` trusts what nobody typed. `overrides` are those of the command line."""
    typed = {text.partition("=")[0].lstrip("+~") for text in overrides}
    node = cfg.hydra
    if len(node.overrides.hydra) + len(node.overrides.task) != len(overrides):
        raise ValueError("hydra.overrides: a YAML must not set it; type the overrides on the command line.")
    for key in ("env_set", "env_copy"):
        if node.job.get(key):
            raise ValueError(f"hydra.job.{key}={node.job[key]}: not allowed; set environment variables in the shell.")
    _check_places(cfg, typed)
    _check_code(cfg, typed)
    _check_callbacks(node)
    for kind in ("launcher", "sweeper"):
        _check_plugin(node, kind, typed)
    for name in ("job_logging", "hydra_logging"):
        _check_log(cfg, name)


def check_search_path(path: ConfigSearchPath) -> None:
    """Raise `ValueError` for `pkg://...` of another package: to look into a package is to import it."""
    for element in path.get_path():
        of_a_person = element.provider == "main" or element.provider.startswith("hydra.searchpath")
        name = element.path.removeprefix("pkg://").replace("/", ".").rstrip(".")
        if of_a_person and element.path.startswith("pkg://") and name not in _PACKAGES:
            raise ValueError(f"hydra.searchpath={element.path}: imports code; use a folder (file://...).")


def _is_typed(key: str, typed: set[str]) -> bool:
    return any(key == word or key.startswith(f"{word}.") for word in typed)


# ---- where files go


@cache
def _own_places() -> dict[str, Any]:
    """The package's own value of each place, as it is written."""
    own: Any = OmegaConf.load(str(resources.files("moe_lab.conf") / "config.yaml"))
    content: Any = OmegaConf.to_container(own)
    return {key: _raw(content, key) for key in _PLACES} | {"hydra.output_subdir": ".hydra", "export.dir": None}


def _raw(content: Any, key: str) -> Any:
    for word in key.split("."):
        content = content.get(word) if isinstance(content, dict) else None
    return content


def _check_places(cfg: DictConfig, typed: set[str]) -> None:
    content: dict[str, Any] = {
        name: OmegaConf.to_container(cfg[name])
        for name in ("export", "sweep", "tracker")
        if OmegaConf.is_config(cfg.get(name))
    }
    hydra = {name: OmegaConf.to_container(cfg.hydra[name]) for name in ("run", "sweep")}
    content["hydra"] = {**hydra, "output_subdir": cfg.hydra.output_subdir}
    is_ours = cfg.hydra.job.config_name is not None  # else only Hydra's own help was composed
    for key in _PLACES:
        value = _raw(content, key)
        if value is not None and is_ours and (mistake := _no_place(key, str(value))) is not None:
            raise ValueError(mistake)
        if value is None or value == _own_places()[key] or _is_typed(key, typed) or not is_ours:
            continue
        if key == "sweep.name":
            cfg.sweep.name = value = str(cfg.sweep.name)
            if PurePath(value).name == value and value != "..":
                continue
            raise ValueError(f"sweep.name={value}: a YAML can only give a plain name; or type sweep.name=...")
        raise ValueError(f"{key}={value}: a YAML must not say where files go; type {key}=... on the command line.")
    params: Any = OmegaConf.to_container(cfg.hydra.sweeper.get("params") or OmegaConf.create({}))
    if not _is_typed("hydra.sweeper.params", typed):
        for key in params:
            _check_param(str(key), "hydra.sweeper.params")
    variants = content.get("sweep", {}).get("variants")
    if not _is_typed("sweep.variants", typed) and isinstance(variants, list):
        for entry in variants:
            for key in entry if isinstance(entry, dict) else ():
                _check_param(str(key), "sweep.variants")


def _check_code(cfg: DictConfig, typed: set[str]) -> None:
    content = {"sweep": OmegaConf.to_container(cfg.sweep)} if cfg.get("sweep") is not None else {}
    for key in _RUN_CODE:
        value = _raw(content, key)
        parts = [f"{key}.{part}" for part in value] if isinstance(value, dict) else [key] if value else []
        if untyped := [part for part in parts if not _is_typed(part, typed)]:
            raise ValueError(f"{untyped[0]}: a YAML must not say what runs in a job; type {key}=... instead.")


def _no_place(key: str, value: str) -> str | None:
    """What is wrong with a place whoever named it."""
    if value == "" and key not in ("hydra.output_subdir", "hydra.sweep.subdir"):
        return f"{key}=: names no folder; write {key}=FOLDER, or leave it out for its default."
    if key == "sweep.name" and ".." in PurePath(value).parts:
        return f"{key}={value}: must be a name below outputs; for another folder write hydra.sweep.dir=FOLDER."
    return None


@cache
def _check_param(key: str, place: str) -> None:
    """A key of `hydra.sweeper.params`, or of an entry of `sweep.variants`, becomes an override as if it were typed."""
    override = OverridesParser.create().parse_override(f"{key}=0")
    name = override.key_or_group
    if (
        override.is_hydra_override()
        or name == "hydra"
        or any(one == name or one.startswith(f"{name}.") for one in _PLACES)
    ):
        raise ValueError(f"{place}.{key}: a YAML must not sweep over it; type {name}=... instead.")


# ---- what Hydra calls


def _check_callbacks(node: DictConfig) -> None:
    if node.get("callbacks") is None:
        return
    callbacks: Any = OmegaConf.to_container(node.callbacks, resolve=True)
    for name, content in callbacks.items():
        for target in targets.named(content):
            if target not in _CALLBACKS:
                targets.locate(target, f"hydra.callbacks.{name}._target_")
    _write_back(node, "callbacks", callbacks)


def _check_plugin(node: DictConfig, kind: str, typed: set[str]) -> None:
    """An installed launcher or sweeper, by its whole name, with its own values but for what was typed."""
    if node.get(kind) is None:
        return
    content: Any = OmegaConf.to_container(node[kind], resolve=False)
    own = next((stored for stored in _installed(kind) if stored["_target_"] == content.get("_target_")), None)
    if own is None:
        raise ValueError(
            f"hydra.{kind}._target_={content.get('_target_')}: not an installed {kind}; use hydra/{kind}=NAME."
        )
    known = dict(_leaves(own, f"hydra.{kind}"))
    for key, value in _leaves(content, f"hydra.{kind}"):
        if (kind == "sweeper" and key.split(".")[2] in _DATA) or (key in known and known[key] == value):
            continue
        if key.endswith("._target_") or not _is_typed(key, typed):
            raise ValueError(f"{key}={value}: a YAML must not set it; type {key}=... on the command line.")


def _installed(kind: str) -> tuple[dict[str, Any], ...]:
    """The configuration of each launcher or sweeper that is installed."""
    return _as_plain_data(kind, len(ConfigStore.instance().repo["hydra"].get(kind, {})))


@cache
def _as_plain_data(kind: str, n_installed: int) -> tuple[dict[str, Any], ...]:
    """Once for as many as there are: every job of a sweep asks."""
    installed = ConfigStore.instance().repo["hydra"].get(kind, {}).values()
    nodes: list[Any] = [OmegaConf.to_container(OmegaConf.create(stored.node)) for stored in installed]
    assert len(nodes) == n_installed
    own = resources.files("moe_lab.conf") / "hydra" / kind
    files = [file for file in own.iterdir() if file.name.endswith(".yaml")] if own.is_dir() else []
    return (*nodes, *(yaml.safe_load(file.read_text(encoding="utf-8")) for file in files))


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}")
    elif isinstance(node, list) and node:
        for index, value in enumerate(node):
            yield from _leaves(value, f"{prefix}.{index}")
    else:
        yield prefix, node


# ---- logs

_FOLDER = "/the-folder-of-the-run"  # stands for hydra.runtime.output_dir, which is not known yet
_LOG_FILE = "moe_lab.records.store.LogFile"
_HANDLERS = {
    "logging.StreamHandler": ("stream",),
    "logging.FileHandler": ("filename", "mode", "encoding", "delay", "errors"),
    "logging.NullHandler": (),
    _LOG_FILE: ("filename", "mode", "encoding", "delay", "errors"),
}
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_KEYS = {
    "formatters": ("format", "datefmt", "style", "validate", "class", "()", "fmt", "log_colors", "reset"),
    "filters": ("name",),
    "handlers": ("class", "level", "formatter", "filters"),
    "loggers": ("level", "handlers", "propagate", "filters"),
}
_NO_LOG = {"version": 1, "root": None, "disable_existing_loggers": False}  # the default
_FORMATTERS = ("logging.Formatter", "colorlog.ColoredFormatter")


def _check_log(cfg: DictConfig, name: str) -> None:
    """A configuration for `logging.config`, of known classes, whose files lie in the folder of the run."""
    node = cfg.hydra
    if node.get(name) is None or OmegaConf.to_container(node[name], resolve=False) == _NO_LOG:
        return
    where = f"hydra.{name}"
    runtime = node.runtime.get("output_dir") if not OmegaConf.is_missing(node.runtime, "output_dir") else "???"
    with open_dict(node):
        node.runtime.output_dir = _FOLDER
        content: Any = OmegaConf.to_container(node[name], resolve=True)
        node.runtime.output_dir = runtime
    for key, value in content.items():
        if key in ("version", "disable_existing_loggers", "incremental"):
            _require(isinstance(value, bool | int), f"{where}.{key}={value}", "it must be a number, true or false")
        elif key == "root":
            _check_part({"root": value or {}}, f"{where}", "loggers")
        else:
            _require(key in _KEYS, f"{where}.{key}", f"the keys are {', '.join(_KEYS)} and root")
            _check_part(value or {}, f"{where}.{key}", key)
    for handler in (content.get("handlers") or {}).values():
        if handler["class"] == "logging.FileHandler":
            handler["class"] = _LOG_FILE  # follows no link
    _check_texts(content, where)
    _write_back(node, name, _with_folder(content))


def _require(holds: bool, what: str, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{what}: not allowed in the configuration of a log; {remedy}.")


def _check_part(entries: Any, where: str, part: str) -> None:
    _require(isinstance(entries, dict), f"{where}={entries}", "it must be a mapping")
    for name, entry in entries.items():
        here = f"{where}.{name}"
        _require(isinstance(entry, dict), f"{here}={entry}", "it must be a mapping")
        allowed: tuple[str, ...] = _KEYS[part]
        if part == "handlers":
            kind = entry.get("class")
            _require(kind in _HANDLERS, f"{here}.class={kind}", f"choose one of {', '.join(list(_HANDLERS)[:3])}")
            allowed += _HANDLERS[kind]
            _check_file(entry, here, kind)
        for key in ("class", "()") if part == "formatters" else ():
            kind = entry.get(key, _FORMATTERS[0])
            _require(kind in _FORMATTERS, f"{here}.{key}={kind}", f"choose one of {', '.join(_FORMATTERS)}")
        for key in entry:
            _require(key in allowed, f"{here}.{key}={entry[key]}", f"the keys are {', '.join(allowed)}")


def _check_file(entry: dict[str, Any], where: str, kind: str) -> None:
    if "stream" in entry:
        stream = entry["stream"]
        _require(stream in _STREAMS, f"{where}.stream={stream}", f"choose one of {', '.join(_STREAMS)}")
    if "filename" not in _HANDLERS[kind]:
        return
    name = str(entry.get("filename"))
    folder, _, file = name.rpartition("/")
    _require(
        folder == _FOLDER and file not in ("", ".", "..") and not where.startswith("hydra.hydra_logging"),
        f"{where}.filename={_with_folder(name)}",
        "the file must be ${hydra.runtime.output_dir}/NAME in hydra.job_logging",
    )
    _require(entry.get("mode", "a") in ("a", "w"), f"{where}.mode={entry.get('mode')}", "choose a or w")


def _check_texts(node: Any, where: str) -> None:
    """`logging.config` looks up `ext://...` and `cfg://...` wherever they stand."""
    for key, value in _leaves(node, where):
        if isinstance(value, str):
            is_stream = key.endswith(".stream") and value in _STREAMS
            is_plain = re.match(r"[a-zA-Z]+://", value) is None and "${" not in value
            _require(is_stream or is_plain, f"{key}={value}", "use plain text")


def _with_folder(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _with_folder(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_folder(value) for value in node]
    return node.replace(_FOLDER, "${hydra.runtime.output_dir}") if isinstance(node, str) else node


def _write_back(node: DictConfig, name: str, content: Any) -> None:
    with open_dict(node):
        node[name] = content
