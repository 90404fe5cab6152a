"""From a `_target_` in a configuration to the Python object, and whom to trust with that.

A `_target_` is code execution. It may name what is defined in `moe_lab`'s models, routers, experts and workloads, or in
a module whose file lies under a folder that the person gave as `--config-dir` (or `config_dir=`). Nothing else widens
that: no search path, no YAML, no result folder, no checkpoint.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import hydra.utils
from omegaconf import DictConfig, OmegaConf

from moe_lab.errors import nearest

_trusted: list[Path] = []
_BUILDABLE = ("moe_lab.models.", "moe_lab.routers.", "moe_lab.experts.", "moe_lab.workloads.")
_ABOUT = ("_target_", "name")  # keys of an option that are no arguments of its target


def trust(config_dir: str | Path) -> Path:
    """Let `_target_` name modules under `config_dir`, which goes on `sys.path`."""
    folder = Path(config_dir).resolve()
    if not str(config_dir) or not folder.is_dir():
        raise ValueError(f"--config-dir {config_dir}: folder not found.")
    if folder not in _trusted:
        _trusted.append(folder)
        sys.path.insert(0, str(folder))
    return folder


def trusted() -> list[str]:
    """The trusted folders, for another process."""
    return [str(folder) for folder in _trusted]


def folders_of(cfg: DictConfig) -> list[Path]:
    """The trusted folders that some `_target_` of `cfg` lies in, sorted: the plug-ins whose code a run executes."""
    content = OmegaConf.to_container(cfg, resolve=True)
    modules = [str(target).rpartition(".")[0].split(".") for target in _targets(content)]
    return sorted(folder for folder in _trusted if any(_holds(folder, module) for module in modules))


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)


def _check_trusted(target: str) -> None:
    """Raise `ValueError` unless importing `target` runs only trusted files. Nothing is imported to find that out."""
    module, _, _ = target.rpartition(".")
    if module.startswith(_BUILDABLE):
        return
    folder = next((folder for folder in _trusted if _holds(folder, module.split("."))), None)
    if folder is None:
        raise ValueError(
            f"_target_={target}: not trusted. It must be defined in moe_lab's models, routers, experts or workloads, "
            "or in a folder given with --config-dir."
        )
    name = module.split(".")[0]
    loaded = getattr(sys.modules.get(name), "__file__", None)
    if name in sys.modules and (loaded is None or folder not in Path(loaded).resolve().parents):
        raise ValueError(f"_target_={target}: another module named {name} is already loaded; rename yours.")


def _holds(folder: Path, module: list[str]) -> bool:
    """Whether every file that importing `module` from `folder` runs lies, links followed, in `folder`."""
    place = folder
    for depth, name in enumerate(module):
        package = place / name  # a package hides a module of its name
        file = package / "__init__.py" if package.is_dir() else place / f"{name}.py"
        if not file.is_file() or folder not in file.resolve().parents:
            return False
        if not package.is_dir() and depth < len(module) - 1:
            return False
        place = package
    return bool(module[0])


def locate(target: str) -> Any:
    """The object that the dotted path `target` names. Raises `ValueError` if it is not trusted or does not exist."""
    _check_trusted(str(target))
    module_name, _, attribute = str(target).rpartition(".")
    try:
        obj = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"_target_={target}: {error}") from error
    if module_name.startswith(_BUILDABLE) and getattr(obj, "__module__", None) != module_name:
        raise ValueError(
            f"_target_={target}: {attribute} is not defined in {module_name}, only imported; "
            "use the module that defines it."
        )
    return obj


def instantiate(node: DictConfig, group: str = "", /, **arguments: Any) -> Any:
    """Call the target of `node` with its keys and `arguments` (any objects). Nested nodes are instantiated first.

    Raises:
        ValueError: a key that the target does not take; it is called `group.KEY`.
    """
    if "_target_" not in node:
        raise ValueError(f"{_called(group, '_target_')} has no value: set it in the YAML file.")
    target, keys = locate(node._target_), keys_of(node, group)
    require_keys(target, keys, group, given=arguments)
    try:
        return target(**keys, **arguments)
    except TypeError as error:
        if (key := _passed_on_in_vain(error, keys)) is None:
            raise
        raise ValueError(unknown_key(target, key, group, given=arguments)) from error


def keys_of(node: DictConfig, group: str) -> dict[str, Any]:
    """The keys of `node` that are arguments of its target; nested nodes are instantiated."""
    content = OmegaConf.to_container(node, resolve=True)
    assert isinstance(content, dict)
    for target in _targets(content):
        locate(target)
    keys = {str(key): value for key, value in content.items() if key not in _ABOUT}
    return {key: _instantiate_nested(value, _called(group, key)) for key, value in keys.items()}


def require_keys(
    target: Callable[..., Any],
    keys: Collection[str],
    group: str,
    *,
    given: Collection[str] = (),
    n_given: int = 0,
    is_partial: bool = False,
) -> None:
    """Raise `ValueError` unless a call of `target` with `keys` takes all of them and lacks none.

    Args:
        group: the keys are called `group.KEY`.
        given: arguments that the caller adds, by name.
        n_given: how many it adds by place, before those.
        is_partial: others are given later, so none is missing.
    """
    every = list(inspect.signature(target).parameters.values())
    parameters = [p for p in every[n_given:] if p.name not in given]
    named = {p.name for p in parameters if p.kind in _BY_NAME}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in keys:
        if key not in named and (not takes_any or key in given or key in {p.name for p in every}):
            raise ValueError(unknown_key(target, key, group, given=given, n_given=n_given))
    for p in [] if is_partial else parameters:
        if p.default is p.empty and p.kind is p.POSITIONAL_ONLY:
            raise ValueError(f"{_called(group, p.name)}: {_name(target)} must take it by name, not by place only.")
        if p.default is p.empty and p.kind in _BY_NAME and p.name not in keys:
            raise ValueError(
                f"{_called(group, p.name)}: missing; {_name(target)} requires it. Set it in the YAML file."
            )


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def unknown_key(target: Callable[..., Any], key: str, group: str, *, given: Collection[str], n_given: int = 0) -> str:
    """One line: `target` does not take this key, but these."""
    taken = [name for name in _taken(target, n_given) if name not in given]
    return (
        f"{_called(group, key)}: unknown key; {_name(target)} takes {', '.join(taken) or 'no keys'}."
        f"{nearest(key, taken)}"
    )


def _taken(target: Any, n_given: int = 0) -> list[str]:
    """The arguments of `target` by name; a class that takes any is thought to pass them on to its base."""
    parameters = list(inspect.signature(target).parameters.values())[n_given:]
    names = [p.name for p in parameters if p.kind in _BY_NAME]
    if inspect.isclass(target) and any(p.kind is p.VAR_KEYWORD for p in parameters):
        bases = [base for base in target.__mro__[1:-1] if "__init__" in vars(base)]
        names += [name for name in (_taken(bases[0]) if bases else []) if name not in names]
    return names


def _passed_on_in_vain(error: TypeError, keys: Collection[str]) -> str | None:
    """Which of `keys`, taken as `**keys` and passed on, nobody took in the end."""
    found = re.search(r"got an unexpected keyword argument '(\w+)'", str(error))
    return found[1] if found is not None and found[1] in keys else None


def _called(group: str, key: str) -> str:
    return f"{group}.{key}" if group else key


def _name(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


_HYDRAS_KEYS = ("_target_", "_args_", "_partial_", "_convert_", "_recursive_")  # of a nested node


def _instantiate_nested(value: Any, place: str) -> Any:
    """Hydra's own instantiation, for a value that holds nodes. Every target in it was found trustworthy before."""
    if not any(_targets(value)):
        return value
    _require_nested_keys(value, place)
    options: dict[str, Any] = {}
    if "_execution_whitelist_" in inspect.signature(hydra.utils.instantiate).parameters:  # Hydra 1.4 wants to be told
        options["_execution_whitelist_"] = list(_targets(value))
    return hydra.utils.instantiate(value, **options)


def _require_nested_keys(value: Any, place: str) -> None:
    """`require_keys` of every node in `value`, which stands at the key `place`."""
    if isinstance(value, dict):
        if "_target_" in value:
            n_given, is_partial = len(value.get("_args_", ())), bool(value.get("_partial_"))
            keys = [key for key in value if key not in _HYDRAS_KEYS]
            require_keys(locate(value["_target_"]), keys, place, n_given=n_given, is_partial=is_partial)
        for key, item in value.items():
            _require_nested_keys(item, f"{place}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _require_nested_keys(item, f"{place}[{index}]")


_HYDRAS_OWN = ("hydra._internal.core_plugins.", "hydra.experimental.callbacks.", "hydra_plugins.")
_OUR_CALLBACK = "moe_lab.cli.foreign.ForeignLauncher"
_LOGGING = ("logging.", "colorlog.", "hydra.", "ext://sys.")


def check_hydra_node(node: DictConfig) -> None:
    """Raise `ValueError` if Hydra's own configuration names code that is not trusted: a callback, a log handler.

    Hydra would run it before any of ours, and a YAML found through a search path may set it.
    """
    for name in ("callbacks", "launcher", "sweeper"):  # resolved: an interpolation may stand for a whole node
        part = node.get(name)
        for target in _targets(OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part):
            if not str(target).startswith(_HYDRAS_OWN) and target != _OUR_CALLBACK:
                _check_trusted(str(target))
    content = OmegaConf.to_container(node, resolve=False)
    assert isinstance(content, dict)
    for value in _log_factories(content):
        if not str(value).startswith(_LOGGING):
            raise ValueError(f"{value}: a log handler or formatter must come from logging, colorlog or hydra.")

    for text in _strings([content.get("job_logging"), content.get("hydra_logging")]):
        literal, interpolates, _ = text.partition("${")
        # Interpolations of a log's configuration need what only a run knows. None may come to begin with ext://.
        if interpolates and "ext://".startswith(literal) and not text.startswith("${hydra.runtime.output_dir}"):
            raise ValueError(
                f"{text}: not allowed in the configuration of a log; use plain text or a path in the run's folder."
            )


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _strings(value)
    elif isinstance(node, str):
        yield node


def _log_factories(node: Any) -> Iterator[Any]:
    """What `logging.config` would import: values of `()` and `class`, and `ext://...` anywhere."""
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key in ("()", "class"))
        for value in node.values():
            yield from _log_factories(value)
    elif isinstance(node, list):
        for value in node:
            yield from _log_factories(value)
    elif isinstance(node, str) and node.startswith("ext://"):
        yield node
