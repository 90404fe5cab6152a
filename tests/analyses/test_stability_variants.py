"""analyses/stability_variants.py: shares, intervals and sentences by hand; a variant with a reason stays a row."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from moe_lab.analyses.findings import percent
from moe_lab.analyses.stability_variants import conclude
from moe_lab.records.trace import Layer
from moe_lab.runs.stability import Compared

LAYERS = [Layer(1, 8, 2), Layer(3, 8, 2)]


def compared(**changes: object) -> Compared:
    """Two windows of ten tokens: in layer 1 one token changes, in layer 3 this one and two others."""
    fields = {
        "same_LW": np.array([[20.0, 19.0], [18.0, 19.0]]),
        "used_LW": np.full((2, 2), 20.0),
        "changed_LW": np.array([[0.0, 1.0], [2.0, 1.0]]),
        "first_LW": np.array([[0.0, 1.0], [2.0, 0.0]]),
        "near_W": np.array([2.0, 0.0]),
        "argmax_W": np.array([1.0, 0.0]),
        "kl_W": np.array([0.3, 0.1]),
        "margins": np.array([5e-7, 0.05, 1.0], np.float32),
        "implementation": {"router": "torch", "experts": "loop"},
    }
    return Compared(**(fields | changes))  # type: ignore[arg-type]


NOTHING = {
    "same_LW": np.full((2, 2), 20.0),
    **dict.fromkeys(("changed_LW", "first_LW"), np.zeros((2, 2))),
    **dict.fromkeys(("near_W", "argmax_W", "kl_W"), np.zeros(2)),
    "margins": np.zeros(0, np.float32),
}


def test_shares_by_hand() -> None:
    """Over all tokens, and layer by layer."""
    findings = conclude({"batch=1": compared()}, LAYERS, 10)
    (row,) = findings.tables["stability"].to_dict("records")
    assert row["same"] == 76 / 80 and row["changed"] == 3 / 20 and row["changed_tokens"] == 3
    assert row["first_changed_layer"] == 3 and row["near_ties"] == 2 / 3 and row["argmax_changed"] == 1 / 20
    assert row["kl_nats"] == pytest.approx(0.4 / 20) and row["reason"] is None
    # Means of windows 0.03 and 0.01, a standard error of 0.01, and t = 12.706 for one degree of freedom.
    assert row["kl_nats_ci95_high"] == pytest.approx(0.02 + 12.7062 * 0.01, rel=1e-4) and row["kl_nats_ci95_low"] == 0
    assert row["implementation"] == "router: torch, experts: loop"
    first, second = findings.tables["stability_layers"].to_dict("records")
    assert (first["layer"], first["same"], first["changed"], first["first_change"]) == (1, 39 / 40, 1 / 20, 1 / 20)
    assert (second["layer"], second["same"], second["changed"], second["first_change"]) == (3, 37 / 40, 3 / 20, 2 / 20)
    margins = findings.tables["stability_margins"].set_index("margin_from")["first_changes"]
    assert margins.to_dict() == {0.0: 1, 1e-6: 0, 1e-5: 0, 1e-4: 0, 1e-3: 0, 1e-2: 1, 1e-1: 1}
    assert "most often first in layer 3 (67 % of the first changes are near-ties)" in findings.sentences[1]
    assert findings.sentences[1].startswith("batch=1: 15 % [0, 79]") and "KL 0.02 nats." in findings.sentences[1]
    assert findings.sentences[0] == "1 of 1 variants change routes or likeliest next tokens."


def test_no_change_is_said() -> None:
    """And a margin that is not known is in no class."""
    findings = conclude({"batch=16": compared(**NOTHING), "batch=8": compared(**NOTHING)}, LAYERS, 10)
    assert findings.sentences == [
        "0 of 2 variants change routes or likeliest next tokens.",
        "batch=16, batch=8: no token has other experts or another likeliest next token; KL at most 0 nats.",
    ]
    assert findings.tables["stability"]["near_ties"].isna().all()
    unknown = conclude({"x": compared(margins=np.full(3, np.nan, np.float32))}, LAYERS, 10)
    assert unknown.tables["stability_margins"]["first_changes"].sum() == 0


def test_the_largest_change_comes_first() -> None:
    """A prediction alone may change, too."""
    more, other = compared(first_LW=np.full((2, 2), 4.0)), compared(**NOTHING | {"argmax_W": np.array([1.0, 0.0])})
    sentences = conclude({"a": other, "b": compared(), "c": more}, LAYERS, 10).sentences
    assert sentences[0] == "3 of 3 variants change routes or likeliest next tokens; most with c."
    assert [sentence[:2] for sentence in sentences[1:]] == ["c:", "b:", "a:"]
    assert "a: no token uses other experts; 5.0 % [0.0, 68.5] of the tokens have another" in sentences[3]


def test_logits_that_are_not_finite_are_said() -> None:
    """They are not among what changes nothing."""
    sentences = conclude({"a": compared(**NOTHING | {"kl_W": np.array([0.0, np.nan])})}, LAYERS, 10).sentences
    assert sentences[0].startswith("1 of 1 variants change") and sentences[1].endswith("the KL is not finite.")


def test_a_variant_that_did_not_run_is_a_row() -> None:
    """Beside others or alone; then there is nothing to plot."""
    variants = {"dtype=fp16": "unavailable: no fp16", "batch=1": compared()}
    table = conclude(variants, LAYERS, 10).tables["stability"]
    assert table["variant"].tolist() == list(variants) and table["reason"][0] == "unavailable: no fp16"
    assert pd.isna(table["same"][0]) and pd.isna(table["reason"][1])
    alone = conclude({"dtype=fp16": "unavailable: no fp16"}, LAYERS, 10)
    assert alone.sentences == ["dtype=fp16: not compared (unavailable: no fp16)."]
    assert alone.tables["stability"].shape == (1, 2) and not alone.plots


def test_one_token_of_many_is_not_none() -> None:
    """A share that is nearly 0 or 1 has a digit more."""
    assert percent(13 / 32768, 0, 6e-4) == "0.04 % [0.00, 0.06]" and percent(0.0, 0.0, 0.0) == "0.0 % [0.0, 0.0]"
    assert percent(1 - 13 / 262144, 0.9999, 1) == "100.00 % [99.99, 100.00]" and percent(1.0) == "100.0 %"
