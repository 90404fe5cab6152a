"""What was sent, noted beside the records: `.sent.json` in the folder of each cell, and in that of the sweep.

A note without a record, or of another content, is none: the record is then sent.
"""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import Any

from moe_lab.records import files, store


def key_of(folder: Path) -> str:
    """What tells this sweep or single run from all others of the same name, in a tracker that many use.

    Raises:
        OSError: it cannot be noted.
    """
    note = _read(folder)
    if not re.fullmatch("[0-9a-f]{8}", str(note.get("key"))):  # another may mean something to a tracker
        note["key"] = uuid.uuid4().hex[:8]
        _write(folder, note)
    return str(note["key"])


def is_sent(folder: Path, tracker: str, destination: str, content: str) -> bool:
    """Whether this content was sent to this place."""
    return _place(tracker, destination, content) in _read(folder)["sent"]


def add(folder: Path, tracker: str, destination: str, content: str) -> None:
    """Note what was sent; what was sent to the same place before is there no more. Raises `OSError`."""
    note = _read(folder)
    others = [one for one in note["sent"] if (one.get("tracker"), one.get("destination")) != (tracker, destination)]
    _write(folder, {**note, "sent": [*others, _place(tracker, destination, content)]})


def _place(tracker: str, destination: str, content: str) -> dict[str, str]:
    return {"tracker": tracker, "destination": destination, "content": content}


def _read(folder: Path) -> dict[str, Any]:
    try:
        note = files.read_json(folder / store.SENT)
        sent = [one for one in note["sent"] if isinstance(one, dict)]
        return {**note, "sent": sent}
    except (OSError, ValueError, KeyError, TypeError):  # nothing was sent, or somebody wrote something else there
        return {"sent": []}


def _write(folder: Path, note: dict[str, Any]) -> None:
    store.write_atomic(folder / store.SENT, json.dumps(note, indent=1).encode() + b"\n")
