"""config/experiments.py: what the file of an experiment sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lab.config import experiments
from moe_lab.config.compose import composing, config_loader
from moe_lab.config.hydra_patches import register, register_plugins


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "x.yaml").write_text(
        "# @package _global_\ndefaults: [{override /router: hash}]\nbatch: 3\nworkload: {load: zipf, hot_experts: 2}\n"
        "sweep: {name: y}\nhydra: {sweeper: {params: {seq_len: '1,2'}}}\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        pytest.param([], [], id="no-experiment"),
        pytest.param(
            ["experiment=x"], ["batch=3", "workload.load=zipf", "workload.hot_experts=2"], id="without-its-sweep"
        ),
        pytest.param(["experiment=demo"], None, id="of-the-package"),
    ],
)
def test_what_its_file_sets(folder: Path, overrides: list[str], expected: list[str] | None) -> None:
    register()
    register_plugins()
    with composing(overrides, folder) as composed:
        found = experiments.set_by(config_loader(), composed.hydra)
    assert found == expected if expected is not None else found
