"""results/subject.py: what was compared, from the records of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_lab
from benchmarks import synthetic
from moe_lab.records.store import RESULT, ROUTING
from moe_lab.results.aggregate import aggregate
from moe_lab.results.load import Plan, read_plan
from moe_lab.results.subject import facts
from moe_lab.sweep.plan import plain
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
        "moe_layer (8 experts, top-2, width 32, expert width 24)"
    )
    assert found["Compared"] == (
        "sinkhorn/grouped, sinkhorn/loop, torch/grouped, torch/loop, each beside torch/grouped "
        "(by router, experts, execution)"
    )
    assert found["Sizes"] == "batch 1 to 16 (5 values); seq_len 8 to 128 (5 values)"
    assert found["Cells"] == "189 ok, 6 failed, 5 skipped"
    assert (found["dtype"], found["Device"], found["Execution"]) == ("fp32", "Synthetic CPU", "eager")
    assert found["Workload"] == "random, forward phase, native load"
    assert found["Run"] == "2026-01-01 00:00 to 00:03 UTC"
    assert found["Version"] == "moe-lab 0.1.0, git 000000000000"
    assert found["Command"].startswith("moe-lab -m router=torch,sinkhorn")


def test_what_varies_is_a_range_and_a_replay_names_its_trace(tmp_path: Path) -> None:
    """A kernel sweep with replayed load: decoding after several contexts, with two numbers of experts."""
    folders = synthetic.sweep(tmp_path, 8)
    for n, folder in enumerate(folders):
        decode = {"config__workload__phase": "decode", "config__workload__context_len": 128 * (1 + n % 2)}
        replay = {"config__workload__load": "replay", "config__workload__trace": "outputs/recorded"}
        edit(folder, **decode, **replay, config__workload__trace_layer=3 * (n % 2))
    for folder in folders[:2]:
        edit(folder, config__model__n_experts=16)
    found = of(tmp_path)
    assert found["Workload"].endswith("decode phase, context 128, 256, replay load of outputs/recorded (layer 0, 3)")
    assert "8, 16 experts" in found["Model"]
    assert not {"Router", "Experts"} & found.keys()


def test_the_option_that_all_have_is_named(tmp_path: Path) -> None:
    """The variants do not."""
    for folder in synthetic.sweep(tmp_path, 8):
        edit(folder, config__experts__name="grouped")
    found = of(tmp_path)
    assert found["Experts"] == "grouped" and "Router" not in found


def test_what_auto_chose_is_named(tmp_path: Path) -> None:
    """Each implementation that computed the experts of a cell."""
    for n, folder in enumerate(synthetic.sweep(tmp_path, 8)):
        edit(folder, config__experts__name="auto", implementation__experts=("fused", "grouped:few_tokens")[n % 2])
    assert of(tmp_path)["Experts"] == "auto (fused, grouped:few_tokens)"


def test_what_auto_chose_is_named_beside_others(tmp_path: Path) -> None:
    """The others are named among the variants."""
    for n, folder in enumerate(synthetic.sweep(tmp_path, 8)):
        edit(folder, config__experts__name=("auto", "loop")[n % 2], implementation__experts=("fused", "loop")[n % 2])
    assert of(tmp_path)["Experts"] == "auto is fused"


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


def test_the_experts_of_a_checkpoint_are_not_those_that_a_variant_left(tmp_path: Path) -> None:
    """`model.prune.experts=3` is a variant; its routing shows 5 of 8."""
    for folder, n in zip(synthetic.sweep(tmp_path, 4), [3, 3, 3, 0], strict=True):
        texts.add(folder)
        content = json.loads((folder / RESULT).read_text())
        content["config"]["model"] = {"name": "checkpoint", "path": "models/olmoe", "ignores": []}
        content["config"]["model"]["prune"] = {"experts": n, "by": "reap"}
        (folder / RESULT).write_text(json.dumps(content))
        with np.load(folder / ROUTING) as old:
            arrays = dict(old)
        arrays["counts_LE"] = arrays["counts_LE"][:, : 8 - n]
        np.savez(folder / ROUTING, **arrays)
    assert "8 experts" in of(tmp_path)["Model"]


@pytest.mark.parametrize(
    ("group", "top_k", "said"),
    [
        pytest.param("router", [None, 1, 1, None], ", top-2)", id="of_the_router_that_uses_its_own"),
        pytest.param("router", [1, 1, 1, 1], ", 8 experts)", id="not_known"),
        pytest.param("model", [[1, 1, 1, 1], None, [1, 1, 1, 1], None], ", top-2)", id="by_layer"),
        pytest.param("model", [[1, 1, 1, 1]] * 4, ", top-[1, 1, 1, 1])", id="all_by_layer"),
    ],
)
def test_the_top_k_of_a_checkpoint_is_not_that_of_a_variant(
    tmp_path: Path, group: str, top_k: list[int | list[int] | None], said: str
) -> None:
    """`router.top_k=1` is a variant, and so is a list; its routing shows one slot for a token."""
    for folder, k in zip(synthetic.sweep(tmp_path, 4), top_k, strict=True):
        texts.add(folder)
        content = json.loads((folder / RESULT).read_text())
        content["config"]["model"] = {"name": "checkpoint", "path": "models/olmoe", "ignores": []}
        content["config"][group] |= {"top_k": k}
        (folder / RESULT).write_text(json.dumps(content))
        if k:
            with np.load(folder / ROUTING) as old:
                arrays = dict(old)
            arrays["counts_LE"] = arrays["counts_LE"] * 0
            arrays["counts_LE"][:, 0] = content["config"]["batch"] * content["config"]["seq_len"]
            np.savez(folder / ROUTING, **arrays)
    assert of(tmp_path)["Model"].endswith(said)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        pytest.param({}, "shape demo, ", id="untouched"),
        pytest.param({"d_model": 96}, "(", id="a_size_beside_it"),
        pytest.param({"name": "mine"}, "shape mine, ", id="of_a_user"),
    ],
)
def test_a_shape_has_its_name_only_where_it_is_true(tmp_path: Path, sizes: dict[str, Any], said: str) -> None:
    """A size typed beside an option keeps its name in the configuration."""
    (folder,) = synthetic.sweep(tmp_path, 1)
    demo = plain(moe_lab.compose(["model=moe_layer"]))["model"]
    edit(folder, config__model={**demo, "shape": {**demo["shape"], **sizes}})
    model = of(tmp_path)["Model"]
    assert said in model and ("shape" in model) == ("shape" in said)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        pytest.param("2026-01-01T10:00:59+00:00", "2026-01-01 10:00 UTC", id="a_minute"),
        pytest.param("2026-01-01T11:05:00+00:00", "2026-01-01 10:00 to 11:05 UTC", id="a_day"),
        pytest.param("2026-01-02T10:00:00+00:00", "2026-01-01 10:00 to 2026-01-02 10:00 UTC", id="over_midnight"),
    ],
)
def test_the_time_names_a_day_once(tmp_path: Path, last: str, said: str) -> None:
    """A day later at the same minute is another time."""
    for folder, started in zip(synthetic.sweep(tmp_path, 2), ("2026-01-01T10:00:00+00:00", last), strict=True):
        edit(folder, started=started)
    assert of(tmp_path)["Run"] == said


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
