"""Waiting in tests for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def becomes_true(question: Callable[[], Any]) -> None:
    """Return when it is; fail after five minutes."""
    deadline = time.monotonic() + 300
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.1)
