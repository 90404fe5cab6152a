"""The folders of a sweep's cells: below the sweep's own, each cell its own, and names that the disk takes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

_LONGEST_NAME, _LONGEST_PATH = 255, 4096
_OF_A_SWEEP = re.compile(r"plots|\..*|.*\.(csv|html|js|json|log|parquet|yaml)")
"""What else is called so in it."""
_FILES = 64  # characters that names of files in a cell's folder may add


def check(sweep: Path, cells: Sequence[Path]) -> None:
    """Raise `ValueError` if two of `cells` share a folder, or one cannot be a folder below that of the sweep.

    Names that differ only in upper and lower case are the same on some disks, so they count as one.
    """
    below = sweep.resolve()
    seen: dict[str, Path] = {}
    for cell in cells:
        if len(str(cell.absolute())) + _FILES > _LONGEST_PATH or any(
            len(os.fsencode(part)) > _LONGEST_NAME for part in cell.parts
        ):
            raise ValueError(
                f"hydra.sweep.subdir: {str(cell)[:80]}... is too long for a folder's name "
                f"({_LONGEST_NAME} bytes); use a shorter one."
            )
        if cell.is_symlink():
            raise ValueError(f"hydra.sweep.subdir: {cell} is a link, so files would be written elsewhere; remove it.")
        place = cell.resolve()
        if below not in place.parents:
            raise ValueError(
                f"hydra.sweep.subdir: {cell} is not below the sweep's folder {sweep}; use names of folders below it."
            )
        if _OF_A_SWEEP.fullmatch(first := place.relative_to(below).parts[0]):
            raise ValueError(f"hydra.sweep.subdir: {first} has another use in a sweep's folder; use another name.")
        other = seen.setdefault(str(place).casefold(), cell)
        if other is not cell:
            raise ValueError(
                f"hydra.sweep.subdir: two cells would have the folder {cell}, and one result would be lost; remove the "
                "override, or use one that differs for each cell (${moe_lab.slug:}-${moe_lab.cell_id:})."
            )
    for cell in cells:
        above = [str(folder).casefold() for folder in cell.resolve().parents]
        if shared := [seen[folder] for folder in above if folder in seen]:
            raise ValueError(
                f"hydra.sweep.subdir: {cell} lies in {shared[0]}, the folder of another cell; use other names."
            )
