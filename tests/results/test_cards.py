"""results/cards.py: a card for each router, with what is known and nothing else."""

from __future__ import annotations

import pandas as pd
import pytest

from benchmarks import synthetic
from moe_lab.results.aggregate import aggregate
from moe_lab.results.cards import Card, cards


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Two routers, two models, two sizes of each."""
    directory = tmp_path_factory.mktemp("sweep")
    synthetic.sweep(directory, 32)
    return aggregate(directory).runs


def by_name(runs: pd.DataFrame) -> dict[str, Card]:
    """The cards by their routers."""
    return {card.name: card for card in cards(runs)}


def test_every_router_has_a_card_with_its_cells(runs: pd.DataFrame) -> None:
    """Those that are ok; the cell says size and model, and what else the variant is."""
    found = by_name(runs)
    assert list(found) == ["sinkhorn", "torch"]
    for name, card in found.items():
        assert len(card.rows) == ((runs["router"] == name) & (runs["status"] == "ok")).sum()
        assert all(len(row) == len(card.heads) for row in card.rows)
    assert any("loop" in row[0] for row in found["torch"].rows)


def test_a_row_has_the_numbers_of_its_cell(runs: pd.DataFrame) -> None:
    """All layers and the worst, and the floor beside what was compared."""
    row = runs[(runs["router"] == "sinkhorn") & (runs["status"] == "ok")].iloc[0]
    card = by_name(runs)["sinkhorn"]
    rows = [dict(zip(card.heads, fields, strict=True)) for fields in card.rows]
    median = f"{row['latency_ms.p50']:.3g}"
    of_cell = next(one for one in rows if one["median ms"] == median)
    pooled, worst = row["routing.pooled.load_max_over_mean"], row["routing.worst.load_max_over_mean"]
    assert of_cell["load max / mean"] == f"{pooled:.3g} · {worst:.3g}"
    assert of_cell["output error"] == f"{row['agreement.output_rel_error']:.3g} (3e-07)"
    assert of_cell["Jaccard"] == "0.7 · 0.63 (1)"
    assert of_cell["fewest experts"] == f"{row['routing.worst.unique_experts']:g} of 7.5"


def test_a_property_that_holds_is_told_from_one_that_does_not(runs: pd.DataFrame) -> None:
    """Of needs and wants only those that hold are named."""
    found = by_name(runs)
    assert dict(found["torch"].properties) == {
        "causal": True,
        "not batch_invariant": False,
        "static_k": True,
        "graph_safe": True,
    }
    assert dict(found["sinkhorn"].properties)["not causal"] is False


def test_only_what_was_declared_and_verified_holds(runs: pd.DataFrame) -> None:
    """In any cell of the router; what nobody declared is not known."""
    torch = runs[runs["router"] == "torch"].astype({"router.causal": object, "check.causal": object})
    torch[["router.causal", "check.causal"]] = None
    assert dict(by_name(torch)["torch"].properties)["causal: not known"] is False
    torch["router.causal"] = True
    torch["check.causal"] = "not verified: no sequence of two tokens"
    assert dict(by_name(torch)["torch"].properties)["causal: declared, not verified"] is False
    torch.iloc[-1, torch.columns.get_loc("check.causal")] = "verified"
    torch.iloc[-1, torch.columns.get_loc("status")] = "ok"
    assert dict(by_name(torch)["torch"].properties)["causal"] is True
    torch.iloc[0, torch.columns.get_loc("check.causal")] = "does not hold"
    torch.iloc[0, torch.columns.get_loc("status")] = "failed"
    assert dict(by_name(torch)["torch"].properties)["causal: declared, does not hold"] is False


def test_what_no_cell_has_is_no_column(runs: pd.DataFrame) -> None:
    """Without a reference router there is no agreement, and nothing stands in its place."""
    alone = by_name(runs[runs["router"] == "torch"])["torch"]
    assert "Jaccard" not in alone.heads and "output error" not in alone.heads
    assert "load max / mean" in alone.heads


def test_a_forced_load_is_no_work_of_the_router(runs: pd.DataFrame) -> None:
    """Its routes came from elsewhere."""
    forced = runs.assign(**{"implementation.router": "forced: zipf"})
    assert cards(forced) == []


def test_records_without_routing_have_no_card(runs: pd.DataFrame) -> None:
    """Nothing to show is no card, also in an empty table."""
    assert cards(runs.assign(**{"routing.pooled.load_max_over_mean": float("nan")})) == []
    assert cards(runs.iloc[:0]) == []
