"""What reaches a terminal: text from files cannot move the cursor, set a title or turn the direction of writing.

A checkpoint, a record, a name or an error message may hold escape codes. `main` puts `Filtered` in the place of
standard output and standard error, and tables are printed on the `Console` of this module.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import IO, Any, TextIO

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

# C0 but for tab and line feed, DEL, C1, marks and overrides of direction, line separators, halves of surrogates.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with control characters in writing: `\\x1b` for the escape character."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Filtered:
    """A text stream that writes what is printable."""

    def __init__(self, stream: TextIO):
        self.rich_proxied_file = stream  # rich writes its own codes there, and a `Console` filters the text

    def write(self, text: str) -> int:
        """Write to the stream."""
        self.rich_proxied_file.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


class Console(rich.console.Console):
    """rich's console for text from anywhere."""

    def __init__(self, **options: Any):
        # In a notebook rich would display a piece of HTML for each line, in place of writing to the stream.
        super().__init__(force_jupyter=False, **options)

    @property
    def file(self) -> IO[str]:
        """The stream itself: while a progress bar is shown, rich has put one of its own before `Filtered`."""
        file = super().file
        return getattr(file, "rich_proxied_file", file)

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Every piece of text, printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def write_data(text: str) -> None:
    """Write to standard output: as it is to a file or a pipe, where a program reads it."""
    stream = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    stream.write(printable(text) if stream.isatty() else text)
