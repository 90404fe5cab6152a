"""What is changed in Hydra: the schemas, resolvers and launcher it knows, and a look at everything that it composes."""

from __future__ import annotations

import os
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from moe_lab.config import schemas, targets
from moe_lab.config.checks import is_whole, refuse_unknown
from moe_lab.records import identity

LAUNCHER = "hydra_plugins.moe_lab_launcher.MoeLabLauncher"

# Hydra 1.4 (with omegaconf 2.4) warns of what 1.3 needs: this argument, and register_new_resolver's name.
_IS_HYDRA_1_4 = not hydra.__version__.startswith("1.3.")

VERSION_BASE = {} if _IS_HYDRA_1_4 else {"version_base": "1.3"}

# As it is typed, and in Hydra's language.
REFERENCE = ("measure.reference_router=", "router@measure.reference_router=")

SWEEP_NAME = "MOE_LAB_SWEEP_NAME"  # an environment variable, so that a launcher's processes agree on it


def register() -> None:
    """Make the schemas and the resolvers known to Hydra, and look at what Hydra composes. Again changes nothing."""
    schemas.register()
    add: Any = OmegaConf.register_resolver if _IS_HYDRA_1_4 else OmegaConf.register_new_resolver
    add("moe_lab.cell_id", _cell_id, replace=True)
    add("moe_lab.slug", _slug, replace=True)
    add("moe_lab.sweep_name", _sweep_name, replace=True)
    ConfigStore.instance().store(
        group="hydra/launcher", name="moe_lab", node={"_target_": LAUNCHER}, provider="moe_lab"
    )
    # Hydra's own defaults, so that an experiment's `override /hydra/launcher` has its effect: one in config.yaml would
    # win over it.
    defaults = {"launcher": "moe_lab", "job_logging": "none", "hydra_logging": "none"}  # a run writes its own run.log
    for entry in ConfigStore.instance().repo["hydra"]["config.yaml"].node.defaults:
        entry.update({group: option for group, option in defaults.items() if group in entry})
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
        text.replace(*REFERENCE, 1) if text.startswith(REFERENCE[0]) and not text.endswith("=null") else text
        for text in overrides
    ]
    cfg = _load_configuration(self, config_name, overrides, *arguments, **options)
    if "hydra" in cfg:
        targets.check_hydra_node(cfg.hydra)
        refuse_unknown(cfg.hydra, "hydra")
    return cfg


def _cell_id(_root_: DictConfig) -> str:
    return identity.cell_id(_root_) if is_whole(_root_) else "incomplete"


def _slug(_root_: DictConfig) -> str:
    return identity.slug(_root_) if is_whole(_root_) else "incomplete"


def _sweep_name(_root_: DictConfig) -> str:
    return str(_root_.sweep.name or os.environ.get(SWEEP_NAME, "sweep"))
