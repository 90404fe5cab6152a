"""Completion in a shell of the commands and their options; the rest is Hydra's own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

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
    if not separator:
        print(" ".join(word for word in words if word.startswith(first)))
        return False
    if first not in words:
        return False
    if first == "plan":
        os.environ[_LINE] = f"{program} {behind}"
        return False
    typed = behind.rpartition(" ")[2]  # options only where one begins: else the shell would not complete files
    print(" ".join(word for word in words[first] if word.startswith("-") == typed.startswith("-")))
    return True
