"""From a `_target_` in a configuration to the Python object, and whom to trust with that.

A `_target_` is code execution. It may name what is defined in `moe_lab`'s models, routers, experts and workloads, or in
a module whose file lies under a folder that the person gave as `--config-dir` (or `config_dir=`). Nothing else widens
that: no search path, no YAML, no result folder, no checkpoint. What a module only imports is not defined in it.

The modules of such a folder come after all others: a `json.py` beside a router replaces nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra.utils
from omegaconf import DictConfig, OmegaConf

from moe_lab.errors import nearest

_trusted: list[Path] = []
_BUILDABLE = ("moe_lab.models.", "moe_lab.routers.", "moe_lab.experts.", "moe_lab.workloads.")
_ABOUT = ("_target_", "name")  # keys of an option that its target does not take


def trust(config_dir: str | Path) -> Path:
    """Let `_target_` name modules under `config_dir`, and these import each other."""
    folder = Path(config_dir).resolve()
    if not str(config_dir) or not folder.is_dir():
        raise ValueError(f"--config-dir {config_dir}: folder not found.")
    if folder not in _trusted:
        _trusted.append(folder)
        if _finder not in sys.meta_path:
            sys.meta_path.append(_finder)
    return folder


class _Finder(MetaPathFinder):
    """Finds the modules of the trusted folders. It stands last in `sys.meta_path`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a top-level module; a package finds what is in it by itself."""
        folder = next((folder for folder in _trusted if _holds(folder, [fullname])), None)
        if path is not None or folder is None:
            return None
        package = folder / fullname  # the very file that was looked at: no compiled module of the same name
        file = package / "__init__.py" if package.is_dir() else folder / f"{fullname}.py"
        places = [str(package)] if package.is_dir() else None
        return importlib.util.spec_from_file_location(fullname, file, submodule_search_locations=places)


_finder = _Finder()


def trusted() -> list[str]:
    """The trusted folders, for another process."""
    return [str(folder) for folder in _trusted]


def place_of(error: BaseException) -> str:
    """' (my_router.py:12)' for the deepest line of a trusted folder that an error comes from; '' if it comes from none.

    Of an error that was raised from another, the first that has such a line.
    """
    link: BaseException | None = error
    while link is not None:
        lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(link.__traceback__)]
        if isinstance(link, SyntaxError):  # it has no frame of its own
            lines.append((link.filename or "", link.lineno))
        for name, number in reversed(lines):
            folder = next((folder for folder in _trusted if folder in Path(name).resolve().parents), None)
            if folder is not None:
                return f" ({Path(name).resolve().relative_to(folder)}:{number})"
        link = link.__cause__ or link.__context__
    return ""


def folders_of(cfg: DictConfig) -> list[Path]:
    """The trusted folders that some `_target_` of `cfg` lies in, sorted: the plug-ins whose code a run executes."""
    content = OmegaConf.to_container(cfg, resolve=True)
    modules = [str(target).rpartition(".")[0].split(".") for target in named(content)]
    return sorted(folder for folder in _trusted if any(_holds(folder, module) for module in modules))


def check(cfg: DictConfig) -> None:
    """Raise `ValueError` for a `_target_` that is not trusted, before there is anything to run. Imports nothing."""
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    for group, node in content.items():
        for target in named(node):
            _check_trusted(str(target), f"{group!s}: _target_")


def named(node: Any) -> Iterator[str]:
    """Every `_target_` in plain data, at any depth."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from named(value)
    elif isinstance(node, list):
        for value in node:
            yield from named(value)


def _check_trusted(target: str, key: str) -> Path | None:
    """The trusted folder that `target` lies in, None: the package.

    Raises `ValueError` unless importing it runs only trusted files. Nothing is imported to find that out.
    """
    module, _, _ = target.rpartition(".")
    if module.startswith(_BUILDABLE):
        return None
    folder = next((folder for folder in _trusted if _holds(folder, module.split("."))), None)
    if folder is None:
        raise ValueError(
            f"{key}={target}: not trusted. It must be defined in moe_lab's models, routers, experts or workloads, "
            "or in a folder given with --config-dir."
        )
    name = module.split(".")[0]
    loaded = getattr(sys.modules.get(name), "__file__", None)
    is_other = name in sys.modules and (loaded is None or folder not in Path(loaded).resolve().parents)
    if is_other or name in sys.stdlib_module_names or _is_library(name):
        raise ValueError(f"{key}={target}: another module named {name} is installed or loaded; rename yours.")
    return folder


def _is_library(name: str) -> bool:
    places = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
    return PathFinder.find_spec(name, places) is not None


def _import(module: str, folder: Path | None) -> ModuleType:
    """The module, its first package from `folder` whatever the working directory or PYTHONPATH hold."""
    first = module.split(".")[0]
    if folder is not None and first not in sys.modules:
        spec = _finder.find_spec(first)
        assert spec is not None and spec.loader is not None
        made = sys.modules[first] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(made)
        except BaseException:
            del sys.modules[first]
            raise
    return importlib.import_module(module)


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


def locate(target: str, key: str = "_target_") -> Any:
    """The object that the dotted path `target` names. Raises `ValueError` if it is not trusted or does not exist."""
    folder = _check_trusted(str(target), key)
    module_name, _, attribute = str(target).rpartition(".")
    try:
        obj = getattr(_import(module_name, folder), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}={target}: {error}") from error
    where = str(getattr(obj, "__module__", ""))
    is_there = where == module_name if folder is None else _is_defined_in_trust(where)
    if not is_there or not callable(obj):
        raise ValueError(
            f"{key}={target}: {attribute} is not defined in {module_name}, only imported; "
            "use the module that defines it."
        )
    return obj


def _is_defined_in_trust(module: str) -> bool:
    """Whether a plug-in's object is of a trusted folder itself, or one of ours that it passes on."""
    return module.startswith(_BUILDABLE) or any(_holds(folder, module.split(".")) for folder in _trusted)


def instantiate(node: DictConfig, group: str = "", /, **arguments: Any) -> Any:
    """Call the target of `node` with its keys and `arguments` (any objects). Nested nodes are instantiated first.

    Raises:
        ValueError: a key that the target does not take; it is called `group.KEY`.
    """
    if "_target_" not in node:
        raise ValueError(f"{_called(group, '_target_')} has no value: set it in the YAML file.")
    target, keys = locate(node._target_, _called(group, "_target_")), keys_of(node, group)
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
    for target in named(content):
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
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    left = [p for number, p in enumerate(every) if number >= n_given or p.kind in open_ended]
    parameters = [p for p in left if p.name not in given]
    named = {p.name for p in parameters if p.kind in _BY_NAME}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in keys:
        if key not in named and (not takes_any or key in given or key in {p.name for p in every}):
            raise ValueError(unknown_key(target, key, group, given=given, n_given=n_given))
    for key in given:
        if not takes_any and key not in {p.name for p in left if p.kind in _BY_NAME}:
            raise ValueError(f"{_called(group, key)}: {_name(target)} must take {key} by name.")
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
    if not any(named(value)):
        return value
    _require_nested_keys(value, place)
    options: dict[str, Any] = {}
    if "_execution_whitelist_" in inspect.signature(hydra.utils.instantiate).parameters:  # Hydra 1.4 wants to be told
        options["_execution_whitelist_"] = list(named(value))
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
