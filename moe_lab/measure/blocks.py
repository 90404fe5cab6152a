"""Timing a block while the machine is looked at: before and behind it, never during. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from moe_lab.measure.contention import Watch
from moe_lab.measure.energy import Lap, Meter

MOST_REPEATS = 10
"""How many throttled blocks of a group are timed again in all; a machine that always throttles would never end."""
PAUSE_S = 1.0
"""Before a throttled block is repeated: to cool down."""

T = TypeVar("T")


class Seen(NamedTuple):
    """What is known of a block beside its samples."""

    throttled: str = ""
    """What slowed the machine down; empty if nothing that can be read did."""
    repeats: int = 0
    """Throttled blocks that were discarded in its place."""
    lap: Lap = Lap()


class Blocks:
    """Times the blocks of a run or of a group."""

    def __init__(self, watch: Watch, meter: Meter | None, *, repeats: bool):
        """With `repeats` a throttled block is timed again, at most `MOST_REPEATS` times in all."""
        self._watch, self._meter = watch, meter
        self._left = MOST_REPEATS if repeats else 0

    def begin(self) -> None:
        """To be called before the first block, and where something else was done since the last."""
        if self._meter is not None:
            self._meter.lap()

    def timed(self, time_block: Callable[[], T]) -> tuple[T, Seen]:
        """The result of `time_block`, and what was seen of it."""
        repeats = 0
        while True:
            block = time_block()
            lap = Lap() if self._meter is None else self._meter.lap()
            reasons = self._watch.look()
            if not reasons or not self._left:
                return block, Seen(", ".join(sorted(reasons)), repeats, lap)
            self._left -= 1
            repeats += 1
            self._watch.forget(reasons)
            time.sleep(PAUSE_S)
            self.begin()
