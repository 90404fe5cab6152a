"""`moe_lab.compare`: two folders of results, cell by cell."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from rich.text import Text

from moe_lab.cli import compare as shown
from moe_lab.results import gate
from moe_lab.results.compare import compare as compared
from moe_lab.results.gate import Gate


class Comparison(pd.DataFrame):  # type: ignore[misc]
    """A row per cell, with its verdict, shown as `moe-lab compare` prints it. A selection of it is plain pandas."""

    @property
    def summary(self) -> str:
        """The count of each verdict, and the geometric mean of B/A."""
        return shown.summary(self)

    def gate(self, fail_on: str = "slower,failed,missing") -> Gate:
        """Whether no cell is one of these, and at least one was judged: true or false, with `code` and `why`.

        Args:
            fail_on: the words of `moe-lab compare --fail-on`.

        Raises:
            ValueError: a word that is not one of them.
        """
        return gate.judge(self, gate.words_of(fail_on, "fail_on"))

    def __repr__(self) -> str:
        if "verdict" not in self:
            return str(super().__repr__())
        written = io.StringIO()
        shown.to_terminal(self, written)
        return written.getvalue().rstrip("\n")

    def __rich__(self) -> Text:
        return Text(repr(self))

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"


def compare(
    a: str | Path, b: str | Path, *, threshold: float = 0.03, floors: Mapping[str, float] | None = None
) -> Comparison:
    """Whether the results in folder `b` are slower or faster than those in `a`: a row per cell, with its verdict.

    The columns and the verdicts are those of `moe-lab compare --csv`; `gate()` says whether it passes.

    Args:
        threshold: the smallest difference that matters, a ratio minus 1.
        floors: noise floor by `env_id`, a ratio minus 1; None reads those that `moe-lab doctor --noise` stored.

    Raises:
        ValueError: a threshold out of range; a folder that is missing or has no record that can be read; no cell in
            common, because the cell_ids of the two versions of moe-lab differ.
    """
    return Comparison(compared(Path(a), Path(b), threshold=threshold, floors=floors))
