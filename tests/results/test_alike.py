"""results/alike.py: pairs by hand, and what is said of them."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest

from moe_lab.results.alike import sentences

Row = dict[str, Any]


def row(ids: str, gini: float, path: str = "a", seed: int = 0, **more: Any) -> Row:
    """A run of one text, or of random ids in its place."""
    found = {
        "status": "ok",
        "model": "m",
        "workload": "text",
        "batch": 4,
        "seq_len": 128,
        "seed": seed,
        "config.workload.ids": None if ids == "text" else ids,  # as a table has it
        "config.workload.path": path,
        "routing.worst.load_gini": gini,
        "routing.worst.load_max_over_mean": 10 * gini,
    }
    return {**found, **more}


def said(rows: list[Row]) -> list[str]:
    frame = pd.DataFrame(rows)
    return sentences(frame, frame)


def test_random_ids_by_hand() -> None:
    """Twice and 4.5 times as uneven: 3 times in the geometric mean; e^(12.706 * 0.405) of two texts has no end at 1."""
    (sentence,) = said([row("text", 0.1), row("uniform", 0.2), row("text", 0.1, "b"), row("uniform", 0.45, "b")])
    half = 12.706 * math.log(4.5 / 2) / 2
    ends = f"[{3 * math.exp(-half):.3g}, {3 * math.exp(half):.3g}]"
    assert sentence == (
        "In m random ids do not surely change the imbalance that text has, over 2 texts: the Gini coefficient of the "
        f"most uneven layer is 3x {ends} (0.33 for 0.10) at batch 4, seq_len 128 that of text; its fullest expert has "
        f"3x {ends} at batch 4, seq_len 128 the slots"
    )


@pytest.mark.parametrize(
    ("factor", "verb"), [pytest.param(2.0, "overstate", id="more"), pytest.param(0.5, "understate", id="less")]
)
def test_what_is_sure_is_said(factor: float, verb: str) -> None:
    """The seeds of a text are averaged first, so texts are the units."""
    rows = [
        row(ids, gini * (1 if ids == "text" else factor), path, seed)
        for ids in ("text", "uniform")
        for path, gini in (("a", 0.1), ("b", 0.2), ("c", 0.4))
        for seed in (0, 1)
    ]
    (sentence,) = said(rows)
    assert f"random ids {verb} the imbalance" in sentence and "over 3 texts" in sentence
    alone = [each for each in rows if each["config.workload.path"] == "a"]
    (sentence,) = said([{k: v for k, v in each.items() if k != "config.workload.path"} for each in alone])
    assert "over 2 seeds" in sentence
    (sentence,) = said([each for each in alone if each["seed"] == 0])
    assert f"{factor:g}x (" in sentence and "over 1 seed" in sentence  # no interval


def test_without_pairs_nothing_is_said() -> None:
    """Text alone, other batches, a cell that failed, no load at all."""
    assert said([row("text", 0.1)]) == []
    assert said([row("text", 0.1), row("uniform", 0.2, batch=8)]) == []
    assert said([row("text", 0.1), row("uniform", 0.2, status="failed")]) == []
    assert said([row("text", 0.0), row("uniform", 0.2)]) == said([row("text", 0.2), row("uniform", 0.0)]) == []
    assert said([{"status": "ok", "model": "m", "batch": 1}]) == []


def test_fitted_loads_by_hand() -> None:
    """Beside the replay of the same seed: 2 and 2, which is sure, and none where the anchor is another load."""
    common = {"status": "ok", "model": "m", "batch": 1, "seq_len": 64, "anchor": "replay"}
    rows = [
        {
            **common,
            "seed": seed,
            "variant": variant,
            "config.workload.load": load,
            "config.workload.fit": fit,
            "ratio_to_anchor.p50": ratio,
        }
        for seed in (0, 1)
        for load, variant, fit, ratio in (
            ("replay", "replay", None, None),
            ("fitted", "text(load=fitted)", None, 2.0),
            ("fitted", "text(load=fitted, fit=dirichlet)", "dirichlet", 1.0),
        )
    ]
    (sentence,) = said(rows)
    assert sentence == (
        "In m a load that is fitted to the trace takes, in units of the time of the trace's own steps, over 2 seeds: "
        "dirichlet 1x [1, 1] at batch 1, seq_len 64; power_law 2x [2, 2] at batch 1, seq_len 64"
    )
    assert said([{**each, "anchor": "text(load=fitted)"} for each in rows]) == []
