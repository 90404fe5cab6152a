"""What `measure` asks a run to look at, and whether a finished run has looked at it.

None of it changes the result, so none is in the `cell_id`: whoever asks for more finds a finished cell that lacks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ASKED = (
    "routing",
    "record_routing",
    "reference_router",
    "phases",
    "roofline",
    "quality",
    "caches",
    "energy",
    "profile",
)
"""The keys of `measure` that ask for an observation: true or a router's node where they do."""


def asked(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration (or a record's `config`, which an older version may have written) asks for, by key."""
    measure = config.get("measure") or {}
    return {key: measure[key] for key in ASKED if measure.get(key)}


def lacking(config: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """The keys of `measure` by which `config` asks for what the run of the configuration `recorded` was not asked for.

    What was asked for and could not be had is not lacking: another run would not have it either.
    """
    has = asked(recorded)
    return [key for key, value in asked(config).items() if has.get(key) != value]


def differing(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys of `measure` for which two configurations do not ask alike."""
    return [key for key in ASKED if asked(config).get(key) != asked(other).get(key)]
