"""Completion in a shell of the commands and their options; the rest is Hydra's own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from moe_lab.cli import listing
from moe_lab.config.schemas import CHOICES

_LINE = "COMP_LINE"


def complete(words: Mapping[str, Sequence[str]]) -> bool:
    """Print completions of the first word, and say whether they are all there are.

    `words` are the commands with their options. Behind `plan`, whose language is Hydra's, the word is taken out of
    COMP_LINE, and Hydra completes what follows.
    """
    if _LINE not in os.environ:  # the shell asks for the script, not for words
        return False
    line = os.environ[_LINE]
    program, _, rest = line.partition(" ")
    first, separator, behind = rest.lstrip().partition(" ")
    if not separator and "=" not in first:
        print(" ".join(word for word in words if word.startswith(first)))
        return False
    if first not in words:
        return _complete_values(rest)
    if first == "plan":
        os.environ[_LINE] = f"{program} {behind}"
        return _complete_values(behind)
    typed = behind.rpartition(" ")[2]  # options only where one begins: else the shell would not complete files
    print(" ".join(word for word in words[first] if word.startswith("-") == typed.startswith("-")))
    return True


def _complete_values(rest: str) -> bool:
    """Print the values that may stand behind a comma, and those of keys that have few; say whether it did.

    For bash a comma is part of the word, so each repeats what was typed before it.
    """
    *before, word = rest.split(" ")
    key, is_set, value = word.partition("=")
    typed, comma, start = value.rpartition(",")
    if not is_set or not (comma or key in CHOICES):
        return False
    folder = _config_dir_of(before)
    groups = listing.groups(folder if folder is not None and os.path.isdir(folder) else None)
    known = [path.stem for path in groups.get(key, ())] or [str(choice) for choice in CHOICES.get(key, ())]
    left = [name for name in known if name.startswith(start) and name not in typed.split(",")]
    print(" ".join(f"{key}={typed}{comma}{name}" for name in left))
    return True


def _config_dir_of(words: Sequence[str]) -> str | None:
    """The folder that `--config-dir` (or `-cd`) names, of a line that is not complete."""
    for position, word in enumerate(words):
        name, separator, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            return value if separator else next(iter(words[position + 1 :]), None)
    return None
