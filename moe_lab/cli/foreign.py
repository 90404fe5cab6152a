"""Multiruns under another launcher of Hydra's (basic, joblib, ...): plan, lock, resume and a row per cell stay true.

That launcher decides when a cell runs, so each has a worker of its own and none are interleaved.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from moe_lab.cli.progress import Terminal
from moe_lab.config.compose import config_loader
from moe_lab.config.hydra_patches import LAUNCHER
from moe_lab.records import store
from moe_lab.records.identity import cell_id
from moe_lab.records.schema import Record
from moe_lab.sweep import multirun, plan, session
from moe_lab.sweep.engine import Worker


def is_foreign(hydra_node: DictConfig) -> bool:
    """Whether a launcher that is not ours runs the jobs."""
    return bool(hydra_node.launcher._target_ != LAUNCHER)


class RefusedError(BaseException):
    """A multirun that must not start; the cause says why. Of a callback's ordinary exceptions Hydra only warns."""


made: list[Path] = []
"""The folders that a single run makes for its own, the deepest first; a mistake leaves none behind."""


class ForeignLauncher(Callback):
    """Plans before the first job. Hydra calls it at the start of every run and multirun."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """See `made`."""
        with suppress(OmegaConfBaseException):  # an interpolation that leads nowhere: Hydra will say so
            made[:] = store.missing_folders(Path(str(config.hydra.run.dir)))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Lock the folder, write the plan and say in a line what will happen, if another launcher was chosen."""
        if not is_foreign(config.hydra):
            return
        name = config.hydra.runtime.choices["hydra/launcher"]
        note = f", each in its own process, not interleaved (hydra/launcher={name})"
        try:
            multirun.begin(config_loader(), config, Terminal()).announce(note)
        except Exception as error:
            raise RefusedError from error


def run_job(cfg: DictConfig, overrides: list[str], directory: Path, environment: Mapping[str, str]) -> Record | None:
    """One job of such a multirun: nothing if it is done, else its run in a worker of its own.

    Returns None for a cell that the plan excludes or skips and that has no record.
    """
    sweep_dir = Path(HydraConfig.get().sweep.dir)
    with FileLock(directory / ".lock"):  # jobs of equal cells may be started at once
        status = plan.read_statuses(sweep_dir).get(cell_id(cfg))
        if status in (None, "to do", "stale"):
            engine = Worker(sweep_dir / multirun.LOG, environment)
            try:
                engine.start()
                one = [(cfg, overrides, directory)]
                job_plan = plan.make(one, sweep_dir, engine, multirun.command())
                session.execute(job_plan, engine, Terminal())
            finally:
                engine.close()
    return store.find_record(directory)
