"""`moe-lab plan`: what a multirun would do, without doing it. Nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_lab.cli.json_output import print_json
from moe_lab.cli.progress import clock
from moe_lab.cli.table import print_table
from moe_lab.config.compose import composing_multirun
from moe_lab.records import variants
from moe_lab.sweep import multirun
from moe_lab.sweep import plan as planning
from moe_lab.sweep.plan import Plan
from moe_lab.sweep.remembered import Remembered


def make(overrides: list[str], config_dir: str | None) -> Plan:
    """The plan of `moe-lab -m OVERRIDES`. Raises `ValueError` for a mistake in them."""
    worker = Remembered()
    try:
        with composing_multirun(overrides, config_dir) as (loader, config):
            composer = multirun.JobComposer(loader, config)
            jobs = composer.jobs(multirun.expand(loader, config))
            return planning.make(jobs, Path(config.hydra.sweep.dir), worker, multirun.command(), composer.typed)
    finally:
        worker.close()


def show(overrides: list[str], config_dir: str | None, *, json: bool = False) -> None:
    """Print every cell with what would be done about it, and how long that would take."""
    plan = make(overrides, config_dir)
    if json:
        print_json(_content(plan))
        return
    contents = variants.all_named([cell.content for cell in plan.cells], [cell.config for cell in plan.cells])
    models, workloads = (variants.labels(contents, (key,)) for key in ("model", "workload"))
    differ = len(set(workloads)) > 1
    rows = []
    for cell, model, workload in zip(plan.cells, models, workloads, strict=True):
        cannot = cell.status == "skipped" and (cell.reason or "").startswith("unavailable")
        status: str = "cannot run here" if cannot else cell.status
        if cell.reason and cell.reason != status:
            status += f": {cell.reason}"
        computed = (cell.implementation.get("router", "-"), cell.implementation.get("experts", "-"))
        sizes = (str(cell.content["batch"]), str(cell.content.get("seq_len", "-")))
        rows.append((cell.variant, model, *([workload] if differ else []), *sizes, *computed, cell.cell_id, status))
    columns = (
        "variant",
        "model",
        *(["workload"] if differ else []),
        "batch",
        "seq_len",
        "router impl",
        "experts impl",
        "cell_id",
        "status",
    )
    console = print_table(columns, rows)
    n_to_run = len(plan.to_run())
    line = f"{plan.directory}: {len(plan.cells)} cells, {n_to_run} to run"
    if plan.n_equal:
        line += f" ({plan.n_equal} {'duplicate' if plan.n_equal == 1 else 'duplicates'} left out)"
    if n_to_run:
        seconds, is_known = planning.expected_seconds(plan)
        line += f", about {clock(seconds)}" + ("" if is_known else " of timing at most, without building and verifying")
    for text in (line, *plan.without_effect):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _content(plan: Plan) -> dict[str, Any]:
    seconds, is_measured = planning.expected_seconds(plan)
    return {
        "directory": str(plan.directory),
        "n_cells": len(plan.cells),
        "n_to_run": len(plan.to_run()),
        "n_duplicates": plan.n_equal,
        "expected_s": seconds,
        "expected_is_measured": is_measured,
        "without_effect": plan.without_effect,
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
