"""What was typed: Hydra's options and overrides apart, and words that are neither. Hydra reads what passed here.

Hydra's own parser stops at a word it does not know with a page of usage, and takes no override behind an option.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import NamedTuple, NoReturn

from hydra._internal.utils import get_args_parser

from moe_lab.cli import listing
from moe_lab.config.schemas import Config
from moe_lab.config.unread import refuse_twice
from moe_lab.errors import nearest

_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # a web page or a word processor makes them of -
_ELSEWHERE = {
    **dict.fromkeys(("sweep", "multirun"), "write -m in its place"),
    **dict.fromkeys(("run", "bench", "benchmark", "moe-lab"), "leave it out: KEY=VALUE alone is a run"),
    "help": "write --help",
    "version": "write --version",
}
"""What other programs have as commands."""
_LETTERS = {"V": "version", "v": "version", "?": "help"}
_QUOTES = "\u2018\u2019\u201c\u201d\u00ab\u00bb"


class Typed(NamedTuple):
    """The words of a command in Hydra's language.

    options: those of Hydra, with their values.
    overrides: KEY=VALUE and the like.
    given: what Hydra's parser makes of them.
    """

    options: list[str]
    overrides: list[str]
    given: argparse.Namespace

    def words(self) -> list[str]:
        """In an order that Hydra reads: `batch=1 -m seq_len=8` too."""
        return [*self.options, *self.overrides]


def read(words: Sequence[str], commands: Mapping[str, object]) -> Typed:
    """The options and overrides among `words`.

    Raises:
        ValueError: a word that is neither, or an override that stands twice.
    """
    for word in words:
        _refuse_typography(word)
    parser = get_args_parser()
    for word in words:  # argparse reads -router as -r outer
        name = re.split("[=.]", word.lstrip("-"))[0]
        if re.match("-[a-z]", word) and name.replace("-", "_") in Config.__dataclass_fields__:
            raise ValueError(_unknown_option(word, words, parser))
    parser.error = _refuse  # type: ignore[method-assign]
    given, unknown = parser.parse_known_intermixed_args(list(words))
    if unknown:
        raise ValueError(_unknown_option(unknown[0], words, parser))
    if given.package and not given.cfg:
        raise ValueError(f"--package {given.package}: has no effect; only used with --cfg.")
    if given.resolve and not given.cfg:
        raise ValueError("--resolve: has no effect; only used with --cfg.")
    overrides = [str(word) for word in given.overrides]
    _refuse_no_override(overrides, commands)
    refuse_twice(overrides)
    options = list(words)
    for word in overrides:
        options.remove(word)
    return Typed(options, overrides, given)


def versions() -> str:
    """The line of `--version`."""
    return f"moe-lab {version('moe-lab')} (Hydra {version('hydra-core')}, torch {version('torch')})"


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message.removeprefix('argument ')} (moe-lab --help lists options and keys).")


def _refuse_typography(word: str) -> None:
    start = word.lstrip(_DASHES)
    if start != word:
        plain = "-" if len(start) <= 2 else "--"
        raise ValueError(f"{word}: begins with a typographic dash, not with -; type {plain}{start.lstrip('-')}.")
    key, _, value = word.partition("=")
    if {key[:1], value[:1]} & set(_QUOTES):
        plain = word.translate(dict.fromkeys(map(ord, _QUOTES)))
        raise ValueError(f"{word}: has typographic quotes, which the shell does not read as quotes; type '{plain}'.")


def _unknown_option(word: str, words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """For an option that Hydra does not have: mostly a key typed in another program's manner."""
    name, is_whole, value = word.lstrip("-").partition("=")
    key = name.replace("-", "_")
    first = key.split(".")[0].split("/")[0]
    if first in Config.__dataclass_fields__:
        behind = [*words, ""][words.index(word) + 1]
        if not is_whole:
            value = behind if behind and "=" not in behind and not behind.startswith("-") else "VALUE"
        return f"{word}: not an option; keys have no dashes: write {key}={value}."
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    near = nearest(f"--{_LETTERS.get(name, name)}", options) if len(name) > 1 or name in _LETTERS else ""
    return f"{word}: not an option (moe-lab --help lists options and keys).{near}"


def _refuse_no_override(words: Sequence[str], commands: Mapping[str, object]) -> None:
    for position, word in enumerate(words):
        behind = [*words, ""][position + 1]
        if not word.strip():
            raise ValueError(
                f"'{word}': an empty word; remove it, or write KEY=VALUE (an empty variable of the shell?)."
            )
        if word in commands:
            raise ValueError(f"{word}: a command stands first: write moe-lab {word} ... (moe-lab {word} --help).")
        key, is_override, value = word.partition("=")
        if is_override and key.strip() and key.strip() != key:
            raise ValueError(f"{word}: write {key.strip()}={value.strip()}, without spaces around =.")
        if is_override and not key:
            raise ValueError(f"{word}: has no key; write KEY=VALUE, without spaces around =.")
        if not is_override and position and _is_open(words[position - 1]):
            raise ValueError(_cut_at_spaces(words[position - 1 :]))
        if not is_override and not word.startswith("~"):  # ~KEY is Hydra's deletion
            raise ValueError(_no_override(word, behind, [*words, "", ""][position + 2], commands))


def _is_open(text: str) -> bool:
    return any(text.count(opening) > text.count(closing) for opening, closing in ("[]", "{}", "()"))


def _cut_at_spaces(words: Sequence[str]) -> str:
    """For a list or a mapping that nobody quoted."""
    whole = words[0]
    for word in words[1:]:
        if _is_open(whole):
            whole += f" {word}"
    return f"{whole}: the shell cut it at its spaces; quote it: '{whole}'."


def _no_override(word: str, behind: str, then: str, commands: Mapping[str, object]) -> str:
    """What to write in place of a word without `=`."""
    groups = listing.groups(None)
    start = f"{word}: not a command and not a KEY=VALUE override"
    if behind.startswith("="):
        return f"{word} {behind}: write {word}={behind[1:] or then}, without spaces around =."
    for separator in (":", "/"):
        key, _, value = word.rpartition(separator) if separator == "/" else word.partition(separator)
        if value and (key in groups or key in Config.__dataclass_fields__):
            return f"{start}; write {key}={value}."
    of = [group for group, paths in groups.items() if word in {path.stem for path in paths}]
    if of:
        return f"{start}; write {' or '.join(f'{group}={word}' for group in of)}."
    if word in _ELSEWHERE:
        return f"{start}; {_ELSEWHERE[word]}."
    near = nearest(word, [*commands, *(f"{group}=" for group in groups)])
    return f"{start} (moe-lab --help lists them).{near}"
