"""Text in a CSV file that a spreadsheet would take for a formula. Numbers are not touched.

A spreadsheet computes a cell that begins with `=`, `+`, `-`, `@`, a tab or a line break, which may open a program or
fetch an address. Such a text gets an apostrophe in front. So does one that has an apostrophe there already, so that
`original` gives every text back.
"""

from __future__ import annotations

import re

FORMULA = "^'*([ \t\r\n\x0b\x0c\xa0]*[=+\\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n])"
"""Read by Python and by Arrow; the signs at the end are those of full width."""
_FORMULA = re.compile(FORMULA)


def guarded(text: str) -> str:
    """The text as it stands in a CSV file."""
    return f"'{text}" if _FORMULA.match(text) else text


def original(text: str) -> str:
    """The text whose `guarded` one was read from a CSV file."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text
