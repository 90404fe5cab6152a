"""Chromium for the tests of pages; they are skipped where it is not installed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import browser
from benchmarks.browser import emulate as emulate
from benchmarks.browser import show as show
from moe_lab.errors import UnavailableError


def start(*, offline: bool = True) -> Any:
    """See `benchmarks.browser.start`."""
    try:
        return browser.start(offline=offline)
    except UnavailableError as error:
        pytest.skip(str(error))
