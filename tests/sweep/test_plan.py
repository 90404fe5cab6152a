"""Plans: which cells there are, what is done about each, and in which groups."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import moe_lab
from moe_lab.config.compose import composing_multirun
from moe_lab.config.unread import key_of
from moe_lab.records import identity, variants
from moe_lab.records.observations import ASKED
from moe_lab.records.schema import Record
from moe_lab.records.store import write_record
from moe_lab.sweep import multirun, plan
from moe_lab.sweep.expected import expected_seconds
from moe_lab.sweep.in_process import InProcess
from moe_lab.sweep.plan import Cell, Plan
from tests import quick


def make(directory: Path, *more: str, model: str = "moe_layer", engine: Any = None) -> Plan:
    """The plan of a multirun of `model` into `directory`."""
    overrides = [*quick.overrides(model, *more), f"hydra.sweep.dir={directory}"]
    with composing_multirun(overrides, None) as (loader, config):
        jobs = multirun.JobComposer(loader, config).jobs(multirun.expand(loader, config))
        typed = {key_of(override) for override in overrides}
        return plan.make(jobs, directory, engine or InProcess(), ["moe-lab", "-m", *overrides], typed)


def leave(cell: Cell, **fields: Any) -> None:
    """A record of the cell in its folder, with other fields where given."""
    cell.directory.mkdir(parents=True, exist_ok=True)
    known = {"cell_id": cell.cell_id, "code_id": cell.code_id, "env_id": cell.env_id, "config": cell.config}
    write_record(cell.directory, Record(**{"status": "ok", **known, **fields}))


def test_the_cells_are_those_of_hydras_sweeper(tmp_path: Path) -> None:
    """Every combination in its order, with the cell_id and the folder that a single run would have."""
    made = make(tmp_path / "s", "router=torch,sinkhorn", "batch=1,2")
    combinations = [("torch", 1), ("torch", 2), ("sinkhorn", 1), ("sinkhorn", 2)]
    assert [(c.content["router"]["name"], c.content["batch"]) for c in made.cells] == combinations
    for cell, (router, batch) in zip(made.cells, combinations, strict=True):
        cfg = quick.compose("moe_layer", f"router={router}", f"batch={batch}")
        assert cell.cell_id == identity.cell_id(cfg)
        assert cell.directory == tmp_path / "s" / f"{identity.slug(cfg)}-{cell.cell_id}"
        assert cell.config["overrides"][-2:] == [f"router={router}", f"batch={batch}"]
    assert [cell.variant for cell in made.cells] == ["torch", "torch", "sinkhorn", "sinkhorn"]
    assert not (tmp_path / "s").exists()


def test_an_experiment_is_a_sweep_whose_axes_the_command_line_overrides(tmp_path: Path) -> None:
    """experiment=router_comparison, and the same with other routers."""
    with composing_multirun(["experiment=router_comparison"], None) as (loader, config):
        assert len(multirun.expand(loader, config)) == 8
    overrides = ["experiment=router_comparison", "router=sinkhorn", "batch=7"]
    with composing_multirun(overrides, None) as (loader, config):
        jobs = multirun.expand(loader, config)
    assert {override for job in jobs for override in job if override.startswith(("router", "batch"))} == {
        "router=sinkhorn",
        "batch=7",
    }
    assert len(jobs) == 2


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        pytest.param(["batch=range(1,1000000000000)"], "999,999,999,999 cells", id="range"),
        pytest.param(["batch=range(10,1,-2)", "sweep.max_cells=4"], "5 cells (5 of batch)", id="range_down"),
        pytest.param(["model.norm_eps=range(0.5,2.1,0.5)", "sweep.max_cells=3"], "4 cells", id="range_of_floats"),
        pytest.param(["router=glob(*)", "sweep.max_cells=5"], " of router)", id="glob"),
        pytest.param(
            ["batch=1,2,3", "seq_len=4,5", "sweep.max_cells=5"],
            "these are 6 cells (3 of batch * 2 of seq_len); shorten an axis or set sweep.max_cells=6.",
            id="choices",
        ),
        pytest.param(["experiment=router_comparison", "sweep.max_cells=7"], "8 cells", id="experiment"),
    ],
)
def test_a_sweep_of_too_many_cells_is_refused_before_composing(axes: list[str], message: str) -> None:
    """By the multirun and by `plan`; without the limit the same axes are so many jobs."""
    axes = [*axes, "device=cpu"]
    with composing_multirun(["model=transformer_decoder", *axes], None) as (loader, config):
        for act in (multirun.require_cells, multirun.expand):
            with pytest.raises(ValueError, match=r"sweep\.max_cells=\d+: ") as refused:
                act(loader, config)
            assert message in str(refused.value) and "\n" not in str(refused.value)
        n_cells = int(str(refused.value).rpartition("=")[2].removesuffix("."))
        if n_cells < 1000:
            config.sweep.max_cells = n_cells
            assert len(multirun.expand(loader, config)) == n_cells


@pytest.mark.parametrize("axis", ["batch=interval(1,10)", "batch=range(1,10,0)"])
def test_an_axis_that_hydra_refuses_is_told_with_its_key(axis: str) -> None:
    """Hydra's words name none."""
    told = pytest.raises(ValueError, match=rf"{re.escape(axis)}: .*write batch=A,B")
    with composing_multirun(["model=minimal", axis], None) as (loader, config), told:
        multirun.require_cells(loader, config)


def test_cells_too_large_for_the_memory_are_rows(tmp_path: Path) -> None:
    """They are skipped without being built, the others are to do; what has run once is not refused."""
    sizes = ("model=decoder_moe", "model.d_model=4096", "batch=1,2000000", "model.n_layers=1,10000", "seq_len=8,9")
    cells = make(tmp_path, *sizes, model="decoder_moe").cells
    for cell in cells:
        is_small = cell.content["batch"] == 1 and cell.content["model"]["n_layers"] == 1
        assert (cell.status == "to do") == is_small, cell.reason
        assert is_small or (cell.reason or "").startswith("unavailable: memory: needs at least ")
    large = next(cell for cell in cells if cell.content["batch"] > 1 and cell.content["model"]["n_layers"] == 1)
    leave(large, env_id=cells[0].env_id)
    again = {cell.cell_id: cell for cell in make(tmp_path, *sizes, model="decoder_moe").cells}
    assert again[large.cell_id].status == "done"


def test_cells_that_the_model_makes_equal_are_one(tmp_path: Path) -> None:
    """minimal reads neither router nor seq_len; every job still finds its cell."""
    made = make(tmp_path, "router=torch,sinkhorn", "seq_len=1,2", "batch=1,2", model="minimal")
    assert len(made.cells) == 2
    assert made.n_equal == 6
    assert len(made.jobs) == 8
    assert set(made.jobs) == {cell.cell_id for cell in made.cells}


@pytest.mark.parametrize(
    ("axes", "n_cells", "n_equal"),
    [
        pytest.param(["model.timed=layer,experts", "workload.load=zipf"], 1, 1, id="no router runs"),
        pytest.param(
            ["model.timed=layer,experts", "workload.load=native,zipf"],
            3,
            1,
            id="one of both runs",
            marks=pytest.mark.slow,
        ),
        pytest.param(["workload.load=balanced,zipf", "workload.zipf_exponent=1,2"], 3, 1, id="not zipf"),
        pytest.param(
            ["workload.load=native,hot", "workload.hot_share=0.3,0.5"], 3, 1, id="not hot", marks=pytest.mark.slow
        ),
        pytest.param(["router=torch,switch", "model.shape.top_k=1,2"], 4, 0, id="a variant of both settings"),
        pytest.param(
            ["router=capacity", "router.policy=weight,dropless", "router.factor=1,2"],
            3,
            1,
            id="dropless",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_cells_that_differ_in_what_they_do_not_read_are_one(
    tmp_path: Path, axes: list[str], n_cells: int, n_equal: int
) -> None:
    """The first of them stays, with the cell_id that it has alone; every job still finds its cell."""
    made = make(tmp_path, *axes)
    assert (len(made.cells), made.n_equal) == (n_cells, n_equal)
    assert len(made.jobs) == n_cells + n_equal
    assert set(made.jobs) == {cell.cell_id for cell in made.cells}
    assert all(cell.cell_id == identity.cell_id(cell.config) for cell in made.cells)


@pytest.mark.usefixtures("no_compiler")
def test_what_cannot_be_is_skipped_with_its_reason(tmp_path: Path) -> None:
    """top_k > n_experts, a router that is not there, an exclusion; the rest is to do."""
    exclude = "sweep.exclude=[{router: sinkhorn, model: {shape: {top_k: 2}}}]"
    made = make(tmp_path, "router=torch,sinkhorn,cuda_ext", "model.shape.top_k=2,9", exclude)
    statuses = {(c.variant, c.content["model"]["shape"]["top_k"]): (c.status, c.reason) for c in made.cells}
    assert statuses[("torch", 2)] == ("to do", None)
    assert statuses[("sinkhorn", 2)] == ("excluded", "excluded")
    assert statuses[("cuda_ext", 2)][0] == "skipped"
    assert str(statuses[("cuda_ext", 2)][1]).startswith("unavailable: router=cuda_ext")
    for router in ("torch", "sinkhorn", "cuda_ext"):
        assert statuses[(router, 9)][0] == "skipped"
        assert str(statuses[(router, 9)][1]).startswith("impossible: model.shape.top_k=9")


def test_a_mistake_in_every_cell_is_a_mistake(tmp_path: Path) -> None:
    """Not a table of skips."""
    with pytest.raises(ValueError, match=r"model\.shape\.top_k=9"):
        make(tmp_path, "router=torch,sinkhorn", "model.shape.top_k=9")


def test_a_mistake_that_only_building_finds_in_every_cell_is_one_too(tmp_path: Path) -> None:
    """A folder without a checkpoint; what is excluded does not count, and a cell that is possible makes it a gap."""
    paths = f"model.path={tmp_path}/nowhere,{quick.TINY_OLMOE}"
    exclude = f"sweep.exclude=[{{model: {{path: {identity.content(quick.compose('checkpoint'))['model']['path']}}}}}]"
    with pytest.raises(ValueError, match=rf"^model\.path={tmp_path}/nowhere: .* cannot be read"):
        make(tmp_path, f"model.path={tmp_path}/nowhere", "router=native,torch", model="checkpoint")
    with pytest.raises(ValueError, match="nowhere"):
        make(tmp_path, paths, exclude, model="checkpoint")
    made = make(tmp_path, paths, model="checkpoint")
    assert [cell.status for cell in made.cells] == ["skipped", "to do"]
    assert str(made.cells[0].reason).startswith(f"impossible: model.path={tmp_path}/nowhere")


@pytest.mark.slow
def test_other_texts_are_other_cells_and_the_same_ones_again_are_done(tmp_path: Path) -> None:
    """What was measured on a text stays, and is found when the text is what it was."""
    texts = tmp_path / "texts"
    texts.mkdir()

    def made(text: str) -> list[str]:
        (texts / "a.txt").write_text(text)
        plan = make(tmp_path / "s", f"workload.path={texts}", "router=native,torch", model="checkpoint")
        return [cell.status for cell in plan.cells]

    (texts / "a.txt").write_text("one " * 99)
    for cell in make(tmp_path / "s", f"workload.path={texts}", "router=native,torch", model="checkpoint").cells:
        leave(cell)
    assert made("one " * 99) == ["done", "done"]
    assert made("two " * 99) == ["to do", "to do"]
    assert made("one " * 99 + "!") == ["to do", "to do"]
    assert made("one " * 99) == ["done", "done"]


def test_a_context_makes_cells_in_decode_alone(tmp_path: Path) -> None:
    """Two phases and two contexts are three cells."""
    made = make(tmp_path, "workload.phase=prefill,decode", "workload.context_len=3,5", model="decoder_moe")
    assert (len(made.cells), made.n_equal) == (3, 1)
    assert len({cell.setting_id for cell in made.cells}) == 3


def test_a_label_cannot_be_overridden_in_a_sweep_either(tmp_path: Path) -> None:
    """router.name says what an option is."""
    with pytest.raises(ValueError, match=r"router\.name"):
        make(tmp_path, "router.name=mine,yours")


@pytest.mark.parametrize(
    ("fields", "more", "expected"),
    [
        pytest.param({}, [], "done", id="ok"),
        pytest.param({"code_id": "f" * 12}, [], "stale", id="code"),
        pytest.param({"env_id": "f" * 12}, [], "stale", id="machine"),
        pytest.param({"cell_id": "f" * 12}, [], "stale", id="configuration"),
        pytest.param({"code_id": "f" * 12}, ["sweep.stale=keep"], "done", id="keep"),
        pytest.param({"status": "failed", "reason": "out_of_memory"}, [], "done", id="failed"),
        pytest.param(
            {"status": "failed", "reason": "crash: SIGSEGV", "env_id": None},
            [],
            "done",
            id="no-machine",
            marks=pytest.mark.slow,
        ),
        pytest.param({"status": "failed", "reason": "out_of_memory"}, ["sweep.retry_failed=true"], "to do", id="retry"),
        *(
            pytest.param({"status": "failed", "reason": "crash: SIGSEGV", key: "f" * 12}, more, expected, id=case)
            for key, more, expected, case in (
                ("code_id", [], "stale", "failed-by-other-code"),
                ("env_id", [], "stale", "failed-on-another-machine"),
                ("cell_id", [], "stale", "failed-of-another-configuration"),
                ("code_id", ["sweep.retry_failed=true"], "stale", "failed-by-other-code-retry"),
                ("code_id", ["sweep.stale=keep"], "done", "failed-by-other-code-keep"),
                ("code_id", ["sweep.stale=keep", "sweep.retry_failed=true"], "to do", "failed-kept-retry"),
            )
        ),
        pytest.param({"status": "failed", "reason": "interrupted"}, [], "to do", id="interrupted"),
        pytest.param(
            {"status": "failed", "reason": "interrupted", "code_id": "f" * 12},
            [],
            "to do",
            id="interrupted-other-code",
            marks=pytest.mark.slow,
        ),
        pytest.param({"status": "skipped", "reason": "unavailable: x"}, [], "to do", id="now-available"),
    ],
)
def test_what_lies_in_the_folder_decides(
    fields: dict[str, Any], more: list[str], expected: str, tmp_path: Path
) -> None:
    """A record counts when configuration, code and machine are the same."""
    (cell,) = make(tmp_path).cells
    leave(cell, **fields)
    (judged,) = make(tmp_path, *more).cells
    assert judged.status == expected
    assert judged.is_ok == (expected == "done" and fields.get("status", "ok") == "ok")


def test_refusing_stale_results_names_them(tmp_path: Path) -> None:
    """sweep.stale=refuse is a mistake of one line that says what to do."""
    (cell,) = make(tmp_path).cells
    leave(cell, code_id="f" * 12)
    with pytest.raises(ValueError, match=r"1 of 1 results .* different code.*sweep\.stale=rerun"):
        make(tmp_path, "sweep.stale=refuse")


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, id=key, marks=[pytest.mark.slow] if key not in ("energy", "reference_router") else [])
        for key in ASKED
    ],
)
def test_a_finished_cell_that_lacks_what_is_now_asked_for_is_to_do(key: str, tmp_path: Path) -> None:
    """The configuration that is timed is the same; what is asked of it now is not in its record."""
    without, asked = ("null", "torch") if key == "reference_router" else ("false", "true")
    off = [f"measure.{key}={without}"] if without == "false" else []
    (cell,) = make(tmp_path, *off).cells
    leave(cell)
    assert make(tmp_path, *off).to_run() == []
    (again,) = make(tmp_path, f"measure.{key}={asked}").cells
    assert (again.cell_id, again.status) == (cell.cell_id, "stale")
    assert again.reason == f"measured without this measure.{key}"
    assert make(tmp_path, f"measure.{key}={asked}", "sweep.stale=keep").to_run() == []
    leave(again)
    assert make(tmp_path, f"measure.{key}={asked}").to_run() == []
    assert make(tmp_path, *off).to_run() == []  # more than asked is no less


@pytest.mark.parametrize(
    "values",
    [
        pytest.param("measure.reference_router=torch,sinkhorn", id="reference_router"),
        pytest.param("measure.energy=true,false", id="energy"),
    ],
)
def test_a_sweep_measures_a_cell_once(values: str, tmp_path: Path) -> None:
    """Two values would be one cell, of which one is dropped."""
    key = values.split("=")[0]
    with pytest.raises(ValueError, match=rf"{key}: a sweep measures each cell once.*sweep\.name"):
        make(tmp_path, "router=torch", values)


def test_an_unreadable_record_is_to_do(tmp_path: Path) -> None:
    """It is set aside when the cell runs."""
    (cell,) = make(tmp_path).cells
    cell.directory.mkdir(parents=True)
    (cell.directory / "result.json").write_text("{")
    (judged,) = make(tmp_path).cells
    assert (judged.status, judged.reason) == ("to do", "the record cannot be read")


def test_groups_are_what_differs_only_under_compare_and_equal_models_follow_each_other(tmp_path: Path) -> None:
    """router x batch x n_experts: a group for each batch and model, models not mixed."""
    made = make(tmp_path, "batch=1,2", "model.shape.n_experts=5,7", "router=torch,sinkhorn")
    groups = plan.groups(made)
    assert [len(group) for group in groups] == [2, 2, 2, 2]
    assert [group[0].content["model"]["shape"]["n_experts"] for group in groups] == [5, 5, 7, 7]
    for group in groups:
        assert len({cell.setting_id for cell in group}) == 1
        assert [cell.variant for cell in group] == ["torch", "sinkhorn"]
    alone = plan.groups(make(tmp_path, "batch=1,2", "router=torch,sinkhorn", "sweep.interleave=false"))
    assert [len(group) for group in alone] == [1, 1, 1, 1]
    by_batch = plan.groups(make(tmp_path, "batch=1,2", "router=torch,sinkhorn", "sweep.compare=[experts]"))
    assert [len(group) for group in by_batch] == [1, 1, 1, 1]


def test_an_anchor_that_is_in_no_cell_is_refused(tmp_path: Path) -> None:
    """Nothing would be compared with it. One that is left out here or there is still the anchor elsewhere."""
    with pytest.raises(ValueError, match=r"^sweep\.anchor=.*hash.*: no cell of the sweep is like this"):
        make(tmp_path, "router=torch,sinkhorn", "sweep.anchor={router: hash}")
    anchored = make(
        tmp_path,
        "router=torch,sinkhorn",
        "batch=1,2",
        "sweep.anchor={router: torch}",
        "sweep.exclude=[{router: torch, batch: 1}]",
    )
    assert [cell.status for cell in anchored.cells].count("excluded") == 1
    with pytest.raises(ValueError, match=r"^sweep\.anchor=.*torch.*: no cell of the sweep is like this"):
        make(tmp_path, "router=torch,sinkhorn", "sweep.anchor={router: torch}", "sweep.exclude=[{router: torch}]")


def test_what_an_experiment_sets_is_said_where_it_has_no_effect(tmp_path: Path) -> None:
    """Who types another axis did not ask for it, so it is not refused."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "x.yaml").write_text(
        "# @package _global_\nsweep: {anchor: {router: hash}}\nworkload: {context_len: 64, load: native}\n"
        "hydra: {sweeper: {params: {workload.zipf_exponent: '1.5'}}}\n"
    )
    overrides = [
        "experiment=x",
        *quick.overrides("moe_layer", "router=torch,sinkhorn"),
        f"hydra.sweep.dir={tmp_path}/s",
    ]
    with composing_multirun(overrides, tmp_path / "mine") as (loader, config):
        composer = multirun.JobComposer(loader, config)
        jobs = composer.jobs(multirun.expand(loader, config))
        made = plan.make(jobs, tmp_path / "s", InProcess(), ["moe-lab"], composer.typed, composer.of_experiment)
    keys = ["workload.context_len", "workload.zipf_exponent", "sweep.anchor"]
    assert [line.split("=")[0] for line in made.without_effect] == keys
    assert [cell.status for cell in made.cells] == ["to do", "to do"]


def test_a_folder_may_be_named_by_the_jobs_number(tmp_path: Path) -> None:
    """Hydra's own default."""
    made = make(tmp_path, "batch=1,2", "hydra.sweep.subdir=${hydra.job.num}")
    assert [cell.directory.name for cell in made.cells] == ["0", "1"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        pytest.param("sweep.fail_fast=true", "has no effect with another launcher", id="fail-fast"),
        pytest.param("sweep.interleave=true", "has no effect with another launcher", id="interleave"),
        pytest.param("sweep.worker=false", "has no effect with another launcher", id="worker"),
        pytest.param("hydra.launcher.n_jobs=2", "cells that run at once", id="n_jobs"),
        pytest.param("sweep.interleave=false", None, id="as-it-is"),
    ],
)
def test_another_launcher_refuses_what_it_does_not_do(override: str, said: str | None, tmp_path: Path) -> None:
    """When the plan is made, not when the first job runs."""
    more = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "batch=1,2", override)
    if said is None:
        assert len(make(tmp_path, *more).cells) == 2
    else:
        with pytest.raises(ValueError, match=said):
            make(tmp_path, *more)


def test_an_exclusion_of_no_cell_is_said(tmp_path: Path) -> None:
    """It may be meant for a larger sweep, so it is not refused."""
    made = make(tmp_path, "router=torch,sinkhorn", "sweep.exclude=[{router: hash}, {router: torch}]")
    assert made.without_effect == ['sweep.exclude={"router": "hash"}: no cell of the sweep is like this.']
    assert [cell.status for cell in made.cells].count("excluded") == 1


@pytest.mark.parametrize(
    ("partial", "why"),
    [
        pytest.param(
            "{router.tempratur: 1}",
            "router.tempratur that changes its result (nearest: router.temperature)",
            id="dotted",
        ),
        pytest.param(
            "{router: {tempratur: 1}}", "router.tempratur that changes its result (nearest: router.temp", id="nested"
        ),
        pytest.param(
            "{router: torch, model/shape.d_modl: 3}",
            "model.shape.d_modl that changes its result (nearest: model.shape.d_model)",
            id="deep",
        ),
        pytest.param(
            "{router.zzzz: 1}", "router.zzzz that changes its result (router: gate_bias, impl, ", id="none-near"
        ),
        pytest.param(
            "{router.name.x: 1}", "router.name.x that changes its result", id="below-a-value", marks=pytest.mark.slow
        ),
        pytest.param(
            "{measure.max_time_s: 1}",
            "measure.max_time_s that changes its result (measure: cache)",
            id="how-long",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_key_that_no_cell_has_is_named(tmp_path: Path, partial: str, why: str) -> None:
    """Of `exclude` in a line; of an `anchor` that was typed it is a mistake."""
    (line,) = make(tmp_path, "router=torch,sinkhorn", f"sweep.exclude=[{partial}]").without_effect
    assert f"no cell of the sweep has a key {why}" in line
    with pytest.raises(ValueError, match=r"^sweep\.anchor=.*; name one, or set sweep\.anchor=null") as raised:
        make(tmp_path, "router=torch,sinkhorn", f"sweep.anchor={partial}")
    assert f"no cell of the sweep has a key {why}" in str(raised.value)


def test_a_key_that_came_later_is_excluded_by_its_default(tmp_path: Path) -> None:
    """Which the cell_id of such a cell does not hold."""
    made = make(tmp_path, "model.timed=layer,experts", "sweep.exclude=[{model.timed: layer}]")
    assert [cell.status for cell in made.cells] == ["excluded", "to do"]


def test_a_key_without_effect_in_any_cell_is_refused_and_in_some_is_not(tmp_path: Path) -> None:
    """Another cell may use it."""
    with pytest.raises(
        ValueError, match=r"^workload\.zipf_exponent=2: has no effect; only used with workload\.load=zipf"
    ):
        make(tmp_path, "workload.load=native,balanced", "workload.zipf_exponent=2")
    assert len(make(tmp_path, "workload.load=native,zipf", "workload.zipf_exponent=2").cells) == 2


@pytest.mark.usefixtures("no_compiler")
def test_the_anchor_is_the_first_variant_or_the_one_described(tmp_path: Path) -> None:
    """A skipped one is none; neither is one that is done and failed."""
    made = make(tmp_path, "router=cuda_ext,torch,sinkhorn")
    (setting,) = {cell.setting_id for cell in made.cells}
    assert made.anchor_of(setting) is made.cells[1]
    described = make(tmp_path, "router=torch,sinkhorn", "sweep.anchor={router: sinkhorn}")
    assert described.anchor_of(setting) is described.cells[1]
    leave(made.cells[1], status="failed", reason="out_of_memory")
    again = make(tmp_path, "router=torch,sinkhorn")
    assert again.anchor_of(setting) is again.cells[1]


@pytest.mark.usefixtures("no_compiler")
def test_plan_json_states_every_cell(tmp_path: Path) -> None:
    """Before anything runs; the statuses can be read back."""
    made = make(tmp_path, "router=torch,cuda_ext", "batch=1,2")
    made.write()
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["commands"][0][:2] == ["moe-lab", "-m"]
    assert [cell["status"] for cell in content["cells"]] == ["to do", "to do", "skipped", "skipped"]
    assert plan.read_statuses(tmp_path) == {cell.cell_id: cell.status for cell in made.cells}
    assert plan.read_statuses(tmp_path / "nowhere") == {}


def test_the_expected_time_is_that_of_earlier_records(tmp_path: Path) -> None:
    """Without any it is the bound of `measure`, and said to be."""
    made = make(tmp_path, "batch=1,2")
    seconds, is_known = expected_seconds(made)
    assert not is_known
    assert seconds == pytest.approx(2 * 0.02)
    leave(made.cells[0], elapsed_s=7.0)
    assert expected_seconds(make(tmp_path, "batch=1,2")) == (7.0, True)
    assert expected_seconds(make(tmp_path, "batch=1,2", "measure.replicates=3"))[0] == 21.0  # each as long again


def test_a_failed_cell_tells_nothing_of_the_time(tmp_path: Path) -> None:
    """It may have failed at once; then the bound of `measure` stands."""
    made = make(tmp_path, "batch=1,2", "measure.max_time_s=5", "measure.warmup_s=1")
    leave(made.cells[0], status="failed", reason="out_of_memory", elapsed_s=0.1)
    again = make(tmp_path, "batch=1,2", "measure.max_time_s=5", "measure.warmup_s=1")
    assert len(again.to_run()) == 1 and expected_seconds(again) == (6.0, False)


class Asked:
    """An engine whose cells cannot run here if they are eager, and which would build the extension for all."""

    def __init__(self, skips: Sequence[str]):
        self.skips = skips

    def call(self, step: str, configs: list[dict[str, Any]], **_: Any) -> list[Any]:
        """What `Bench.look` says, and that there is the memory."""
        if step == "refusals":
            return [None] * len(configs)
        assert step == "look"
        unknown = dict.fromkeys(("env_id", "device_id", "available_bytes"))
        return [
            {
                **unknown,
                "env": {},
                "implementation": {},
                "builds": True,
                "skip": "unavailable: x" if config["execution"]["name"] in self.skips else None,
            }
            for config in configs
        ]


@pytest.mark.parametrize(
    ("skips", "builds"),
    [
        pytest.param(["eager"], True, id="one_runs"),
        pytest.param(["eager", "compile"], False, id="none_runs"),
    ],
)
def test_each_execution_is_looked_at_and_what_cannot_run_builds_nothing(
    skips: list[str], builds: bool, tmp_path: Path
) -> None:
    """Sizes alone are asked once."""
    made = make(tmp_path, "execution=eager,compile", "batch=1,2", engine=Asked(skips))
    skipped = {cell.content["execution"]["name"] for cell in made.cells if cell.status == "skipped"}
    runs = {cell.content["execution"]["name"] for cell in made.to_run()}
    assert (skipped, runs) == (set(skips), {"eager", "compile"} - set(skips)) and made.builds_extension == builds


MISTAKES = [
    pytest.param("sweep.stale=sometimes", "sweep.stale=sometimes", id="stale"),
    pytest.param("sweep.plotly=cdn", "sweep.plotly=cdn: must be one of", id="plotly"),
    pytest.param("sweep.compare=[routers]", "Did you mean router", id="compare"),
    pytest.param("sweep.exclude=[router]", "sweep.exclude=router", id="exclude"),
    pytest.param("sweep.exclude=[{rooter: torch}]", "Did you mean router", id="exclude-key"),
    pytest.param("sweep.exclude=[{rooter.impl: torch}]", "unknown key rooter.impl. Did you mean router?", id="dotted"),
    pytest.param("sweep.anchor={modell/shape: demo}", "unknown key modell/shape. Did you mean model?", id="slash"),
    pytest.param("sweep.anchor=torch", "sweep.anchor=torch", id="anchor"),
    pytest.param("sweep.timeout_s=0", "sweep.timeout_s=0", id="timeout"),
    pytest.param("measure.replicates=0", "measure.replicates=0", id="replicates"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES)
def test_a_mistake_in_the_sweep_keys_names_the_key(override: str, message: str) -> None:
    """One line with the value and the mend."""
    with pytest.raises(ValueError) as raised:
        moe_lab.compose([override])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.fixture(autouse=True)
def _no_multirun_is_left() -> Iterator[None]:
    yield
    assert multirun.current is None


def test_variants_of_a_plan_are_those_of_its_records(tmp_path: Path) -> None:
    """Tables made from records alone name them alike."""
    made = make(tmp_path, "router=sinkhorn", "router.iters=5,10", "experts=loop,grouped")
    contents = [identity.content(cell.config) for cell in made.cells]
    assert [cell.variant for cell in made.cells] == variants.labels(contents)
    assert len({cell.variant for cell in made.cells}) == 4
