"""A table for a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence

from moe_lab.cli import fit
from moe_lab.cli.fit import Column
from moe_lab.terminal import printable


def html_table(columns: Sequence[Column], notes: Sequence[str] = ()) -> str:
    """The columns, and a line for each note below them."""
    columns = fit.fit(columns, None).columns
    align = ["left" if column.is_name or column.is_left else "right" for column in columns]

    def row(tag: str, texts: Sequence[str]) -> str:
        cells = zip(texts, align, strict=True)
        return "".join(f'<{tag} style="text-align: {side}">{html.escape(text)}</{tag}>' for text, side in cells)

    head = row("th", [column.heading for column in columns])
    body = "".join(f"<tr>{row('td', texts)}</tr>" for texts in zip(*(column.cells for column in columns), strict=True))
    below = "".join(f"<div>{html.escape(printable(note))}</div>" for note in notes)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"
