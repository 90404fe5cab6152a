"""`moe-lab plan`: what a multirun would do, without doing it. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_lab.cli.json_output import print_json
from moe_lab.cli.progress import Terminal
from moe_lab.cli.reporter import clock
from moe_lab.cli.table import print_table
from moe_lab.config.compose import composing_multirun
from moe_lab.records import store, variants
from moe_lab.records.identity import option_name
from moe_lab.sweep import multirun, places, search
from moe_lab.sweep import plan as planning
from moe_lab.sweep.expected import expected_seconds
from moe_lab.sweep.kinds import HasKinds, Kept, Kinds, Unkept, kept
from moe_lab.sweep.plan import Plan
from moe_lab.sweep.remembered import Remembered
from moe_lab.trackers.outbox import Outbox


def make(overrides: list[str], config_dir: str | None) -> Plan:
    """The plan of `moe-lab -m OVERRIDES`. Raises `ValueError` for a mistake in them."""
    with composing_multirun(overrides, config_dir) as (loader, config):
        composer, directory = multirun.JobComposer(loader, config), Path(config.hydra.sweep.dir)
        Outbox(config.tracker, directory, is_sweep=True)  # a package that is not installed
        note = ""
        if search.is_search(config):
            known, note = search.known_jobs(composer, directory)
        else:
            known = multirun.expand(loader, config)
        jobs = list(composer.jobs(known))

        def made(place: HasKinds) -> Plan:
            kinds = Kinds(place, config.sweep.require)
            plan = planning.make(jobs, directory, kinds, multirun.command(), composer.typed, composer.of_experiment)
            plan.kinds = kinds.content() if places.has_slots(config.sweep) else []
            plan.note = note
            return plan

        if places.has_slots(config.sweep):
            return _asked_of_slots(planning.plain(config.sweep), directory, made)
        worker = Remembered()
        try:
            return made(places.OnlyOne(worker))
        finally:
            worker.close()


def _asked_of_slots(sweep: dict[str, Any], directory: Path, made: Callable[[HasKinds], Plan]) -> Plan:
    """From what the slots said when the sweep was started before; else they are asked, and nothing is written."""
    try:
        return made(Kept(kept(directory, sweep["engine"], sweep["slots"])))
    except Unkept:
        folder = Path(f"{directory}#plan")
        missing = store.missing_folders(folder)
        try:
            pool = places.open_pool(sweep | {"shared": False}, folder, Terminal().say)
            try:
                return made(pool)
            finally:
                pool.close()
        finally:
            store.remove_empty(missing)


def show(overrides: list[str], config_dir: str | None, *, json: bool = False) -> None:
    """Print every cell with what would be done about it, and how long that would take."""
    plan = make(overrides, config_dir)
    if json:
        print_json(_content(plan))
        return
    contents = variants.all_named([cell.content for cell in plan.cells], [cell.config for cell in plan.cells])
    models, workloads = (variants.labels(contents, (key,)) for key in ("model", "workload"))
    if "model" in plan.sweep["compare"]:  # what differs is in the variant
        models = [option_name(content["model"]) for content in contents]
    differ = len(set(workloads)) > 1
    seeds_differ = len({cell.content["seed"] for cell in plan.cells}) > 1
    group_of = {cell.cell_id: str(n) for n, group in enumerate(planning.groups(plan), start=1) for cell in group}
    rows = []
    for cell, model, workload in zip(plan.cells, models, workloads, strict=True):
        cannot = cell.status == "skipped" and (cell.reason or "").startswith("unavailable")
        status: str = "cannot run here" if cannot else cell.status
        if cell.reason and cell.reason != status:
            status += f": {cell.reason}"
        computed = (cell.implementation.get("router", "-"), cell.implementation.get("experts", "-"))
        on = (group_of.get(cell.cell_id, "-"), " or ".join(str(env_id)[:6] for env_id in cell.env_ids) or "-")
        sizes: tuple[str, ...] = (str(cell.content["batch"]), str(cell.content.get("seq_len", "-")))
        sizes += (str(cell.content["seed"]),) if seeds_differ else ()
        more = on if plan.kinds else ()
        rows.append(
            (cell.variant, model, *([workload] if differ else []), *sizes, *computed, *more, cell.cell_id, status)
        )
    columns = (
        "variant",
        "model",
        *(["workload"] if differ else []),
        "batch",
        "seq_len",
        *(["seed"] if seeds_differ else []),
        "router impl",
        "experts impl",
        *(("group", "on") if plan.kinds else ()),
        "cell_id",
        "status",
    )
    console = print_table(columns, rows)
    n_to_run = len(plan.to_run())
    line = f"{plan.directory}: {len(plan.cells)} cells, {n_to_run} to run"
    if plan.n_equal:
        line += f" ({plan.n_equal} {'duplicate' if plan.n_equal == 1 else 'duplicates'} left out)"
    if n_to_run:
        seconds, is_known = expected_seconds(plan)
        line += f", about {clock(seconds)}" + ("" if is_known else " of timing at most, without building and verifying")
        if plan.kinds:
            n_slots = sum(len(kind["slots"]) for kind in plan.kinds)
            line += f", on {n_slots} {'slot' if n_slots == 1 else 'slots'}: {_kinds_in_words(plan)}"
    for text in (line, *([plan.note] if plan.note else []), *plan.without_effect):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _kinds_in_words(plan: Plan) -> str:
    return ", ".join(f"{len(kind['slots'])} of {_name_of(kind)}" for kind in plan.kinds)


def _name_of(kind: Mapping[str, Any]) -> str:
    """The devices of a kind of slot, and the start of its `env_id` where these are the same for others."""
    looks = [answer for answer in kind["answers"].values() if isinstance(answer, Mapping)]
    names = {look["env_id"]: look["env"].get("device_name") for look in looks if look["env_id"] is not None}
    return " and ".join(f"{name} ({env_id[:6]})" for env_id, name in names.items()) or "nothing that can run them"


def _content(plan: Plan) -> dict[str, Any]:
    seconds, is_measured = expected_seconds(plan)
    return {
        "directory": str(plan.directory),
        "n_cells": len(plan.cells),
        "n_to_run": len(plan.to_run()),
        "n_duplicates": plan.n_equal,
        "expected_s": seconds,
        "expected_is_measured": is_measured,
        "without_effect": plan.without_effect,
        "note": plan.note,
        "cells": [
            {
                "cell_id": cell.cell_id,
                "directory": str(cell.directory),
                "variant": cell.variant,
                "setting_id": cell.setting_id,
                "status": cell.status,
                "reason": cell.reason,
                "runs": cell.runs,
                "router_implementation": cell.implementation.get("router"),
                "experts_implementation": cell.implementation.get("experts"),
                "config": cell.config,
            }
            for cell in plan.cells
        ],
    }
