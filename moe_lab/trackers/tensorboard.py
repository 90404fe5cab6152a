"""TensorBoard: a folder of event files for each cell, with scalars, hyperparameters and tags. It keeps no other files.

A folder is written beside its place and then renamed, so it is whole or not there.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe_lab.records import store
from moe_lab.trackers.message import Cell, Files, Sweep


class Tensorboard:
    """See `Tracker`."""

    needs: tuple[str, ...] = ("tensorboard",)
    environment: Mapping[str, str | None] = MappingProxyType({})

    def __init__(self, settings: Mapping[str, Any], folder: Path):
        self._dir = self.keeps = Path(settings["dir"] or folder / "tensorboard").absolute()
        self._is_shared = settings["dir"] is not None
        self.destination = str(self._dir) if self._is_shared else "tensorboard"

    def begin(self, sweep: Sweep | None) -> None:
        """See `Tracker.begin`."""
        if self._is_shared and sweep is not None:  # with other sweeps
            self._dir = self._dir / sweep.group
        store.own_folder(self._dir)

    def send(self, cell: Cell) -> None:
        """See `Tracker.send`."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = self._dir / f"{cell.name}-{cell.id}"
        beside = self._dir / f".{folder.name}.tmp"
        shutil.rmtree(beside, ignore_errors=True)  # of a sender that was killed
        writer = EventFileWriter(str(store.own_folder(beside)))
        for summary in _summaries(cell):
            writer.add_event(Event(wall_time=cell.ended_s or time.time(), step=0, summary=summary))
        writer.close()
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(beside, folder)

    def end(self, files: Files) -> None:
        """See `Tracker.end`."""


def _summaries(cell: Cell) -> Iterator[Any]:
    """Scalars, hyperparameters and text, as TensorBoard's own writers make them."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.plugins.text.metadata import PLUGIN_NAME

    numbers_and_words = (bool, int, float, str)
    params = {key: one if isinstance(one, numbers_and_words) else str(one) for key, one in cell.params.items()}
    yield hparams_pb(params, trial_id=cell.id, start_time_secs=cell.started_s)
    for key, value in cell.metrics.items():
        yield Summary(value=[Summary.Value(tag=key, simple_value=value)])
    plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME))
    for key, text in cell.tags.items():
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        yield Summary(value=[Summary.Value(tag=key, metadata=plugin, tensor=tensor)])
