"""`moe_lab.multirun`: a sweep, as `moe-lab -m` runs it; the other can continue it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from moe_lab.api.compose import in_python, overrides_of
from moe_lab.api.notebook import progress
from moe_lab.api.shown import Results
from moe_lab.config.compose import composing_multirun, name_sweep
from moe_lab.config.hydra_patches import LAUNCHER, SWEEP_NAME
from moe_lab.config.unread import refuse_twice
from moe_lab.records.store import write_atomic
from moe_lab.results import outputs
from moe_lab.sweep import multirun as sweeps
from moe_lab.sweep import search

_SWEEPERS = ("BasicSweeper", "MoeLabSweeper", "MoeLabOptunaSweeper")


def multirun(
    overrides: Sequence[str], *, config_dir: str | Path | None = None, directory: str | Path | None = None
) -> Results:
    """Run every combination of the values, as `moe-lab -m` does: planned, locked, resumed, timed together.

    The same overrides have the same folder as on the command line, and what is done there is not done again. Cells that
    fail or are skipped are records that say why. Progress is shown on standard error, in a notebook as a bar.

    Args:
        overrides: for example `["router=torch,sinkhorn", "batch=1,8"]`.
        config_dir: as for `moe_lab.compose`.
        directory: the folder of the sweep; default: `outputs/<sweep.name>` below the current directory.

    Returns:
        The records and their folder, shown as a table.

    Raises:
        ValueError: a mistake in the overrides, or another sweep uses the folder; one line that names the fix.
        UnavailableError: the worker process could not start.
        OSError: the directory cannot be written.
        KeyboardInterrupt: Ctrl-C; what was measured is written first, and the same call continues.
    """
    with in_python():
        typed = overrides_of(overrides)
    if directory is not None:
        typed.append("hydra.sweep.dir='" + str(directory).replace("\\", "\\\\").replace("'", "\\'") + "'")
        refuse_twice(typed, sweeps=False)
    words = ["moe-lab", "-m", *(["--config-dir", str(config_dir)] if config_dir is not None else []), *typed]
    if sweeps.current is not None:
        raise ValueError(f"{sweeps.current.directory}: this process is running this sweep; wait for it.")
    with in_python(), _named(typed), composing_multirun(typed, config_dir) as (loader, config):
        _refuse_other_plugins(config)
        this = sweeps.begin(loader, config, progress(), words)
        try:
            write_atomic(this.directory / "multirun.yaml", OmegaConf.to_yaml(config).encode())
            sends = True
            try:
                if search.is_search(config):
                    search.run(this)
                else:
                    this.run(sweeps.expand(loader, config), 0)
            except KeyboardInterrupt:
                sends = False  # the next call sends it
                raise
            finally:
                if this.plan is not None:  # also after Ctrl-C
                    with redirect_stdout(sys.stderr):  # where the progress is: a script's own output stays its own
                        if sends:
                            this.send_records()
                        outputs.write(this.directory, with_report=this.plan.sweep["report"])
                        if sends:
                            this.send_files()
            assert this.plan is not None
            page = this.directory / "report.html" if this.plan.sweep["report"] else None
            return Results(this.directory, this.records(), this.plan.sweep["compare"], this.plan.sweep["anchor"], page)
        finally:
            sweeps.end()


@contextmanager
def _named(overrides: Sequence[str]) -> Iterator[None]:
    """The sweep has the name that it has on the command line; afterwards the environment is as it was."""
    before = os.environ.get(SWEEP_NAME)
    name_sweep(overrides)
    try:
        yield
    finally:
        os.environ.pop(SWEEP_NAME, None)
        if before is not None:
            os.environ[SWEEP_NAME] = before


def _refuse_other_plugins(config: DictConfig) -> None:
    node = config.hydra
    if node.launcher._target_ != LAUNCHER or node.sweeper._target_.rsplit(".", 1)[-1] not in _SWEEPERS:
        raise ValueError("hydra/launcher, hydra/sweeper: only read by moe-lab -m; leave them out, or use that.")
    if node.sweeper.get("max_batch_size") is not None:
        raise ValueError("hydra.sweeper.max_batch_size: only read by moe-lab -m; leave it out.")
