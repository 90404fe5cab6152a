"""Hydra's `hydra/launcher=moe_lab`, the default of `moe-lab -m`: one persistent worker, groups timed together."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class MoeLabLauncher(Launcher):
    """Hands all cells of a batch to `moe_lab.sweep` at once."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from moe_lab.cli.progress import Terminal
        from moe_lab.sweep import multirun

        self.multirun = multirun.begin(hydra_context.config_loader, config, Terminal())

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose every job, then run them. A job that failed is a completed one for Hydra: its record says so."""
        results = self.multirun.run(job_overrides, initial_job_idx)
        return [_job_return(overrides, value) for overrides, value in zip(job_overrides, results, strict=True)]


def _job_return(overrides: Sequence[str], value: float | None) -> JobReturn:
    done = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
    done.return_value = value
    return done
