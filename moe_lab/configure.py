"""From overrides to a checked configuration, on the command line and in Python alike. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from moe_lab import config, targets
from moe_lab.errors import UnavailableError
from moe_lab.records import identity

CONFIG_MODULE = "moe_lab.conf"
_IN_WORDS = (ValueError, UnavailableError, OSError)  # their messages are sentences already
_NOT_FOR_TYPING = ("_target_", "ignores", "overrides", "hydra")  # keys that nobody sets on the command line
SWEEP_NAME = "MOE_LAB_SWEEP_NAME"  # an environment variable, so that a launcher's processes agree on it


def register() -> None:
    """Make the schemas and the resolvers known to Hydra. Calling it again changes nothing."""
    config.register()
    # (omegaconf 2.4 prefers register_resolver, a name that in 2.3 does something else.)
    add = OmegaConf.register_new_resolver
    add("moe_lab.cell_id", _cell_id, replace=True)
    add("moe_lab.slug", _slug, replace=True)
    add("moe_lab.sweep_name", _sweep_name, replace=True)
    add("moe_lab.groups", _groups, replace=True)


def _cell_id(_root_: DictConfig) -> str:
    return identity.cell_id(_root_)


def _slug(_root_: DictConfig) -> str:
    return identity.slug(_root_)


def _sweep_name(_root_: DictConfig) -> str:
    return str(_root_.sweep.name or os.environ.get(SWEEP_NAME, "sweep"))


def name_sweep(overrides: Sequence[str]) -> None:
    """Fix the name of this process's sweep: its experiment's, else a hash of what was typed (never a time stamp)."""
    experiments = [text.split("=", 1)[1] for text in overrides if text.startswith("experiment=")]
    digest = hashlib.sha256("\0".join(sorted(overrides)).encode()).hexdigest()[:8]
    os.environ[SWEEP_NAME] = experiments[-1] if experiments else f"sweep-{digest}"


def _groups() -> str:
    """The groups and options of conf/ for `--help`, without the schemas that stand behind them."""
    loader = GlobalHydra.instance().config_loader()
    groups = [group for group in loader.list_groups("") if group != "hydra" and not group.startswith("_")]
    lines = []
    for group in (*groups, *(f"{g}/{sub}" for g in groups for sub in loader.list_groups(g))):
        lines.append(f"{group}: {', '.join(loader.get_group_options(group))}")
    return "\n".join(sorted(lines))


def finish(cfg: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """Check a composed configuration and note in it what was typed. Raises `ValueError` for a mistake."""
    overrides = list(overrides)
    config.validate(cfg)
    config.reject_unread_choices(cfg, overrides)
    with open_dict(cfg):
        cfg.overrides = overrides
    return cfg


def compose(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> DictConfig:
    """Compose a configuration in the command line's language.

    Args:
        overrides: for example `["model=decoder_moe", "router=sinkhorn", "batch=2"]`.
        config_dir: a folder of the caller's own YAML files, searched first, whose modules `_target_` may then name.

    Raises:
        ValueError: one line that names the key, the value, what is allowed and the nearest name.
    """
    register()
    arguments = list(overrides)
    if config_dir is not None:
        folder = targets.trust(config_dir)
        arguments.append(f"hydra.searchpath=[file://{folder}]")
    try:
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            composed = hydra_compose("config", arguments, return_hydra_config=True)
            typed = list(composed.hydra.overrides.task)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error
    with open_dict(composed):
        del composed["hydra"]
    return finish(composed, typed)


def explain(error: BaseException) -> str:
    """One line for a mistake in the configuration: the key, the value, what is allowed, the nearest name."""
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return _one_line(str(error)) if isinstance(error, _IN_WORDS) else f"{type(error).__name__}: {error}"
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
    if text.startswith("Ambiguous value for argument"):
        return f"{text.split(chr(39))[1]}: several values make a sweep; add -m, or quote the value if it is one."
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


def trust_config_dirs(argv: Sequence[str] = sys.argv) -> None:
    """Trust the folder that `--config-dir` (or `-cd`) names on the command line."""
    for position, argument in enumerate(argv):
        name, separator, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            if not separator and position + 1 < len(argv):
                value = argv[position + 1]
            targets.trust(value)
