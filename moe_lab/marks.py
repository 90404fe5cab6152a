"""Marks in the forward pass: which phase is being computed. Free when nobody listens.

    with phase("router"):
        ...

A listener (measure/phases.py) is told when a phase starts and ends; phases do not nest.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

NAMES = ("router", "dispatch", "experts", "combine", "attention")


class Listener(Protocol):
    """Told of every phase, in order."""

    def start(self, name: str) -> None: ...
    def stop(self, name: str) -> None: ...


_listener: Listener | None = None


def listen(listener: Listener | None) -> None:
    """Send the marks to `listener`, or to nobody."""
    global _listener
    _listener = listener


class phase:  # noqa: N801 - reads as a statement
    """Context manager around one phase: a name of `NAMES`, or several joined by `+` for one kernel that spans them."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        if _listener is not None:
            _listener.start(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if _listener is not None:
            _listener.stop(self.name)
