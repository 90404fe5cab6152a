"""What the file of an experiment sets. Imports no torch."""

from __future__ import annotations

from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.conf import HydraConf
from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf


def set_by(loader: ConfigLoader, hydra: DictConfig | HydraConf) -> list[str]:
    """`key=value` of what the experiment's own file sets, its sweep and trackers aside; nothing without an experiment.

    Args:
        hydra: Hydra's own node of the configuration. Its `runtime.choices` name the experiment.
    """
    if not (name := hydra.runtime.choices.get("experiment")):
        return []
    assert isinstance(loader, ConfigLoaderImpl)
    searched = list(hydra.overrides.hydra)  # the folder of --config-dir, say
    _, repository = loader._parse_overrides_and_create_caching_repo("config", searched)
    found = repository.load_config(f"experiment/{name}")
    return [] if found is None else _leaves(OmegaConf.to_container(found.config, resolve=False))


def _leaves(node: Any, above: str = "") -> list[str]:
    if not isinstance(node, dict):
        return [f"{above}={node}"]
    asides = ("defaults", "hydra", "sweep", "tracker") if not above else ()
    inside = {f"{above}.{key}" if above else str(key): value for key, value in node.items() if key not in asides}
    return [leaf for key, value in inside.items() for leaf in _leaves(value, key)]
