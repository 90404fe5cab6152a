"""How long a planned sweep will take on its slots. Imports no torch."""

from __future__ import annotations

from moe_lab.records import identity, store
from moe_lab.sweep.plan import Cell, Plan, groups


def expected_seconds(plan: Plan) -> tuple[float, bool]:
    """(seconds until all has run, whether that is from earlier records or the bound of `measure`).

    Each group goes to the slot that is free first, of those that can run it.
    """
    known = _known(plan)
    busy_s: dict[str, float] = {}
    env_ids: dict[str, set[str | None]] = {}
    for kind in plan.kinds:
        for slot in kind["slots"]:
            busy_s[slot], env_ids[slot] = 0.0, set(kind["env_ids"].values())
    alone_s, all_known = 0.0, True
    for group in groups(plan):
        seconds = 0.0
        for cell in group:
            of_model = known.get(_model(cell))
            all_known = all_known and of_model is not None
            seconds += _seconds(cell, of_model)
        able = [slot for slot in busy_s if all(env_ids[slot] & set(cell.env_ids) for cell in group)]
        if able:
            busy_s[min(able, key=lambda slot: busy_s[slot])] += seconds
        else:  # one worker
            alone_s += seconds
    return alone_s + max(busy_s.values(), default=0.0), all_known


def _known(plan: Plan) -> dict[str, list[float]]:
    """What cells of each model took."""
    known: dict[str, list[float]] = {}
    for cell in plan.cells:
        record = store.find_record(cell.directory)
        if record is not None and record.status == "ok" and record.elapsed_s is not None:
            known.setdefault(_model(cell), []).append(record.elapsed_s)
    return known


def _model(cell: Cell) -> str:
    return identity.digest(cell.content["model"])


def _seconds(cell: Cell, of_model: list[float] | None) -> float:
    measure = cell.config["measure"]
    each = sum(of_model) / len(of_model) if of_model else measure["warmup_s"] + measure["max_time_s"]
    return float(each * measure["replicates"])
