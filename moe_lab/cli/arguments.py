"""The parser of the words beside Hydra's language."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A mistake is one line like any other, in place of argparse's usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise `ValueError`; `cli.main` prints it."""
        raise ValueError(f"{self.prog.removeprefix('moe-lab ')}: {message} ({self.prog} --help)")
