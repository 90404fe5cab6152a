"""Errors for the user. A mistake in the configuration is a plain `ValueError` that names the key and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UnavailableError(RuntimeError):
    """The requested configuration cannot run here: an implementation, a device, or a dtype on that device.

    An error with exit code 2 for a single run; a `skipped` row with this reason in a sweep.
    """


class MismatchError(RuntimeError):
    """The run's output disagrees with the fp32 reference, or the router with what it declares.

    `where` is `route`, `layers`, `timing`, `replay`, `export`, or the property that does not hold: `causal`,
    `batch_invariant`, `static_k`.

    `clause`: of the router's contract, where that is what was broken. `found`: what is known of an export.
    """

    def __init__(self, where: str, message: str, clause: str | None = None, found: dict[str, Any] | None = None):
        super().__init__(message)
        self.where, self.clause, self.found = where, clause, found


class ExportError(RuntimeError):
    """A model that could not be exported, or an exported one that does not compute what the model does."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """' Did you mean ...?' for the closest of `allowed`, or an empty string when none is close."""
    known = {_plain(name): name for name in allowed}
    match = difflib.get_close_matches(_plain(word), known, n=1, cutoff=0.5)
    return f" Did you mean {known[match[0]]}?" if match else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
