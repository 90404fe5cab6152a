"""The tables of docs/results-format.md, made from `columns.TABLES`.

Write them anew after a change of the columns: `python -m moe_lab.results.format_page`, from the root of a checkout.
"""

from __future__ import annotations

import re
from pathlib import Path

from moe_lab.records.fields import Fields
from moe_lab.records.store import write_atomic
from moe_lab.results.columns import TABLES

PAGE = Path("docs/results-format.md")
_KINDS = {
    str: "text",
    int: "int",
    float: "float",
    bool: "bool",
    list[str]: "list of text",
    list[float]: "list of float",
    None: "any",
}


def rows(fields: Fields) -> str:
    """A Markdown table with a row per field."""
    lines = [f"| `{name}` | {_KINDS[kind]} | {unit} | {meaning} |" for name, kind, unit, meaning, _ in fields]
    return "\n".join(["| column | type | unit | meaning |", "|---|---|---|---|", *lines, ""])


def page(text: str) -> str:
    """The page with the table below each heading `## <name of a table>` made anew; the rest stays as it is.

    Raises:
        ValueError: there is no such heading, or no table below it.
    """
    for name, fields in TABLES.items():
        match = re.search(rf"^## {name}\n[^#|]*((?:\|.*\n)+)", text, re.MULTILINE)
        if match is None:
            raise ValueError(f"{PAGE}: must have a heading `## {name}` with a table below it.")
        text = text[: match.start(1)] + rows(fields) + text[match.end(1) :]
    return text


if __name__ == "__main__":
    write_atomic(PAGE, page(PAGE.read_text()).encode())
