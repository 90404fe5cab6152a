"""Variables of a Ray cluster that a sweep starts on this machine. Ray reads them once, when it is imported."""

from __future__ import annotations

import os
import secrets
import sys

STARTED_HERE = ("", "local")
"""Values of `RAY_ADDRESS` with which a cluster is started here."""


def prepare() -> None:
    """Set what the person has not set, unless the cluster is another one or ray has been imported already."""
    if os.environ.get("RAY_ADDRESS", "") not in STARTED_HERE or "ray" in sys.modules:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 lets others go before what is timed
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # no slot takes a process that has no runtime_env
    if "RAY_AUTH_MODE" not in os.environ:  # it listens on every address of the machine
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
