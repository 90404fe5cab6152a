"""Reads back what trackers have, as their own programs would: who a run is, and its numbers."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

EXPERIMENT = "moe-lab"


@dataclass
class Seen:
    """A run of a cell in a tracker."""

    cell_id: str
    status: str
    params: dict[str, Any]
    metrics: dict[str, float]
    files: dict[str, str] = field(default_factory=dict)
    """Text by name, where the tracker keeps files."""
    parent: str | None = None
    """What it has in common with the other cells of its sweep."""


def mlflow(uri: str) -> list[Seen]:
    """The runs that are not deleted, but for those of sweeps."""
    client = pytest.importorskip("mlflow").MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    found = []
    for run in client.search_runs([experiment.experiment_id]):
        tags, run_id = run.data.tags, run.info.run_id
        if "moe_lab.cell_id" not in tags:
            continue
        assert run.info.status == {"ok": "FINISHED", "failed": "FAILED", "skipped": "KILLED"}[tags["moe_lab.status"]]
        files = {one.path: Path(client.download_artifacts(run_id, one.path)) for one in client.list_artifacts(run_id)}
        found.append(
            Seen(
                tags["moe_lab.cell_id"],
                tags["moe_lab.status"],
                run.data.params,
                run.data.metrics,
                {name: path.read_text() for name, path in files.items()},
                tags.get("mlflow.parentRunId"),
            )
        )
    return found


def mlflow_sweeps(uri: str) -> dict[str, tuple[str, list[str]]]:
    """The runs of sweeps by their id: status and files."""
    client = pytest.importorskip("mlflow").MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string=f"name = '{EXPERIMENT}'")
    runs = [run for run in client.search_runs([experiment.experiment_id]) if "moe_lab.cell_id" not in run.data.tags]
    return {
        run.info.run_id: (run.info.status, sorted(one.path for one in client.list_artifacts(run.info.run_id)))
        for run in runs
    }


def trackio(folder: Path) -> list[Seen]:
    """The rows of its database; a run has one."""
    with sqlite3.connect(folder / f"{EXPERIMENT}.db") as database:
        rows = database.execute(
            "select c.config, m.metrics from metrics m left join configs c on m.run_id = c.run_id order by m.id"
        ).fetchall()
    found = []
    for config_text, metrics_text in rows:
        config = json.loads(config_text)
        if "cell_id" in config:
            found.append(Seen(config["cell_id"], config["status"], config, json.loads(metrics_text)))
            found[-1].parent = config["_Group"]
    return found


def wandb(folder: Path) -> list[Seen]:
    """The offline files below `folder`/wandb, a folder for each run."""
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        run, config, metrics, exit_code = None, {}, {}, None
        for content in _records_of_a_log(path.read_bytes()):
            record = internal.Record.FromString(content)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "config":
                config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.config.update}
            elif kind == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                metrics |= {key: value for key, value in items.items() if not key.startswith("_")}
            elif kind == "exit":
                exit_code = record.exit.exit_code
        assert run is not None and exit_code is not None, f"{path}: a run that did not end"
        files = {file.name: file.read_text() for file in (path.parent / "files").glob("*.json")}
        if run.job_type == "cell":
            found.append(Seen(config["cell_id"], config["status"], config, metrics, files, run.run_group or None))
    return found


def _records_of_a_log(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format: blocks of 32 KiB, of pieces with a header of 7 bytes; W&B's begins with 7 of its own."""
    position, parts = 7, []
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield b"".join(parts)
            parts = []


def tensorboard(folder: Path) -> list[Seen]:
    """The folders of event files, as TensorBoard reads them."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    hparams = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    found = []
    for path in sorted(path.parent for path in folder.rglob("events.out.*")):
        assert not path.name.startswith("."), "half written"
        accumulator = accumulators.EventAccumulator(str(path))
        accumulator.Reload()
        metrics = {}
        for tag in accumulator.Tags()["scalars"]:
            (event,) = accumulator.Scalars(tag)
            metrics[tag] = event.value
        tags = {
            tag.removesuffix("/text_summary"): accumulator.Tensors(tag)[0].tensor_proto.string_val[0].decode()
            for tag in accumulator.Tags()["tensors"]
            if tag != "_hparams_/session_start_info"
        }
        data = hparams.HParamsPluginData.FromString(
            accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        )
        params = {
            key: getattr(value, str(value.WhichOneof("kind"))) for key, value in data.session_start_info.hparams.items()
        }
        found.append(Seen(tags["cell_id"], tags["status"], params, metrics, parent=path.parent.name))
    return found


def of(name: str, folder: Path) -> list[Seen]:
    """What the tracker of `settings_of` has of the sweeps below `folder`."""
    places: dict[str, Callable[[], list[Seen]]] = {
        "mlflow": lambda: mlflow(f"sqlite:///{folder}/m.db"),
        "trackio": lambda: trackio(folder / "trackio"),
        "wandb": lambda: wandb(folder),
        "tensorboard": lambda: tensorboard(folder / "events"),
    }
    return places[name]()


def overrides_of(name: str, folder: Path) -> list[str]:
    """`tracker=NAME` that sends below `folder`."""
    places = {
        "mlflow": [f"tracker.mlflow.uri=sqlite:///{folder}/m.db"],
        "trackio": [f"tracker.trackio.dir={folder}/trackio"],
        "wandb": [f"tracker.wandb.dir={folder}", "tracker.wandb.mode=offline"],
        "tensorboard": [f"tracker.tensorboard.dir={folder}/events"],
    }
    return [f"tracker={name}", *places[name]]


def settings_of(name: str, folder: Path, **more: Any) -> dict[str, Any]:
    """The configuration's `tracker` of these overrides."""
    import moe_lab

    cfg = moe_lab.compose(overrides_of(name, folder))
    return {name: {**cfg.tracker[name], **more}}
