"""Hydra's `hydra/sweeper=moe_lab`, the default of `moe-lab -m`: the axes of Hydra's own, and `sweep.variants`."""

from __future__ import annotations

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override


class MoeLabSweeper(BasicSweeper):
    """Hydra's sweeper with more jobs: whatever launcher runs them gets those of the entries too."""

    def split_arguments(  # type: ignore[override]  # static there, where the overrides are all that counts
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """Batches of jobs, each job its overrides. Hydra read those given here from the same configuration."""
        from moe_lab.sweep import multirun

        assert self.config is not None and self.hydra_context is not None
        jobs = multirun.expand(self.hydra_context.config_loader, self.config)
        return list(self.split_overrides_to_chunks(jobs, max_batch_size)) if jobs else [jobs]
