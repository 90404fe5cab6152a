"""Whether a comparison passes: which verdicts match the words that are called a failure, and what was not judged."""

from __future__ import annotations

import re
from typing import NamedTuple

import pandas as pd

JUDGED = ("slower", "faster", "same")
FAIL_ON = {
    "slower": "slower",
    "faster": "faster",
    "failed": ".*(failed|unreadable) in (B|both).*",
    "missing": "only in A|.*(skipped|not timed) in B.*",
    "inconclusive": "inconclusive",
    "any": "(?!same$|inconclusive$|.* in both$).*",
}
"""The words, each with a pattern of the verdicts that match it (`results.compare.compare`)."""

PASSED, MATCHED, NOTHING_JUDGED = 0, 1, 3


class Gate(NamedTuple):
    """The answer; true if it passed."""

    code: int
    """The exit code of `moe-lab compare --fail-on`: 0 passed, 1 a cell matches, 3 nothing was judged."""
    why: str
    """In a line; nothing to say is empty."""

    def __bool__(self) -> bool:
        return self.code == PASSED


def words_of(text: str, option: str) -> list[str]:
    """`slower,failed` as its words. Raises `ValueError` for an unknown one, one given twice, or none."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in FAIL_ON:
            raise ValueError(f"{option}={text}: {word or 'nothing'} is not one of {', '.join(FAIL_ON)}.")
    if len(set(words)) < len(words):
        raise ValueError(f"{option}={text}: name each word once.")
    return words


def judge(df: pd.DataFrame, words: list[str]) -> Gate:
    """Whether no cell of the comparison matches one of the words, and at least one was judged."""
    verdicts = df["verdict"]
    counts = {word: int(verdicts.map(re.compile(FAIL_ON[word]).fullmatch).notna().sum()) for word in words}
    n_matches = int(verdicts.map(re.compile("|".join(FAIL_ON[word] for word in words)).fullmatch).notna().sum())
    not_judged = verdicts[~verdicts.isin(JUDGED)].value_counts()
    n_judged = len(df) - int(not_judged.sum())
    told = ", ".join(f"{count} {verdict}" for verdict, count in not_judged.items())
    if n_matches:
        by_word = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        return Gate(MATCHED, f"{n_matches} of {len(df)} rows match ({by_word})")
    if not n_judged:
        remedy = "; measure with measure.replicates=3" if "inconclusive" in not_judged else ""
        return Gate(NOTHING_JUDGED, f"nothing was judged ({told}), so the gate does not pass{remedy}")
    if told:
        return Gate(PASSED, f"passed, but {len(df) - n_judged} of {len(df)} rows were not judged: {told}")
    return Gate(PASSED, "")
