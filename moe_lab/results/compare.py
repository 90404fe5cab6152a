"""Compares two result sets cell by cell: slower, faster, the same or inconclusive.

Cells are joined by `cell_id`, the hash of the configuration, so the sets may come from other code or another machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lab.intervals import judge, typical
from moe_lab.records import identity, variants
from moe_lab.records.schema import Record
from moe_lab.records.store import RESULT, read_record
from moe_lab.results.load import search
from moe_lab.results.noise import read_floor

NAMES = ("model", "router", "experts", "batch", "seq_len", "dtype", "device", "execution")
_NUMBERS = ("p50_a_ms", "p50_b_ms", "ratio", "ratio_low", "ratio_high")
COLUMNS = ("cell_id", *NAMES, "also", *_NUMBERS, "replicates_a", "replicates_b", "unstable", "verdict", "why")
_FloorOf = Callable[[str], float | None]


# --- reading ---


@dataclass
class _Run:
    """What of a record is compared. Made by `_parse`, so that a foreign file fails there and nowhere later."""

    record: Record
    content: dict[str, Any]
    names: dict[str, Any]
    medians: list[float]
    """Milliseconds, of each fresh process; empty if nothing was timed."""
    probes: list[float]
    """Milliseconds of the probe in each of them; empty if there was none."""
    context: dict[str, dict[str, str]]
    """Values that should be equal on both sides: the fields of `machine`, `implementation` and `timing`."""


def _parse(record: Record) -> _Run:
    content = identity.content(record.config)
    nodes = {name: content.get(name) for name in NAMES}
    latency = record.latency_ms if record.status == "ok" else None
    medians = [float(value) for value in latency.replicate_p50 or [latency.p50]] if latency else []
    probes = [float(value) for value in latency.replicate_probe_ms] if latency else []
    if not all(0 < value < math.inf for value in (*medians, *probes)):
        raise ValueError(f"latency_ms: all medians {medians} and probes {probes} must be positive")
    if record.status not in ("ok", "failed", "skipped"):
        raise ValueError(f"status={record.status!r}: must be ok, failed or skipped")
    if not isinstance(record.cell_id, str) or not isinstance(record.env_id, str | None):
        raise ValueError("cell_id and env_id must be text")
    return _Run(
        record=record,
        content=content,
        names={key: identity.option_name(node) if isinstance(node, Mapping) else node for key, node in nodes.items()},
        medians=medians,
        probes=probes,
        context={
            "machine": {field: str(record.environment.get(field)) for field in identity.ENV_FIELDS},
            "implementation": {str(key): str(value) for key, value in record.implementation.items()},
            "timing": {"measure.cache": str(latency.cache)} if latency else {},
        },
    )


def _read(root: Path) -> tuple[dict[str, list[_Run]], list[str]]:
    """The runs under `root` by cell, in the order of their paths, and an error for each unreadable record."""
    if not root.is_dir():
        raise ValueError(f"{root}: folder not found.")
    cells: dict[str, list[_Run]] = {}
    unreadable = []
    for found in search(root)[0]:
        path = root / found.folder / RESULT
        try:
            run = _parse(read_record(path.parent))
            cells.setdefault(run.record.cell_id, []).append(run)
        except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
            text = str(error)
            unreadable.append(text if text.startswith(str(path)) else f"{path}: not a run record: {error!r}")
    if not cells:
        raise ValueError(
            f"{root}: no readable records ({len(unreadable)} unreadable); give the folder of a run or a sweep."
        )
    return cells, unreadable


# --- comparing ---


def compare(a: Path, b: Path, *, threshold: float = 0.03, floors: Mapping[str, float] | None = None) -> pd.DataFrame:
    """One row per cell of either set, then one per record that cannot be read; the columns are `COLUMNS`.

    `p50_*_ms` are the medians of the records (of several, the geometric mean), `ratio` is B/A of the replicates'
    medians and `ratio_low` to `ratio_high` its 95 % interval, `also` tells apart cells of the same names, `unstable`
    names the sides whose latency is not stable. `verdict` is `slower`, `faster`, `same` or `inconclusive` (the rule:
    `intervals.judge`) where the cell is ok in both sets; else it says where the cell is missing or failed. Where a
    record is on both sides it is `inconclusive`, because it would be compared with itself.

    Args:
        threshold: the smallest difference that matters, a ratio minus 1.
        floors: noise floor by `env_id`, a ratio minus 1; None reads those stored on this machine.

    Raises:
        ValueError: a threshold out of range; a folder that is missing or has no record that can be read; no cell in
            common, because the cell_ids of the two versions of moe-lab differ.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold}: must be between 0 and 1, such as 0.03 or 3%.")
    (cells_a, unreadable_a), (cells_b, unreadable_b) = _read(Path(a)), _read(Path(b))
    if (change := _change_of_ids(cells_a, cells_b)) is not None:
        raise ValueError(
            f"{a} and {b} have no cell in common: {change}; measure the older one again with this version."
        )
    floor_of: _FloorOf = cache(read_floor) if floors is None else floors.get
    rows, contents = [], []
    for cell_id in dict.fromkeys([*cells_a, *cells_b]):
        sides = {"A": cells_a.get(cell_id, []), "B": cells_b.get(cell_id, [])}
        notes: list[str] = []
        timed = {side: _distinct(side, runs, notes) for side, runs in sides.items()}
        first = (sides["A"] or sides["B"])[0]
        row = {"cell_id": cell_id, **first.names, "also": "", "unstable": "", "verdict": _where(sides, timed)}
        for side, runs in timed.items():
            medians = [median for run in runs for median in run.medians]
            row[f"replicates_{side.lower()}"] = len(medians)
            row[f"p50_{side.lower()}_ms"] = _p50(runs) if runs else None
        if timed["A"] and timed["B"]:
            row.update(_judged(timed, threshold, floor_of, notes))
            if any(a.record.to_dict() == b.record.to_dict() for a in timed["A"] for b in timed["B"]):
                row["verdict"] = "inconclusive"
                notes.append("a record of A is in B too: give two measurements")
        rows.append({**row, "why": "; ".join(notes)})
        contents.append(first.content)
    _tell_apart(rows, contents)
    for side, unreadable in (("A", unreadable_a), ("B", unreadable_b)):
        rows += [{"verdict": f"unreadable in {side}", "also": "", "unstable": "", "why": text} for text in unreadable]
    return pd.DataFrame(rows, columns=list(COLUMNS), dtype=object).astype(dict.fromkeys(_NUMBERS, float))


def _change_of_ids(cells_a: dict[str, list[_Run]], cells_b: dict[str, list[_Run]]) -> str | None:
    """Why no cell is in both sets, if the two code versions give the same cells different cell_ids."""
    if cells_a.keys() & cells_b.keys():
        return None
    a, b = ([run for runs in cells.values() for run in runs] for cells in (cells_a, cells_b))
    if {run.record.code_id for run in a} & {run.record.code_id for run in b}:
        return None
    namesakes = {_slug(run): run for run in b}
    pairs = [(run, namesakes[_slug(run)]) for run in a if _slug(run) in namesakes]
    for run_a, run_b in pairs:
        only_a, only_b = (sorted(_keys(run) - _keys(beside)) for run, beside in ((run_a, run_b), (run_b, run_a)))
        if only_a or only_b or identity.digest(run_a.content) == identity.digest(run_b.content):
            versions = [str(run.record.environment.get("moe_lab")) for run in (run_a, run_b)]
            if versions[0] == versions[1]:
                versions = [f"{versions[0]} (code_id {run.record.code_id})" for run in (run_a, run_b)]
            moved = [f"{keys[0]} only in {side}" for side, keys in (("A", only_a), ("B", only_b)) if keys]
            details = ", ".join(["see CHANGELOG", *moved])
            return f"cell_ids changed between moe-lab {versions[0]} and {versions[1]} ({details})"
    return None


def _slug(run: _Run) -> str:
    """A readable name of the cell; equal for cells with the same options whose other keys differ."""
    workload = run.content.get("workload")
    return repr([*run.names.values(), identity.option_name(workload) if isinstance(workload, Mapping) else workload])


def _keys(run: _Run) -> set[str]:
    """The keys of its configuration; how it was timed is one."""
    return {key for key, _ in variants.leaves({**run.content, "measure": None})}


def _distinct(side: str, runs: list[_Run], notes: list[str]) -> list[_Run]:
    """The timed runs of a cell, without identical copies, which are not replicates. Adds remarks to `notes`."""
    distinct: list[_Run] = []
    for run in runs:
        if all(run.record.to_dict() != other.record.to_dict() for other in distinct):
            distinct.append(run)
    if len(distinct) < len(runs):
        notes.append(f"identical copies in {side} are counted once")
    timed = [run for run in distinct if run.medians]
    if len(timed) > 1:
        versions = len({run.record.code_id for run in timed})
        notes.append(
            f"{len(timed)} results pooled in {side}" + (f", from {versions} code versions" if versions > 1 else "")
        )
    for run in distinct:
        if not run.medians:
            notes.append(f"{side}: {run.record.reason or _state(run)}")
    return timed


def _p50(runs: list[_Run]) -> float:
    """What the record says, as every table does; of several results pooled, what is typical of all replicates."""
    latency = runs[0].record.latency_ms
    if len(runs) == 1 and latency is not None:
        return float(latency.p50)
    return typical([median for run in runs for median in run.medians])


def _unstable(timed: dict[str, list[_Run]]) -> str:
    """The sides with a latency that is not stable: `A`, `B`, `A and B`, or nothing."""
    return " and ".join(
        side
        for side, runs in timed.items()
        if any(run.record.latency_ms is not None and not run.record.latency_ms.stable for run in runs)
    )


def _state(run: _Run) -> str:
    return "not timed" if run.record.status == "ok" else run.record.status


def _where(sides: dict[str, list[_Run]], timed: dict[str, list[_Run]]) -> str:
    """The verdict of a cell that is not timed in both sets."""
    present = [side for side, runs in sides.items() if runs]
    if len(present) == 1:
        return f"only in {present[0]}"
    states = {side: _state(runs[0]) for side, runs in sides.items() if not timed[side]}
    if len(states) == 2 and len(set(states.values())) == 1:
        return f"{states['A']} in both"
    return ", ".join(f"{state} in {side}" for side, state in states.items())


def _judged(timed: dict[str, list[_Run]], threshold: float, floor_of: _FloorOf, notes: list[str]) -> dict[str, Any]:
    """Verdict, ratio and interval of a cell that is timed in both sets."""
    a, b = ([median for run in timed[side] for median in run.medians] for side in ("A", "B"))
    machines = {run.record.env_id for runs in timed.values() for run in runs}
    machine = machines.pop() if len(machines) == 1 else None
    floor = floor_of(machine) if machine else None
    probes = tuple([probe for run in timed[side] for probe in run.probes] for side in ("A", "B"))
    verdict, ratio, low, high, why = judge(a, b, threshold, floor, (probes[0], probes[1]))
    if unstable := _unstable(timed):
        why += f"; the latency is not stable in {unstable} (measure.target_ci)"
    notes.insert(0, why)
    if low is None and floor is None:
        remedy = "run moe-lab doctor --noise" if machine else "set measure.replicates=3 to get an interval"
        notes.insert(1, f"noise floor not measured; {remedy}")
    if machines:
        notes.append(f"machines differ: {_differences(timed, 'machine') or 'their env_id'}")
    if differences := _differences(timed, "implementation"):
        notes.append(f"different kernels ran: {differences}")
    if differences := _differences(timed, "timing"):
        verdict = "inconclusive"
        notes.append(f"not comparable, timed differently: {differences}")
    return {"unstable": unstable, "verdict": verdict, "ratio": ratio, "ratio_low": low, "ratio_high": high}


def _differences(timed: dict[str, list[_Run]], kind: str) -> str:
    """The fields of that kind which are not the same in all runs, with their values on both sides."""
    differ = []
    for key in dict.fromkeys(key for runs in timed.values() for run in runs for key in run.context[kind]):
        values = {side: sorted({run.context[kind].get(key, "none") for run in runs}) for side, runs in timed.items()}
        if values["A"] != values["B"] or len(values["A"]) > 1:
            differ.append(f"{key} {'/'.join(values['A'])} in A and {'/'.join(values['B'])} in B")
    return ", ".join(differ)


def _tell_apart(rows: list[dict[str, Any]], contents: list[dict[str, Any]]) -> None:
    """Fill `also` of cells with the same names: the keys of their configurations that differ, `router.iters=5`."""
    namesakes: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        namesakes.setdefault(repr([row[name] for name in NAMES]), []).append(position)
    for positions in namesakes.values():
        leaves = [{key: str(value) for key, value in variants.leaves(contents[position])} for position in positions]
        for key in dict.fromkeys(key for leaf in leaves for key in leaf):
            if len({leaf.get(key) for leaf in leaves}) > 1:
                for position, leaf in zip(positions, leaves, strict=True):
                    if key in leaf:
                        rows[position]["also"] += f"{' ' if rows[position]['also'] else ''}{key}={leaf[key]}"
