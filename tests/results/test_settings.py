"""results/settings.py: settings are named by what differs between them."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from moe_lab.results.load import load
from moe_lab.results.settings import describe, sizes
from tests.results.compared import record, tiny_config, write


@pytest.fixture
def runs(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """One layer at two batch sizes, by two routers."""
    routers = [{"router": {**tiny_config()["router"], "name": name}} for name in ("torch", "sinkhorn")]
    cells: list[dict[str, Any]] = [{**router, "batch": batch} for batch in (1, 2) for router in routers]
    return load(write(tmp_path_factory.mktemp("runs"), *(record(1.0, config=cell) for cell in cells)))


def test_only_what_differs_between_settings_is_said(runs: pd.DataFrame) -> None:
    """And the model; routers are compared within a setting, so they are not part of its name."""
    assert sorted(set(describe(runs))) == ["moe_layer, batch=1", "moe_layer, batch=2"]
    assert describe(runs[runs["batch"] == 1]).tolist() == ["moe_layer"] * 2


def test_what_an_axis_shows_is_left_out(runs: pd.DataFrame) -> None:
    """By name."""
    assert set(describe(runs, without=("batch",))) == {"moe_layer"}


def test_machines_are_told_apart_where_there_are_several(runs: pd.DataFrame) -> None:
    """By their device, and by env_id where that is the same."""
    runs = runs.assign(env_id=["aaaaaaaa", "bbbbbbbb"] * 2, batch=1)
    runs["environment.device_name"] = ["A100", "H100"] * 2
    assert describe(runs).tolist() == ["moe_layer, A100", "moe_layer, H100"] * 2
    runs["environment.device_name"] = "H100"
    assert describe(runs).tolist() == ["moe_layer, H100 aaaaaa", "moe_layer, H100 bbbbbb"] * 2


def test_sizes_are_those_that_the_model_reads(runs: pd.DataFrame) -> None:
    """A missing one is not named."""
    assert sorted(set(sizes(runs))) == ["batch 1 x seq_len 14", "batch 2 x seq_len 14"]
    assert set(sizes(runs.assign(seq_len=None))) == {"batch 1", "batch 2"}
