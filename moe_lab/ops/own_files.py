"""Whether a file that is going to be executed could have been put there by somebody else.

As ssh looks at a key: the file and every folder above it, links followed, belong to this user or to root, and nobody
else may write to them. A folder like /tmp, in which only the owner of a file may replace it, is fine.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from moe_lab.errors import UnavailableError


def require_own(path: Path) -> None:
    """Raise `UnavailableError`, one line, if somebody else owns or may write to what exists of `path`."""
    whole = path.absolute()
    real = Path(os.path.realpath(whole))
    for place in dict.fromkeys((real, whole, *real.parents, *whole.parents)):
        try:
            status = place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if status.st_uid not in (0, os.geteuid()):
            raise UnavailableError(
                f"{place} belongs to user {status.st_uid}, so {path.name} is not loaded; remove it, "
                "or set XDG_CACHE_HOME to a folder of your own"
            )
        is_shared = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_mode & 0o022 and not is_shared and not stat.S_ISLNK(status.st_mode):
            raise UnavailableError(
                f"{place} can be written by others, so {path.name} is not loaded; run chmod go-w {place}"
            )


def make_own_folder(folder: Path) -> None:
    """The folder and what lacks above it, for this user alone."""
    for place in (*reversed(folder.parents), folder):
        if not place.exists():
            place.mkdir(mode=0o700, exist_ok=True)
