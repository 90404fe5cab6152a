"""What every tracker does. A new one is a class with these methods, listed in `_CLASSES`. Imports no torch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from moe_lab.errors import UnavailableError
from moe_lab.trackers.message import Cell, Files, Sweep


class Tracker(Protocol):
    """One tracker. It is made where a sweep is planned, without its package; its methods are called by `sender`.

    A sender may be killed at any point, and then everything that it was to do is done again: each method replaces what
    it finds half done, and leaves what is there and the same.
    """

    needs: tuple[str, ...]
    """The modules that it imports."""
    environment: Mapping[str, str | None]
    """Variables of its process, which these modules read when they are imported; None: not set."""
    destination: str
    """Where it sends, without secrets: what was sent to one place is not known at another."""
    keeps: Path | None
    """The file or folder of this machine where it keeps what was sent; None: elsewhere."""

    def __init__(self, settings: Mapping[str, Any], folder: Path):
        """`settings` are those of its option; `folder` is that of the sweep or the single run."""

    def begin(self, sweep: Sweep | None) -> None:
        """Connect, and make what holds the cells of the sweep; None for a single run."""

    def send(self, cell: Cell) -> None:
        """Send a cell. One of the same `id` with another content takes its place."""

    def end(self, files: Files) -> None:
        """Send the files of the sweep that was begun, and close it if it is complete."""


_CLASSES = {
    "mlflow": "moe_lab.trackers.mlflow.Mlflow",
    "trackio": "moe_lab.trackers.trackio.Trackio",
    "wandb": "moe_lab.trackers.wandb.Wandb",
    "tensorboard": "moe_lab.trackers.tensorboard.Tensorboard",
}


def make(name: str, settings: Mapping[str, Any], folder: Path) -> Tracker:
    """The tracker of this name."""
    module, _, attribute = _CLASSES[name].rpartition(".")
    made: Tracker = getattr(importlib.import_module(module), attribute)(settings, folder)
    return made


def require_installed(name: str, tracker: Tracker) -> None:
    """Raise `UnavailableError` if a module that the tracker needs is not here."""
    missing = [module for module in tracker.needs if importlib.util.find_spec(module) is None]
    if missing:
        raise UnavailableError(
            f"tracker={name}: needs {', '.join(missing)}; pip install 'moe-lab[trackers]', or leave tracker out."
        )
