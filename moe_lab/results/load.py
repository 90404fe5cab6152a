"""A directory of runs as a pandas DataFrame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from moe_lab.records.identity import option_name
from moe_lab.records.store import RESULT, read_record

# Nested fields that stay out of the row: the whole configuration, and per-layer lists (routing.npz has those).
_NOT_COLUMNS = {"config", "routing.layers"}
_SETTINGS = ("batch", "seq_len", "seed")
_OPTIONS = ("model", "router", "experts", "workload", "device", "dtype", "execution")


def load(directory: str | Path) -> pd.DataFrame:
    """One row per `result.json` under `directory`, at any depth, ordered by path.

    Columns: `batch`, `seq_len`, `seed`, the chosen option of each group, then the record's fields, nested ones joined
    by dots (`latency_ms.p50`), and `directory`. What the model does not read (`seq_len` for minimal) is None.

    Raises:
        ValueError: there is no such folder, or a record cannot be read; the message names every such file.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"{root}: there is no such folder.")
    rows, unreadable = [], []
    for path in sorted(root.rglob(RESULT)):
        try:
            record = read_record(path.parent)
            rows.append({**_asked(record.config), **_flatten(record.to_dict()), "directory": str(path.parent)})
        except (ValueError, OSError) as error:
            unreadable.append(str(error))
        except (AttributeError, TypeError) as error:
            unreadable.append(f"{path}: its config is not that of a run: {error}")
    if unreadable:
        raise ValueError("unreadable records (move them away to load the rest):\n  " + "\n  ".join(unreadable))
    return pd.DataFrame(rows)


def _asked(config: dict[str, Any]) -> dict[str, Any]:
    ignored = set(config.get("model", {}).get("ignores") or ())
    settings = {key: None if key in ignored else config.get(key) for key in _SETTINGS}
    options = {key: None if key in ignored or not config.get(key) else option_name(config[key]) for key in _OPTIONS}
    return {**settings, **options}


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in _NOT_COLUMNS:
            continue
        if isinstance(value, dict):
            row.update(_flatten(value, f"{name}."))
        else:
            row[name] = value
    return row
