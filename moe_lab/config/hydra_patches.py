"""What is changed in Hydra: the schemas, resolvers and launcher it knows, and a look at everything that it composes."""

from __future__ import annotations

import importlib.resources
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import hydra
import hydra.core.utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeperConf
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers.oc import env as _oc_env

from moe_lab.config import hydra_node, many_compositions, missing_keys, remedies, schemas
from moe_lab.config.checks import is_whole, refuse_hydras_keys, refuse_unknown
from moe_lab.config.unread import key_of
from moe_lab.records import identity, store

LAUNCHER = "hydra_plugins.moe_lab_launcher.MoeLabLauncher"
SWEEPER = "hydra_plugins.moe_lab_launcher.sweeper.MoeLabSweeper"
SEARCHER = "hydra_plugins.moe_lab_launcher.search.MoeLabOptunaSweeper"

# Hydra 1.4 (with omegaconf 2.4) warns of what 1.3 needs: this argument, and register_new_resolver's name.
_IS_HYDRA_1_4 = not hydra.__version__.startswith("1.3.")

VERSION_BASE = {} if _IS_HYDRA_1_4 else {"version_base": "1.3"}

# As it is typed, and in Hydra's language.
REFERENCE = ("measure.reference_router=", "router@measure.reference_router=")

_VARIABLES = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "CUDA_VISIBLE_DEVICES")
_NOT_GIVEN = object()

SWEEP_NAME = "MOE_LAB_SWEEP_NAME"  # an environment variable, so that a launcher's processes agree on it


def register() -> None:
    """Make the schemas and the resolvers known to Hydra, and look at what Hydra composes. Again changes nothing."""
    schemas.register()
    add: Any = OmegaConf.register_resolver if _IS_HYDRA_1_4 else OmegaConf.register_new_resolver
    add("moe_lab.cell_id", _cell_id, replace=True)
    add("moe_lab.slug", _slug, replace=True)
    add("moe_lab.sweep_name", _sweep_name, replace=True)
    add("moe_lab.asset", _asset, replace=True)
    add("oc.env", _env, replace=True)
    stored = ConfigStore.instance()
    if "moe_lab.yaml" not in stored.repo["hydra"].get("launcher", {}):
        stored.store(group="hydra/launcher", name="moe_lab", node={"_target_": LAUNCHER}, provider="moe_lab")
        sweeper = BasicSweeperConf(_target_=SWEEPER)
        stored.store(group="hydra/sweeper", name="moe_lab", node=sweeper, provider="moe_lab")
    # Hydra's own defaults, so that an experiment's `override /hydra/launcher` has its effect: one in config.yaml would
    # win over it.
    defaults = {"launcher": "moe_lab", "sweeper": "moe_lab"}
    defaults |= {"job_logging": "none", "hydra_logging": "none"}  # a run writes its own run.log
    for entry in ConfigStore.instance().repo["hydra"]["config.yaml"].node.defaults:
        entry.update({group: option for group, option in defaults.items() if group in entry})
    ConfigLoaderImpl.load_configuration = _load_and_check  # type: ignore[method-assign]
    ConfigRepository.initialize_sources = _check_and_initialize  # type: ignore[method-assign]
    hydra.core.utils._save_config = _save_config
    sys.modules["hydra.main"]._get_rerun_conf = _refuse_rerun  # type: ignore[attr-defined]


def register_plugins() -> None:
    """Make launcher and sweeper known to Hydra, whose own search does not find them in an editable installation."""
    from hydra.core.plugins import Plugins

    plugins = Plugins.instance()  # it loads Hydra's own once more, so a class made before has another as its base
    from hydra_plugins.moe_lab_launcher import MoeLabLauncher
    from hydra_plugins.moe_lab_launcher.search import MoeLabOptunaSweeper
    from hydra_plugins.moe_lab_launcher.sweeper import MoeLabSweeper

    for plugin in (MoeLabLauncher, MoeLabSweeper, MoeLabOptunaSweeper):
        plugins.register(plugin)


_load_configuration = ConfigLoaderImpl.load_configuration
_initialize_sources = ConfigRepository.initialize_sources


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
    in_a_sweep = RunMode.MULTIRUN in (*arguments, *options.values())  # all of it, not one of its jobs
    many_compositions.remember(self, in_a_sweep=False)
    remedies.refuse_removal(overrides, self.repository.get_group_options)
    try:
        cfg = missing_keys.load(
            lambda texts: _load_configuration(self, config_name, texts, *arguments, **options),
            self,
            config_name,
            overrides,
            in_a_sweep,
        )
    except KeyError as error:
        if type(error) is not KeyError:  # omegaconf's own say which key
            raise
        raise ValueError(f"hydra.job.env_copy={error}: not allowed; set environment variables in the shell.") from error
    if "hydra" in cfg:
        hydra_node.check(cfg, overrides)
        refuse_unknown(cfg.hydra, "hydra")
        if RunMode.MULTIRUN in (cfg.hydra.mode, *arguments, *options.values()):
            refuse_hydras_keys(cfg.hydra.overrides.hydra, in_a_sweep=True)
            _check_launcher(cfg, overrides)
            _check_sweeper(cfg)
        if in_a_sweep:
            missing_keys.refuse_in_a_sweep(self, cfg, overrides)
    return cfg


def _check_launcher(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """Raise `ValueError` for what a launcher cannot do. Here, because Hydra goes on if a callback raises."""
    launcher = cfg.hydra.launcher
    if (n_jobs := launcher.get("n_jobs", 1)) != 1:
        raise ValueError(
            f"hydra.launcher.n_jobs={n_jobs}: cells that run at once disturb each other's timing; set "
            "hydra.launcher.n_jobs=1, or leave out hydra/launcher."
        )
    does: dict[str, Any] = {"sweep.worker": True, "sweep.interleave": False, "sweep.fail_fast": False}
    does |= {"sweep.engine": "worker", "sweep.require": None, "sweep.shared": True}
    does |= dict.fromkeys(("sweep.slots.cpu", "sweep.slots.cuda", "sweep.slots.cpus_each"))
    for override in overrides if launcher._target_ != LAUNCHER else ():
        key = key_of(override)
        if key in does and OmegaConf.select(cfg, key) != does[key]:
            raise ValueError(f"{override}: has no effect with another launcher than hydra/launcher=moe_lab; remove it.")


def _check_sweeper(cfg: DictConfig) -> None:
    target = cfg.hydra.sweeper._target_
    if cfg.sweep.variants and target not in (SWEEPER, SEARCHER):
        raise ValueError(
            "sweep.variants: only hydra/sweeper=moe_lab, the default, reads it; remove it or the other hydra/sweeper."
        )
    if target == SEARCHER and cfg.hydra.launcher._target_ != LAUNCHER:
        raise ValueError("hydra/sweeper=moe_lab_optuna: needs hydra/launcher=moe_lab; leave hydra/launcher out.")


def _check_and_initialize(self: ConfigRepository, config_search_path: ConfigSearchPath) -> None:
    """Before Hydra looks into what it is to search."""
    hydra_node.check_search_path(config_search_path)
    _initialize_sources(self, config_search_path)


def _save_config(cfg: DictConfig, filename: str, output_dir: Path) -> None:
    """What Hydra keeps of a run in `.hydra`; its own function follows links."""
    if not any(text.startswith("hydra.run.dir=") for text in HydraConfig.get().overrides.hydra):
        store.own_folder(output_dir.parent)
    store.own_folder(output_dir)
    store.write_atomic(output_dir / filename, OmegaConf.to_yaml(cfg).encode())


def _refuse_rerun(*_: Any) -> NoReturn:
    raise ValueError("--experimental-rerun: not supported: a pickle can run code; type the command of the run again.")


def _env(name: str, default: Any = _NOT_GIVEN) -> Any:
    """`${oc.env:NAME}`, of harmless variables only: what it gives stands in records, which are shared."""
    if name not in _VARIABLES and not name.startswith("MOE_LAB_"):
        raise ValueError(
            f"${{oc.env:{name}}}: records are shared, so only {', '.join(_VARIABLES)} and MOE_LAB_... can be read; "
            f"call it MOE_LAB_{name}."
        )
    return _oc_env(name) if default is _NOT_GIVEN else _oc_env(name, default)


def _cell_id(_root_: DictConfig) -> str:
    return identity.cell_id(_root_) if is_whole(_root_) else "incomplete"


def _slug(_root_: DictConfig) -> str:
    return identity.slug(_root_) if is_whole(_root_) else "incomplete"


def _asset(name: str) -> str:
    """`${moe_lab.asset:NAME}`: where a folder of assets/ lies, in an installation from a wheel too."""
    path = Path(str(importlib.resources.files("moe_lab.assets"))) / name
    return str(path.relative_to(Path.cwd()) if Path.cwd() in path.parents else path)


def _sweep_name(_root_: DictConfig) -> str:
    return str(_root_.sweep.name or os.environ.get(SWEEP_NAME, "sweep"))
