"""benchmarks/router_verdicts.py: what it says of the committed tables is what the pages say."""

from __future__ import annotations

import pandas as pd
import pytest

from benchmarks import router_verdicts as module
from tests import tiny

FOLDER = tiny.ROOT / "docs/results/h200"


@pytest.fixture(scope="module")
def found() -> pd.DataFrame:
    ran, peers = pd.read_csv(FOLDER / "routers.csv"), pd.read_csv(FOLDER / "peers.csv")
    return module.verdicts(ran, peers, module.witness(ran, peers))


def test_the_pages_say_what_their_tables_come_to(found: pd.DataFrame) -> None:
    """How many cells, by which of the two kinds of peers, and how many of the cold ones."""
    assert found.verdict.tolist() == pd.read_csv(FOLDER / "router_verdicts.csv").verdict.tolist()
    with_peer = found[found.verdict != "no peer"]
    assert set(with_peer.verdict) == {"ahead"}
    by_table = with_peer.over_table_high.fillna(0) > with_peer.over_beside_high.fillna(0)
    cold = with_peer.cold_over_beside.dropna()
    readme = " ".join((tiny.ROOT / "README.md").read_text().split())
    assert f"in all {len(with_peer)} cells with a peer: in {(~by_table).sum()} by the 95 % interval" in readme
    assert f"in {by_table.sum()} by a table of another day" in readme
    assert f"it is faster in {(cold < 1).sum()} of {len(cold)} cells" in readme
    page = (FOLDER / "routers.md").read_text()
    for name, table in (("route", "route"), ("route_and_sort", "route_and_sort"), ("gate and route", "gate")):
        of = with_peer.table == table
        assert f"| {name} | {of.sum()} | {of.sum()} | {by_table[of].sum()} |" in page


def test_a_slower_peer_does_not_make_a_cell_ahead(found: pd.DataFrame) -> None:
    """The worse of the two peers decides: with times of ours doubled most cells are not ahead."""
    ran, peers = pd.read_csv(FOLDER / "routers.csv"), pd.read_csv(FOLDER / "peers.csv")
    ours = ran.impl == "cuda_ext"
    ran.loc[ours, ["us", "us_low", "us_high", "us_cold"]] *= 2
    ran.loc[~ours, ["ratio", "ratio_low", "ratio_high"]] /= 2
    slower = module.verdicts(ran, peers, module.witness(ran, peers))
    assert (slower.verdict == "not ahead").sum() > len(found) / 2
    assert slower.over_beside.dropna().tolist() == pytest.approx((2 * found.over_beside.dropna()).tolist())
