"""api/routers.py: what there is to choose from."""

from __future__ import annotations

from pathlib import Path

import pytest

import moe_lab
from tests.tiny import ROOT


@pytest.mark.slow
def test_every_router_is_listed_with_what_it_declares(tmp_path: Path) -> None:
    """The package's, and one of a folder of one's own."""
    folder = tmp_path / "router"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "# My own: sinkhorn, but hotter.\ndefaults:\n  - sinkhorn\n  - _self_\nname: mine\n"
    )
    found = moe_lab.list_routers(config_dir=tmp_path).set_index("name")
    assert set(found.index) == {path.stem for path in (ROOT / "conf" / "router").glob("*.yaml")} | {"mine"}
    assert found.loc["mine", "about"] == "My own: sinkhorn, but hotter."
    assert "causal" not in found.loc["sinkhorn", "properties"] and "causal" in found.loc["torch", "properties"]
    assert "torch" in found.loc["olmoe", "implementations"]
