"""`moe_lab.compose`: a checked configuration, with messages that say what to call in Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from moe_lab.config import compose as composition
from moe_lab.config.unread import refuse_twice

_IN_PYTHON = {
    "add -m.": "call moe_lab.multirun.",
    "with -m": "with moe_lab.multirun",
    "in a sweep (-m)": "in a sweep (moe_lab.multirun)",
}
"""What a message tells the command line's user, and what it tells the caller."""


def compose(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> DictConfig:
    """Compose a configuration in the command line's language.

    Args:
        overrides: for example `["model=decoder_moe", "router=sinkhorn", "batch=2"]`.
        config_dir: a folder of the caller's own YAML files, whose modules `_target_` may then name. It adds options;
            where one has the name of the package's own, the package's is taken.

    Raises:
        ValueError: one line that names the key, the value, what is allowed and the nearest name.
    """
    with in_python():
        return composition.compose(overrides_of(overrides), config_dir=config_dir)


def overrides_of(words: Sequence[str]) -> list[str]:
    """A list of overrides. Raises `ValueError` for something else, and for a key that stands twice."""
    if isinstance(words, str):
        raise ValueError(f"{words!r}: must be a list of overrides, such as {[words]!r}.")
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise ValueError(f'{words!r:.60}: must be a list of overrides, such as ["router=sinkhorn"].')
    for word in words:
        if word.startswith("-"):
            raise ValueError(
                f"{word}: an option of the command line; in Python -m is moe_lab.multirun, --config-dir config_dir."
            )
    refuse_twice(words)
    return list(words)


@contextmanager
def in_python() -> Iterator[None]:
    """A mistake's line tells what to call, where it told which option to add."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for typed, called in _IN_PYTHON.items():
            text = text.replace(typed, called)
        if text == str(error):
            raise
        raise ValueError(text) from error
