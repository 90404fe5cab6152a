"""The parser of the words beside Hydra's language."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn


class _StoreOnce(argparse.Action):
    """argparse keeps the last of an option that is given twice; a word that is not read is a mistake here."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if self.option_strings and getattr(namespace, f"{self.dest} was given", False):
            parser.error(f"{self.option_strings[0]} is given twice")
        setattr(namespace, self.dest, values)
        setattr(namespace, f"{self.dest} was given", True)


def _path(text: str) -> Path:
    """Of an empty word `Path` makes the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty word (an empty variable of the shell?); give a path")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """A mistake is one line like any other, in place of argparse's usage and exit."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.register("action", None, _StoreOnce)
        self.register("action", "store", _StoreOnce)
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        """Raise `ValueError`; `cli.main` prints it."""
        raise ValueError(f"{self.prog.removeprefix('moe-lab ')}: {message} ({self.prog} --help)")
