"""Weights & Biases: a run for each cell; those of a sweep are a group, with one more run for its files.

The id of a run is that of its cell, so a run that is sent again is the same run: it keeps its history, and its
configuration and summary become those of the newer record. Offline, its folder is written anew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe_lab.config import addresses
from moe_lab.records import store
from moe_lab.trackers.message import Cell, Files, Sweep


class Wandb:
    """See `Tracker`."""

    needs: tuple[str, ...] = ("wandb",)
    environment: Mapping[str, str | None] = MappingProxyType({"WANDB_ERROR_REPORTING": "false"})

    def __init__(self, settings: Mapping[str, Any], folder: Path):
        self._settings = settings
        self._dir = Path(settings["dir"] or folder).absolute()
        if settings["mode"] == "offline":
            self.keeps: Path | None = self._dir / "wandb"
            place = str(self._dir) if settings["dir"] else "wandb"
        else:
            self.keeps = None
            server = addresses.place(os.environ.get("WANDB_BASE_URL", ""))  # of one's own
            place = " ".join(part for part in (server, settings["entity"] or "online") if part)
        self.destination = f"{place} {settings['project']}"
        self._sweep: Sweep | None = None

    def begin(self, sweep: Sweep | None) -> None:
        """See `Tracker.begin`."""
        import wandb

        if self._settings["mode"] == "online":
            wandb.login()  # raises without a key; asks nobody, for there is no terminal
        store.own_folder(self._dir / "wandb")
        self._wandb = wandb
        self._sweep = sweep

    def send(self, cell: Cell) -> None:
        """See `Tracker.send`."""
        run = self._open(cell.id, cell.name, "cell")
        run.config.update({**cell.params, **cell.tags}, allow_val_change=True)
        run.log(cell.metrics, step=0)
        run.summary.update({**cell.metrics, "status": cell.record["status"], "content": cell.content})
        cell.write_record(Path(run.dir))
        run.save(str(Path(run.dir) / "record.json"), base_path=run.dir, policy="end")
        run.finish(exit_code=int(cell.record["status"] == "failed"))

    def end(self, files: Files) -> None:
        """See `Tracker.end`."""
        assert self._sweep is not None, "a single run has no end"
        run = self._open(f"sweep-{self._sweep.id}", f"sweep {self._sweep.name}", "sweep")
        run.summary.update({"is_complete": files.is_complete})
        _copy(files.paths, Path(run.dir))
        for path in sorted(Path(run.dir).rglob("*")):
            if path.is_file():
                run.save(str(path), base_path=run.dir, policy="end")
        run.finish()

    def _open(self, run_id: str, name: str, kind: str) -> Any:
        """The run of this id: resumed online, begun anew offline."""
        for left in (self._dir / "wandb").glob(f"offline-run-*-{run_id}"):
            shutil.rmtree(left)
        settings = self._wandb.Settings(
            console="off",  # what this process prints is no part of the run
            disable_code=True,
            disable_git=True,
            init_timeout=self._settings["timeout_s"],
            silent=True,
            x_disable_meta=True,  # the record has the machine
            x_disable_stats=True,
            x_save_requirements=False,
        )
        return self._wandb.init(
            project=self._settings["project"],
            entity=self._settings["entity"],
            mode=self._settings["mode"],
            dir=self._dir,
            id=run_id,
            name=name,
            group=self._sweep.group if self._sweep is not None else None,
            job_type=kind,
            resume="allow" if self._settings["mode"] == "online" else None,
            settings=settings,
        )


def _copy(files: Iterable[Path], folder: Path) -> None:
    for path in files:
        place = folder / ("plots" if path.parent.name == "plots" else "")
        place.mkdir(exist_ok=True)
        shutil.copyfile(path, place / path.name)
