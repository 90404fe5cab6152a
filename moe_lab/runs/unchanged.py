"""A plug-in shares this process: what it changes of it is undone, so that only its own run is harmed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


@contextmanager
def unchanged_process() -> Iterator[None]:
    """The current folder and the standard streams are as before afterwards; a fork made inside ends here."""
    process, folder, streams = os.getpid(), os.getcwd(), (sys.stdout, sys.stderr)
    kept: dict[int, int] = {}
    for number in (1, 2):
        with suppress(OSError):  # closed by whoever started this process
            kept[number] = os.dup(number)
    try:
        yield
    finally:
        if os.getpid() != process:
            os._exit(1)  # else it would go on beside its parent, and record what that records
        os.chdir(folder)
        for number, copy in kept.items():
            with suppress(OSError):  # it closed the copy too
                os.dup2(copy, number)
                os.close(copy)
        sys.stdout, sys.stderr = (_usable(stream, number) for stream, number in zip(streams, (1, 2), strict=True))


def _usable(stream: TextIO, number: int) -> TextIO:
    return open(number, "w", buffering=1, closefd=False) if stream is not None and stream.closed else stream
