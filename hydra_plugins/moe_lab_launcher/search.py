"""Hydra's `hydra/sweeper=moe_lab_optuna`: a search by Optuna over the axes of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class MoeLabOptunaSweeper(Sweeper):
    """Lets `moe_lab.sweep.search` choose the jobs of each batch; its keys stand in the master configuration."""

    def __init__(self, **_: Any):
        pass

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Begin the multirun, after a look at the search: a mistake leaves no folder behind."""
        from hydra.core.plugins import Plugins

        from moe_lab.sweep import search

        self.config, self.hydra_context = config, hydra_context
        search.read(hydra_context.config_loader, config)
        Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Run the search. The arguments are the overrides that the master configuration has, too."""
        from moe_lab.records.store import write_atomic
        from moe_lab.sweep import multirun, search

        assert multirun.current is not None and self.config is not None
        directory = Path(self.config.hydra.sweep.dir)
        write_atomic(directory / "multirun.yaml", OmegaConf.to_yaml(self.config).encode())
        search.run(multirun.current)
