"""MLflow: a run for each cell, nested in one for the sweep. A server, or the database file that `mlflow ui` reads.

A run has the tags `moe_lab.run`, which finds it again, and `moe_lab.content`, which tells whether it is the same. One
that differs, or that a killed sender left unfinished, is deleted (MLflow keeps it in its trash) and sent anew.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from moe_lab.config import addresses
from moe_lab.trackers.message import Cell, Files, Sweep

_FILE = "mlflow.db"
_STATUS = {"ok": "FINISHED", "failed": "FAILED", "skipped": "KILLED"}
_LONGEST_PARAM, _LONGEST_TAG = 6000, 5000  # characters that MLflow takes
_MOST_PARAMS, _MOST_METRICS = 100, 500  # in one request, of which it takes 1000 entries


class Mlflow:
    """See `Tracker`."""

    def __init__(self, settings: Mapping[str, Any], folder: Path):
        self._experiment = settings["experiment"]
        self._uri = settings["uri"] or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_FILE}"
        try:
            parts = urlsplit(self._uri)
        except ValueError:  # without the address, which may have a password
            raise ValueError("MLFLOW_TRACKING_URI: is not an address; set one such as http://host:5000.") from None
        self._files: str | None = None
        if self._uri.startswith("sqlite:///"):  # one file in every folder, so its place belongs to its name
            file = Path(self._uri.removeprefix("sqlite:///")).absolute()
            self._uri = f"sqlite:///{file}"
            self._files = (file.parent / "mlruns").as_uri()  # beside it, not in the current folder
            self.keeps: Path | None = file.with_name(file.name.partition("?")[0])
        else:
            self.keeps = Path(url2pathname(parts.path)) if parts.scheme == "file" else None
        self.needs = ("mlflow", "sqlalchemy", "alembic") if "sql" in self._uri.partition(":")[0] else ("mlflow",)
        self.destination = f"{addresses.place(self._uri)} {self._experiment}"
        self.environment: dict[str, str | None] = {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # else a server that is down is tried for minutes
        }
        self._parent: str | None = None

    def begin(self, sweep: Sweep | None) -> None:
        """See `Tracker.begin`."""
        from mlflow import MlflowClient

        self._client = MlflowClient(self._uri)
        found = self._client.get_experiment_by_name(self._experiment)
        self._experiment_id = (
            found.experiment_id if found else self._client.create_experiment(self._experiment, self._files)
        )
        if sweep is not None:
            runs = self._runs(sweep.id)
            self._parent = runs[0].info.run_id if runs else self._create(sweep.id, sweep.name, {}, time.time())

    def send(self, cell: Cell) -> None:
        """See `Tracker.send`."""
        runs = self._runs(cell.id)
        is_there = False
        for run in runs:
            ended = run.info.status != "RUNNING"  # else its sender was killed
            if ended and not is_there and run.data.tags.get("moe_lab.content") == cell.content:
                is_there = True
            else:
                self._client.delete_run(run.info.run_id)
        if is_there:
            return
        tags = {f"moe_lab.{key}": _short(value, _LONGEST_TAG) for key, value in cell.tags.items()}
        tags["moe_lab.content"] = cell.content
        if self._parent is not None:
            tags["mlflow.parentRunId"] = self._parent
        run_id = self._create(cell.id, cell.name, tags, cell.started_s or time.time())
        try:
            self._log(run_id, cell)
            with tempfile.TemporaryDirectory() as folder:
                self._client.log_artifact(run_id, str(cell.write_record(Path(folder))))
        except Exception:
            self._client.delete_run(run_id)  # if MLflow refused something, not half of a run is left
            raise
        ended_s = cell.ended_s
        self._client.set_terminated(
            run_id, _STATUS[cell.record["status"]], round(ended_s * 1e3) if ended_s is not None else None
        )

    def end(self, files: Files) -> None:
        """See `Tracker.end`."""
        assert self._parent is not None, "begin comes first"
        for path in files.paths:
            self._client.log_artifact(self._parent, str(path), "plots" if path.parent.name == "plots" else None)
        if files.is_complete:
            self._client.set_terminated(self._parent)
        else:
            self._client.update_run(self._parent, "RUNNING")

    def _runs(self, name: str) -> list[Any]:
        """The runs, of which one should be, that have this `moe_lab.run`."""
        return list(self._client.search_runs([self._experiment_id], f"tags.`moe_lab.run` = '{name}'"))

    def _create(self, name: str, shown: str, tags: Mapping[str, str], started_s: float) -> str:
        """A run that `_runs` finds from the moment in which it is made; its id."""
        tags = {**tags, "moe_lab.run": name}
        run = self._client.create_run(self._experiment_id, round(started_s * 1e3), tags, run_name=shown)
        return str(run.info.run_id)

    def _log(self, run_id: str, cell: Cell) -> None:
        from mlflow.entities import Metric, Param

        stamp_ms = round((cell.ended_s or time.time()) * 1e3)
        metrics = [Metric(_name(key), value, stamp_ms, 0) for key, value in cell.metrics.items()]
        params = [Param(_name(key), _short(str(value), _LONGEST_PARAM)) for key, value in cell.params.items()]
        while metrics or params:
            self._client.log_batch(run_id, metrics[:_MOST_METRICS], params[:_MOST_PARAMS])
            del metrics[:_MOST_METRICS], params[:_MOST_PARAMS]


def _name(key: str) -> str:
    """MLflow has few characters in its names."""
    return re.sub(r"[^\w\-. :/]", "_", key)


def _short(text: str, longest: int) -> str:
    """What is too long is cut, and says so; `record.json` has all of it."""
    return text if len(text) <= longest else f"{text[: longest - 30]}... (cut; see record.json)"
