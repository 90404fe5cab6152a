"""The keys of a checkpoint's JSON files, read strictly: each value is checked, and each key that nobody reads is known.

A checkpoint is data from somebody else. So a file is a plain file of sane size, its numbers are finite, no key stands
twice, and a value in a message is one short line of printable text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe_lab.records import files
from moe_lab.terminal import printable

_LARGEST_SIZE = 1 << 27  # more than any width, vocabulary or context
LARGEST_NUMBER = 1e11  # more than any base or factor of RoPE
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_SHOWN = 100  # characters of a value, or of a tensor's key, in a message


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        OSError: the file cannot be read, or is not a plain one of sane size.
        ValueError: what is wrong with its content, without the file's name.
    """
    return parse_object(files.read_bytes(path))


def parse_object(text: bytes) -> dict[str, Any]:
    """The JSON object that `text` is. Raises `ValueError` as `read_object`."""
    content = files.parse_json(text.decode(), _DECODER)
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} stands twice")
    return content


_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_duplicates, parse_float=files.finite, parse_constant=files.finite
)


def shown(value: Any) -> str:
    """A value of a file as one short line of printable text."""
    text = printable(str(value)).replace("\n", "\\n")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def some(texts: Sequence[str], most: int = 20) -> str:
    """The first ones, and how many more there are."""
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def is_number(value: Any) -> bool:
    """Whether this is an integer or a float; true and false are neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Keys:
    """The keys of one JSON object of `path`. A missing required key is an error that names the key.

    `where` is the key of the object inside the file, as `rope_scaling`; empty for the whole file.
    """

    def __init__(self, path: Path, content: Mapping[str, Any], where: str = ""):
        self.path, self.content, self.where = path, content, where
        self._read: set[str] = set()
        self._parts: list[Keys] = []

    def need(self, *names: str) -> Any:
        """The value of a key, which may have several names."""
        value = self.get(*names)
        if value is None:
            raise ValueError(
                f"model.path: {self.path} has no {' or '.join(names)}; the configuration of a "
                f"{shown(self.content.get('model_type'))} checkpoint is incomplete. Download the file again."
            )
        return value

    def get(self, *names: str, default: Any = None) -> Any:
        """As `need`, with a default; null counts as missing.

        Raises:
            ValueError: the file has two of the names with different values.
        """
        self._read.update(names)
        there = [name for name in names if self.content.get(name) is not None]
        for name in there[1:]:
            if self.content[name] != self.content[there[0]]:
                both = " and ".join(f"{self._full(key)}={shown(self.content[key])}" for key in (there[0], name))
                raise self.refuse(f"{both} contradict each other; remove one of the two.")
        return self.content[there[0]] if there else default

    def size(self, *names: str, default: int | None = None, least: int = 1, most: int = _LARGEST_SIZE) -> int:
        """As `need`, or with a default as `get`: an integer between `least` and `most`."""
        value = self.need(*names) if default is None else self.get(*names, default=default)
        if not is_integer(value) or value < least:
            raise self._unfit(names, value, f"an integer >= {least}")
        if value > most:
            raise self._unfit(names, value, f"an integer <= {most}")
        return int(value)

    def number(self, *names: str, least: float = 0, most: float = LARGEST_NUMBER) -> float | None:
        """As `get`: a number > `least`, or None."""
        value = self.get(*names)
        if value is not None and (not is_number(value) or value <= least):
            raise self._unfit(names, value, f"a number > {least:g}")
        if value is not None and value > most:
            raise self._unfit(names, value, f"a number <= {most:g}")
        return value  # type: ignore[no-any-return]

    def flag(self, name: str, default: bool) -> bool:
        """As `get`: true or false."""
        value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise self._unfit((name,), value, "true or false")
        return value

    def integers(self, name: str) -> list[int]:
        """As `get`: one integer >= 0 or a list of them; none if there is none."""
        value = self.get(name, default=[])
        values = value if isinstance(value, list) else [value]
        if not all(is_integer(each) and each >= 0 for each in values):
            raise self._unfit((name,), value, "an integer >= 0 or a list of them")
        return values

    def part(self, name: str) -> Keys:
        """As `get`: the keys of an object; none if there is none."""
        value = self.get(name, default={})
        if not isinstance(value, dict):
            raise self._unfit((name,), value, "a JSON object")
        self._parts.append(Keys(self.path, value, self._full(name)))
        return self._parts[-1]

    def unread(self, silent: Iterable[str] = (), without: Mapping[str, Any] = _NOTHING) -> list[str]:
        """The keys that nobody has asked for and that are not null.

        Args:
            silent: those that need no mention.
            without: those that need none if they have this value.
        """
        there = {key for key, value in self.content.items() if value is not None and without.get(key) != value}
        names = [self._full(key) for key in sorted(there - self._read - set(silent))]
        return names + [name for part in self._parts for name in part.unread(silent, without)]

    def refuse(self, what: str) -> ValueError:
        return ValueError(f"model.path: {self.path}: {what}")

    def _unfit(self, names: Iterable[str], value: Any, wanted: str) -> ValueError:
        keys = " or ".join(map(self._full, names))
        return self.refuse(f"{keys}={shown(value)} must be {wanted}; download the file again.")

    def _full(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name
