"""What `list`, `plan` and `doctor` print with --json; docs/results-format.md has the keys."""

from __future__ import annotations

import json
from typing import Any

from moe_lab.records.store import as_json


def print_json(content: dict[str, Any]) -> None:
    """One document. NaN and infinity are null; control characters and whatever is not ASCII are escaped."""
    text = json.dumps({"schema": 1, **as_json(content)}, indent=1, allow_nan=False)
    print(text.replace("\x7f", "\\u007f"))  # which JSON allows, and a terminal does not get
