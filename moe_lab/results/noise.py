"""The noise floor of a machine: the difference between two runs of the same cells.

It is stored in a cache folder under the hash of the machine; `moe-lab doctor --noise` measures it.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

from moe_lab.records import files
from moe_lab.records.store import write_atomic


def noise_file(env_id: str) -> Path:
    """Where the noise floor of a machine is kept. Raises `ValueError` if `env_id` is not 12 hex digits."""
    if not re.fullmatch(r"[0-9a-f]{12}", env_id):  # it comes from a record, and goes into a path
        raise ValueError(f"env_id={env_id!r}: must be 12 hexadecimal digits.")
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = given if given.is_absolute() else Path.home() / ".cache"  # as its specification asks
    return folder / "moe-lab" / f"noise-{env_id}.json"


def read_floor(env_id: str) -> float | None:
    """The difference between two runs of the same cells on this machine, as a ratio minus 1; None if not measured.

    If the file cannot be read, returns None with a warning.
    """
    try:
        floor = files.read_json(noise_file(env_id))["floor"]
        if not (isinstance(floor, int | float) and 0 <= floor < math.inf):
            raise ValueError(f"floor={floor!r}: must be a number >= 0")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        warnings.warn(
            f"cannot read the noise floor of machine {env_id!r}: {error!r}; run moe-lab doctor --noise", stacklevel=2
        )
        return None
    return float(floor)


def write_floor(env_id: str, content: dict[str, Any]) -> Path:
    """Keep a machine's noise floor: `content["floor"]`, a ratio minus 1, and whatever tells how it was measured."""
    assert 0 <= content["floor"] < math.inf
    path = noise_file(env_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")
    return path
