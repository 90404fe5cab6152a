"""`moe_lab.run`: one run, from a configuration or from overrides."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from moe_lab.api.compose import compose
from moe_lab.api.shown import Result
from moe_lab.config.schemas import Config
from moe_lab.records import inputs, store
from moe_lab.runs import run as runs
from moe_lab.trackers.outbox import Outbox


def run(
    what: DictConfig | Sequence[str], directory: str | Path | None = None, *, config_dir: str | Path | None = None
) -> Result:
    """Execute one run and leave its record in a folder, as the command line does.

    It runs in this process and shows nothing until it returns, in a notebook neither; what trackers did not get is said
    on standard error. `moe_lab.multirun` of the same overrides is a sweep of one cell, with its progress.

    Args:
        what: overrides, for example `["model=decoder_moe", "router=sinkhorn"]`, or what `moe_lab.compose` returns. What
            was read from a YAML file is sent to no tracker: a file that was found does not say where results go.
        directory: where its files go; default: `outputs/runs/<slug>-<cell_id>` below the current directory.
        config_dir: as for `moe_lab.compose`; only with overrides.

    Returns:
        The record; `to_dict()` is result.json. A run that failed has the status `failed` and the cause in `reason`.

    Raises:
        ValueError: a mistake in the configuration; one line that names the key and the fix.
        UnavailableError: an implementation or a device that is not here.
        OSError: the directory cannot be written.
        KeyboardInterrupt: Ctrl-C; the record, `failed` with the reason `interrupted`, is written first.
    """
    if not isinstance(what, DictConfig):
        what = compose(what, config_dir=config_dir)
    elif config_dir is not None:
        raise ValueError(f"config_dir={config_dir}: this configuration is composed; give it to moe_lab.compose.")
    inputs.require(what)
    folder = Path(directory) if directory is not None else runs.default_directory(what)
    outbox = Outbox(_trackers(what), folder, is_sweep=False)
    record = runs.run(what, folder)
    outbox.send([folder], _say, is_last=True)
    if outbox.names:
        record.warnings = store.read_record(folder).warnings  # with what the trackers did not get
    return Result.of(record)


def _trackers(cfg: DictConfig) -> DictConfig | None:
    """The trackers that the caller chose: of a configuration that was composed, which has the type of the schema."""
    chosen: DictConfig | None = cfg.get("tracker")
    if chosen and OmegaConf.get_type(cfg) is not Config:
        _say("tracker: nothing is sent of a configuration from a file; use moe_lab.compose([..., 'tracker=...']).")
        return None
    return chosen


def _say(text: str) -> None:
    print(f"moe-lab: {text}", file=sys.stderr)
