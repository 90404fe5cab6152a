"""How sure the answers are: what was measured badly, compared with nothing, or timed too short, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from moe_lab.records.schema import BUSY, LAUNCH_BOUND
from moe_lab.results.contest import Setting
from moe_lab.results.verdicts import every, judged

DOUBTFUL = "Speeds are doubtful"
"""How the sentence begins if most latencies were measured badly."""


def _doubts(runs: pd.DataFrame) -> str:
    """How many latencies were measured badly, and what to do; that most were stands in front."""
    ran = runs[runs["latency_ms.p50"].notna()]
    warned = [texts if isinstance(texts, list) else [] for texts in ran["warnings"]]
    found = [
        (ran["latency_ms.stable"].eq(False).fillna(False).to_numpy(bool), "not stable (raise measure.max_time_s)"),
        (_start(warned, BUSY), "measured on a busy machine (repeat them on an idle one)"),
        (_start(warned, LAUNCH_BOUND), "launch-bound and so say nothing of kernels (use execution=cuda_graph)"),
    ]
    n, found = len(ran), [(bad, what) for bad, what in found if bad.any()]
    if not found:
        return ""
    most = np.any([bad for bad, _ in found], axis=0).mean() > 0.5
    if all(bad.all() for bad, _ in found):
        text = (
            f"{every(n, 'latency', 'latencies')} {'is' if n == 1 else 'are'} {', and '.join(what for _, what in found)}"
        )
        return f"{DOUBTFUL}: {text}"
    parts = [f"{bad.sum():,} {'is' if bad.sum() == 1 else 'are'} {what}" for bad, what in found]
    return f"{f'{DOUBTFUL}: of' if most else 'Of'} {n:,} latencies {', '.join(parts)}"


def _start(warnings: Sequence[Sequence[str]], start: str) -> np.ndarray:
    return np.array([any(text.startswith(start) for text in texts) for texts in warnings], bool)


def unsure(runs: pd.DataFrame, summary: pd.DataFrame, settings: Sequence[Setting]) -> list[str]:
    ran = summary[summary["status"] == "ok"]
    others = [cell for setting in settings for cell in setting.cells if not cell.is_anchor]
    if len(ran) and not others:
        return ["Nothing was compared: every setting has one variant that ran; add one, such as router=torch,sinkhorn"]
    texts = [text] if (text := _doubts(runs)) else []
    compared = [cell for cell in others if cell.is_timed]
    spans = sum(judged(*cell.ratio[1:]) == "inconclusive" for cell in compared)
    if spans:
        texts.append(
            f"{_of(spans, len(compared), 'comparison')} inconclusive, because the interval has 1 in it: raise "
            "measure.max_time_s or measure.replicates"
        )
    paired = ran["ratio_to_anchor.paired"].fillna(False).astype(bool) & ~ran["is_anchor"].fillna(False).astype(bool)
    short = int((paired & ran["ratio_to_anchor.ci95_low"].isna()).sum())
    if short:
        of = _of(short, int(paired.sum()), "ratio")
        texts.append(f"{of} without an interval, from too few rounds: raise measure.max_time_s")
    alone = sum(len(s.cells) for s in settings if not any(cell.is_anchor for cell in s.cells))
    if alone:
        texts.append(
            f"{_of(alone, len(others), 'cell')} compared with nothing, because the anchor of the setting did not run"
        )
    apart = len(others) - alone - int(paired.sum())
    if apart > 0:
        texts.append(
            f"{_of(apart, len(others), 'cell')} not timed in the same rounds as the anchor, so nothing is concluded "
            "from them: run them in one sweep with sweep.interleave=true"
        )
    if compared and int(ran["n_replicates"].max()) < 2:
        texts.append(
            "Each cell ran in one process, so differences between processes do not show; measure.replicates=5 shows "
            "them"
        )
    return texts


def _of(n: int, total: int, one: str) -> str:
    """`3 of 8 comparisons are`, `all 8 comparisons are`."""
    which = f"{n:,} of {total:,} {one}s" if n < total else every(n, one, f"{one}s")
    return f"{which[:1].upper()}{which[1:]} {'is' if n == 1 else 'are'}"
