"""From overrides to a checked configuration, on the command line and in Python alike. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from moe_lab import config, targets
from moe_lab.errors import UnavailableError
from moe_lab.records import identity

CONFIG_MODULE = "moe_lab.conf"
LAUNCHER = "hydra_plugins.moe_lab_launcher.MoeLabLauncher"
# Hydra 1.4 (with omegaconf 2.4) warns of what 1.3 needs: this argument, and register_new_resolver's name.
_IS_HYDRA_1_4 = not hydra.__version__.startswith("1.3.")
VERSION_BASE = {} if _IS_HYDRA_1_4 else {"version_base": "1.3"}
_IN_WORDS = (ValueError, UnavailableError, OSError)  # their messages are sentences already
# As it is typed, and in Hydra's language.
_REFERENCE = ("measure.reference_router=", "router@measure.reference_router=")
_NOT_FOR_TYPING = ("_target_", "ignores", "overrides", "hydra")  # keys that nobody sets on the command line
SWEEP_NAME = "MOE_LAB_SWEEP_NAME"  # an environment variable, so that a launcher's processes agree on it


def register() -> None:
    """Make the schemas and the resolvers known to Hydra, and look at what Hydra composes. Again changes nothing."""
    config.register()
    add: Any = OmegaConf.register_resolver if _IS_HYDRA_1_4 else OmegaConf.register_new_resolver
    add("moe_lab.cell_id", _cell_id, replace=True)
    add("moe_lab.slug", _slug, replace=True)
    add("moe_lab.sweep_name", _sweep_name, replace=True)
    ConfigStore.instance().store(
        group="hydra/launcher", name="moe_lab", node={"_target_": LAUNCHER}, provider="moe_lab"
    )
    ConfigLoaderImpl.load_configuration = _load_and_check  # type: ignore[method-assign]


def register_launcher() -> None:
    """Make the launcher known to Hydra, whose own search does not find it in an editable installation."""
    from hydra.core.plugins import Plugins

    from hydra_plugins.moe_lab_launcher import MoeLabLauncher

    Plugins.instance().register(MoeLabLauncher)


_load_configuration = ConfigLoaderImpl.load_configuration


def _load_and_check(
    self: ConfigLoaderImpl, config_name: str | None, overrides: list[str], *arguments: Any, **options: Any
) -> DictConfig:
    """Hydra's composition, and then a look at its own node: callbacks and log handlers in it are code.

    Hydra runs them before the application, so this is the one place that all compositions go through before that.
    """
    overrides = [
        text.replace(*_REFERENCE, 1) if text.startswith(_REFERENCE[0]) and not text.endswith("=null") else text
        for text in overrides
    ]
    cfg = _load_configuration(self, config_name, overrides, *arguments, **options)
    if "hydra" in cfg:
        targets.check_hydra_node(cfg.hydra)
    return cfg


def _cell_id(_root_: DictConfig) -> str:
    return identity.cell_id(_root_) if config.is_whole(_root_) else "incomplete"


def _slug(_root_: DictConfig) -> str:
    return identity.slug(_root_) if config.is_whole(_root_) else "incomplete"


def _sweep_name(_root_: DictConfig) -> str:
    return str(_root_.sweep.name or os.environ.get(SWEEP_NAME, "sweep"))


_OF_NO_MATTER = ("measure.", _REFERENCE[1], "hydra.", "name=", "sweep.")


def name_sweep(overrides: Sequence[str]) -> None:
    """Fix the name of this process's sweep: its experiment's, else a hash of what was typed (never a time stamp).

    How long is looked and what the sweep is called are no part of it.
    """
    experiments = [text.split("=", 1)[1] for text in overrides if text.startswith("experiment=")]
    typed = sorted(text for text in overrides if not text.startswith(_OF_NO_MATTER))
    digest = hashlib.sha256("\0".join(typed).encode()).hexdigest()[:8]
    os.environ[SWEEP_NAME] = experiments[-1] if experiments else f"sweep-{digest}"


HELP = """\
moe-lab: a laboratory for Mixture-of-Experts inference

moe-lab [GROUP=OPTION ...] [KEY=VALUE ...]      one run, its record under outputs/runs/
moe-lab -m router=torch,sinkhorn batch=1,8      every combination, with tables, plots and a report page
moe-lab plan -m router=torch,sinkhorn batch=1,8 what that would do
moe-lab report DIR                              tables, plots and the report page of a folder of results
moe-lab compare A B                             faster, slower, the same: two folders of results
moe-lab generate TEXT model.path=DIR            the text that a checkpoint writes
moe-lab list [GROUP]                            the options and what they are
moe-lab doctor [--noise]                        what runs on this machine, and how noisy it is

Groups (GROUP=OPTION)

{groups}

Values (KEY=VALUE), as they stand

{values}
--cfg job       print the composed configuration and stop
--config-dir D  add a folder of your own YAML files; classes in it may be named by _target_
--hydra-help    Hydra's own options
HYDRA_FULL_ERROR=1 shows the traceback behind a one-line error
"""


def help_text(overrides: Sequence[str], config_dir: str | None) -> str:
    """The text of `--help`: groups, options, and every key with its value under `overrides`."""
    with _hydra_compose(overrides, config_dir) as composed:
        loader = config_loader()
        groups = sorted(group for group in loader.list_groups("") if group != "hydra" and not group.startswith("_"))
        groups += sorted(f"{group}/{sub}" for group in groups for sub in loader.list_groups(group))
        options = "\n".join(f"{group}: {', '.join(loader.get_group_options(group))}" for group in groups)
        del composed.overrides, composed["hydra"]
        return HELP.format(groups=options, values=OmegaConf.to_yaml(composed))


def finish(cfg: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """Check a composed configuration and note in it what was typed. Raises `ValueError` for a mistake."""
    overrides = list(overrides)
    config.validate(cfg)
    config.check_overrides(cfg, overrides)
    with open_dict(cfg):
        cfg.overrides = overrides
    return cfg


def compose(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> DictConfig:
    """Compose a configuration in the command line's language.

    Args:
        overrides: for example `["model=decoder_moe", "router=sinkhorn", "batch=2"]`.
        config_dir: a folder of the caller's own YAML files, whose modules `_target_` may then name. It adds options;
            where one has the name of the package's own, the package's is taken.

    Raises:
        ValueError: one line that names the key, the value, what is allowed and the nearest name.
    """
    register()
    try:
        with _hydra_compose(overrides, config_dir) as composed:
            typed = list(composed.hydra.overrides.task)
            del composed["hydra"]
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error
    return finish(composed, typed)


@contextmanager
def _hydra_compose(overrides: Sequence[str], config_dir: str | Path | None) -> Iterator[DictConfig]:
    """The composed configuration, Hydra's own node included and open to changes."""
    arguments = _with(overrides, config_dir)
    with initialize_config_module(CONFIG_MODULE, **VERSION_BASE):
        composed = hydra_compose("config", arguments, return_hydra_config=True)
        with open_dict(composed):
            yield composed


def config_loader() -> ConfigLoader:
    """The loader of Hydra's present session."""
    return GlobalHydra.instance().config_loader()


@contextmanager
def composing_multirun(
    overrides: Sequence[str], config_dir: str | Path | None
) -> Iterator[tuple[ConfigLoader, DictConfig]]:
    """Hydra's loader and the master configuration of a multirun that does not run.

    Raises:
        ValueError: as `compose`.
    """
    register()
    register_launcher()
    try:
        with initialize_config_module(CONFIG_MODULE, **VERSION_BASE):
            loader = config_loader()
            yield loader, loader.load_configuration("config", _with(overrides, config_dir), RunMode.MULTIRUN)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error


def _with(overrides: Sequence[str], config_dir: str | Path | None) -> list[str]:
    """The overrides, with the trusted folder on Hydra's search path."""
    if config_dir is None:
        return list(overrides)
    path = str(targets.trust(config_dir)).replace("'", "\\'")
    return [*overrides, f"hydra.searchpath=['file://{path}']"]


def explain(error: BaseException) -> str:
    """One line for a mistake in the configuration: the key, the value, what is allowed, the nearest name."""
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return _one_line(str(error) if isinstance(error, _IN_WORDS) else f"{type(error).__name__}: {error}")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = [name.rsplit("/", 1)[-1] for name in error.options]
        near = config.nearest(option, options)
        return f"{group}={option}: no such option; {group} is one of {', '.join(options)}.{near}"
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OmegaConfBaseException):
            return _explain_key(link)
        link = link.__cause__ or link.__context__
    text = str(error)
    quoted = text.split("'")[1] if text.count("'") > 1 else ""
    if text.startswith("Ambiguous value for argument"):
        return f"{quoted}: several values make a sweep; add -m, or quote the value if it is one."
    if text.startswith("Error parsing override") and "missing EQUAL" in text:
        return f"{quoted}: it is no KEY=VALUE (moe-lab --help lists keys and groups)."
    return _one_line("\n".join(line for line in text.splitlines() if not line.startswith("See https")))


def _explain_key(error: OmegaConfBaseException) -> str:
    full_key, parent = str(error.full_key or error.key or ""), error.parent_node
    if full_key and isinstance(parent, DictConfig) and error.key not in parent:
        known = sorted(str(key) for key in parent if key not in _NOT_FOR_TYPING)
        where = full_key.rpartition(".")[0]
        near = config.nearest(str(error.key), known)
        return f"{full_key}: no such key{f' in {where}' if where else ''}; there are {', '.join(known)}.{near}"
    message = _one_line(str(error.msg or error).split("\n")[0])
    return f"{full_key}: {message}" if full_key and full_key not in message else message


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines) if lines else "no reason was given"


def argv_overrides(argv: Sequence[str]) -> list[str]:
    """The overrides among command-line arguments."""
    return [argument for argument in argv if "=" in argument and not argument.startswith("-")]


def config_dir_of(argv: Sequence[str]) -> str | None:
    """The folder that `--config-dir` (or `-cd`) names among command-line arguments."""
    for position, argument in enumerate(argv):
        name, separator, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            return value if separator else next(iter(argv[position + 1 :]), "")
    return None
