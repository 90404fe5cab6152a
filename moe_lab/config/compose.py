"""From overrides to a checked configuration, on the command line and in Python alike. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from moe_lab.config import targets
from moe_lab.config.checks import check_overrides, validate
from moe_lab.config.entries import KEY as VARIANTS
from moe_lab.config.hydra_patches import REFERENCE, SWEEP_NAME, VERSION_BASE, register, register_plugins
from moe_lab.config.mistakes import explain
from moe_lab.config.unread import key_of

CONFIG_MODULE = "moe_lab.conf"


_OF_NO_MATTER = ("measure.", REFERENCE[1], "hydra.", "name=", "sweep.", "tracker=", "tracker.")


def name_sweep(overrides: Sequence[str]) -> None:
    """Fix the name of this process's sweep: its experiment's, else a hash of what was typed (never a time stamp).

    The measuring time and the keys of the sweep do not count, but for its variants.
    """
    experiments = [text.split("=", 1)[1] for text in overrides if text.startswith("experiment=")]
    typed = sorted(text for text in overrides if key_of(text) == VARIANTS or not text.startswith(_OF_NO_MATTER))
    digest = hashlib.sha256("\0".join(typed).encode()).hexdigest()[:8]
    os.environ[SWEEP_NAME] = experiments[-1] if experiments else f"sweep-{digest}"


def finish(cfg: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """Check a composed configuration and note in it what was typed. Raises `ValueError` for a mistake."""
    overrides = list(overrides)
    validate(cfg)
    check_overrides(cfg, overrides)
    targets.check(cfg)
    with open_dict(cfg):
        cfg.overrides = overrides
    return cfg


def compose(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> DictConfig:
    """As `moe_lab.compose` (api/compose.py), with the words of the command line in its messages."""
    register()
    try:
        with composing(overrides, config_dir) as composed:
            typed = list(composed.hydra.overrides.task)
            del composed["hydra"]
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error
    return finish(composed, typed)


@contextmanager
def composing(overrides: Sequence[str], config_dir: str | Path | None, name: str = "config") -> Iterator[DictConfig]:
    """The composed configuration, Hydra's own node included and open to changes; `name` is that of the root."""
    arguments = _with(overrides, config_dir)
    with _session():
        composed = hydra_compose(name, arguments, return_hydra_config=True)
        with open_dict(composed):
            yield composed


@contextmanager
def _session() -> Iterator[None]:
    """Hydra with the package's configuration; a caller who uses Hydra has his own session back afterwards."""
    callers = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONFIG_MODULE, **VERSION_BASE):
            yield
    finally:
        GlobalHydra.instance().hydra = callers


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
    register_plugins()
    try:
        with _session():
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
