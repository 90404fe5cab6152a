"""results/subject.py: what was compared, from the records of a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import synthetic
from moe_lab.records.store import RESULT
from moe_lab.results.aggregate import aggregate
from moe_lab.results.load import Plan, read_plan
from moe_lab.results.subject import facts
from tests.results import texts


def of(directory: Path, plan: Plan | None = None) -> dict[str, str]:
    """The facts by what they are about."""
    runs, summary, _ = aggregate(directory)
    return dict(facts(directory, runs, plan or read_plan(directory), sorted(summary["anchor"].dropna().unique())))


def edit(folder: Path, **changes: object) -> None:
    """Set keys of the configuration in a record, by dotted names with __ for the dots."""
    content = json.loads((folder / RESULT).read_text())
    for name, value in changes.items():
        node, *path = content, *name.split("__")
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
    (folder / RESULT).write_text(json.dumps(content))


def test_the_facts_of_a_sweep(tmp_path: Path) -> None:
    """Each from the records or the plan."""
    synthetic.sweep(tmp_path, 200)
    found = of(tmp_path)
    assert found["Model"] == (
        "decoder_moe (2 layers, 8 experts, top-2, width 32, expert width 24); "
        "moe_layer (shape demo, 8 experts, top-2, width 32, expert width 24)"
    )
    assert found["Compared"] == (
        "sinkhorn/grouped, sinkhorn/loop, torch/grouped, torch/loop, each beside torch/grouped "
        "(by router, experts, execution)"
    )
    assert found["Sizes"] == "batch 1 to 16 (5 values), seq_len 8 to 128 (5 values)"
    assert found["Cells"] == "189 ok, 6 failed, 5 skipped"
    assert (found["dtype"], found["Device"], found["Execution"]) == ("fp32", "Synthetic CPU", "eager")
    assert found["Workload"] == "random, forward phase, native load"
    assert found["Run"] == "2026-01-01 00:00 UTC to 2026-01-01 00:03 UTC"
    assert found["Version"] == "moe-lab 0.1.0, git 000000000000"
    assert found["Command"].startswith("moe-lab -m router=torch,sinkhorn")


def test_what_varies_is_a_range_and_a_replay_names_its_trace(tmp_path: Path) -> None:
    """A kernel sweep with replayed load: decoding after several contexts, with two numbers of experts."""
    folders = synthetic.sweep(tmp_path, 8)
    for n, folder in enumerate(folders):
        decode = {"config__workload__phase": "decode", "config__workload__context_len": 128 * (1 + n % 2)}
        edit(folder, **decode, config__workload__load="replay", config__workload__trace="outputs/recorded")
    for folder in folders[:2]:
        edit(folder, config__model__n_experts=16)
    found = of(tmp_path)
    assert found["Workload"].endswith("decode phase, context 128, 256, replay load of outputs/recorded")
    assert "8, 16 experts" in found["Model"]


def test_a_checkpoint_shows_its_shape_by_its_routing(tmp_path: Path) -> None:
    """Its configuration does not tell; of a texts' workload the path is named."""
    for folder in synthetic.sweep(tmp_path, 4):
        texts.add(folder)
        content = json.loads((folder / RESULT).read_text())
        content["config"]["model"] = {"name": "checkpoint", "path": "models/olmoe", "ignores": []}
        content["config"]["workload"] |= {"name": "text", "path": ["a.txt", "b.txt"]}
        (folder / RESULT).write_text(json.dumps(content))
    found = of(tmp_path)
    assert found["Model"] == "olmoe (checkpoint models/olmoe, 4 MoE layers, 8 experts, top-2)"
    assert found["Workload"].startswith("text (a.txt, b.txt)")


@pytest.mark.parametrize("n", [pytest.param(0, id="nothing"), pytest.param(1, id="one_cell")])
def test_what_is_not_known_is_left_out(tmp_path: Path, n: int) -> None:
    """No plan, no record, no environment."""
    for folder in synthetic.sweep(tmp_path, n):
        edit(folder, environment={}, started=None)
    (tmp_path / "plan.json").unlink()
    found = of(tmp_path, Plan())
    assert (
        not found
        if n == 0
        else {"Model", "dtype", "Cells"} <= found.keys() and not {"Command", "Version", "Run"} & found.keys()
    )
