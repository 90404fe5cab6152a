"""The noise floor of a machine: how far two runs of the same lie apart there.

It lies in a cache folder under the hash of the machine; `moe-lab doctor --noise` measures it.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

from moe_lab.records.store import write_atomic


def noise_file(env_id: str) -> Path:
    """Where the noise floor of a machine is kept. Raises `ValueError` for what is no `env_id`."""
    if not re.fullmatch(r"[0-9a-f]{12}", env_id):  # it comes from a record, and goes into a path
        raise ValueError(f"env_id={env_id!r}: 12 hexadecimal digits are expected.")
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = given if given.is_absolute() else Path.home() / ".cache"  # as its specification asks
    return folder / "moe-lab" / f"noise-{env_id}.json"


def read_floor(env_id: str) -> float | None:
    """How far two runs of the same lie apart on this machine, as a ratio minus 1; None where nobody measured it.

    A file that cannot be read counts as none, with a warning.
    """
    try:
        floor = json.loads(noise_file(env_id).read_text())["floor"]
        if not (isinstance(floor, int | float) and 0 <= floor < math.inf):
            raise ValueError(f"floor={floor!r}: a number from 0 is expected")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        warnings.warn(f"the noise floor of machine {env_id!r} cannot be read: {error!r}", stacklevel=2)
        return None
    return float(floor)


def write_floor(env_id: str, content: dict[str, Any]) -> Path:
    """Keep a machine's noise floor: `content["floor"]`, a ratio minus 1, and whatever tells how it was measured."""
    assert 0 <= content["floor"] < math.inf
    path = noise_file(env_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")
    return path
