"""Steps of runs executed in this process (`sweep.worker=false`)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from moe_lab.sweep.engine import START_S

if TYPE_CHECKING:
    from moe_lab.sweep.bench import Bench


class InProcess:
    """This process (`sweep.worker=false`): no time-out, and a crash is the end of the sweep."""

    def __init__(self) -> None:
        self.life = 0
        self._bench: Bench | None = None

    @property
    def pid(self) -> int:
        """See `Engine.pid`."""
        return os.getpid()

    def call(self, step: str, *arguments: Any, timeout_s: float = START_S) -> Any:
        """See `Engine.call`."""
        from moe_lab.runs.unchanged import unchanged_process
        from moe_lab.sweep.bench import Bench  # imports torch

        self._bench = self._bench or Bench()
        with unchanged_process():
            return getattr(self._bench, step)(*arguments)

    def settle(self, timeout_s: float) -> None:
        """See `Engine.settle`; the interrupt ended the step."""

    def renew(self) -> None:
        """What was built is let go of; the process stays."""
        self._bench = None
        self.life += 1

    def close(self) -> None:
        """See `Engine.close`."""
        self._bench = None
