"""Trackio: a run for each cell in its database on this machine; those of a sweep are a group.

A run is found again by its name. Trackio reports no errors, so what was written is read back.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_lab.trackers.message import Cell, Files, Sweep


def _default() -> Path:
    """Trackio's own folder: in the cache of Hugging Face, whose place huggingface_hub/constants.py says so."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.path.expandvars(Path(os.environ.get("HF_HOME", f"{caches}/huggingface")).expanduser())) / "trackio"


class Trackio:
    """See `Tracker`."""

    needs: tuple[str, ...] = ("trackio",)

    def __init__(self, settings: Mapping[str, Any], folder: Path):
        self._project = settings["project"]
        self._dir = Path(settings["dir"] or os.environ.get("TRACKIO_DIR") or _default()).absolute()
        self.keeps: Path | None = self._dir
        self.destination = f"{self._dir} {self._project}"
        # Not to a Space, whatever else this person uses trackio for: `trackio sync` uploads it.
        self.environment: dict[str, str | None] = dict.fromkeys(("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
        self.environment["TRACKIO_DIR"] = str(self._dir)
        self._sweep: Sweep | None = None

    def begin(self, sweep: Sweep | None) -> None:
        """See `Tracker.begin`."""
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._dir).close()
        except OSError as error:
            why = error.strerror or error
            raise OSError(f"{self._dir} cannot be written ({why}); set tracker.trackio.dir or TRACKIO_DIR") from error
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self._trackio, self._storage = trackio, SQLiteStorage
        self._sweep = sweep

    def send(self, cell: Cell) -> None:
        """See `Tracker.send`."""
        name = f"{cell.name}-{cell.id}"
        config = {**cell.params, **cell.tags, "content": cell.content}
        with tempfile.TemporaryDirectory() as folder:
            self._send(name, config, cell.metrics, {"record": [cell.write_record(Path(folder))]})

    def end(self, files: Files) -> None:
        """See `Tracker.end`."""
        config = {"is_complete": files.is_complete, "content": "sweep"}
        assert self._sweep is not None, "a single run has no end"
        name = f"sweep-{self._sweep.group}"
        self._send(name, config, {"files": float(len(files.paths))}, {"sweep": files.paths})

    def _send(
        self, name: str, config: dict[str, Any], metrics: dict[str, float], artifacts: Mapping[str, list[Path]]
    ) -> None:
        """A run in place of those of this name."""
        for run in self._storage.get_run_records(self._project):
            if run["name"] == name:
                self._storage.delete_run(self._project, name, run["id"])
        group = self._sweep.group if self._sweep is not None else None
        run = self._trackio.init(
            self._project, name, group, config=config, auto_log_gpu=False, auto_log_cpu=False, embed=False
        )
        run.log(metrics)
        for kind, files in artifacts.items():
            artifact = self._trackio.Artifact(name=f"{kind}-{name}", type=kind)
            for path in files:
                artifact.add_file(path)
            run.log_artifact(artifact)
        run.finish()
        written = self._storage.get_logs(self._project, name)
        if len(written) != 1 or not metrics.keys() <= written[0].keys():
            raise RuntimeError(f"trackio did not write the run {name}")
