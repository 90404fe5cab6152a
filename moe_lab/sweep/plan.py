"""The plan of a sweep: its cells, which are done, and which cannot run here. Does not import torch."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from omegaconf import DictConfig, OmegaConf

from moe_lab.config import targets
from moe_lab.config.checks import check_overrides, is_whole, validate
from moe_lab.config.unread import key_of, unread
from moe_lab.errors import nearest
from moe_lab.records import files, identity, inputs, observations, store, variants
from moe_lab.records.schema import NOT_ENDED, Record
from moe_lab.sweep import folders
from moe_lab.sweep.engine import WorkerLostError


class Asked(Protocol):
    """Who answers for the machines: an engine, or `kinds.Kinds`."""

    def call(self, step: str, *arguments: Any) -> Any:
        """See `Engine.call`."""
        ...


Status = Literal["to do", "done", "stale", "skipped", "excluded"]
_IMPOSSIBLE = "impossible: "
_JOINS = ("model.timed",)
"""Cells that differ only in these keys, and do not read them, are one cell.

A size that a router does not read is left out, so that the router is compared with the others.
"""


@dataclass
class Cell:
    """One run of a sweep."""

    cell_id: str
    directory: Path
    config: dict[str, Any]
    """Resolved, as it will stand in the record."""
    content: dict[str, Any]
    """What of it changes the result."""
    described: dict[str, Any]
    """The same with the keys that old cell_ids lack: what `sweep.exclude` and `sweep.anchor` are compared with."""
    code_id: str
    setting_id: str
    variant: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    env_id: str | None = None
    env_ids: list[str | None] = field(default_factory=list)
    """Of all kinds of slots that can run it; a result of one of them is current."""
    device_id: str | None = None
    """What it has for itself while it is timed (`measure.device_lock`)."""
    available_bytes: int | None = None
    implementation: dict[str, str] = field(default_factory=dict)
    """Who would route, as it will stand in the record."""
    status: Status = "to do"
    reason: str | None = None
    is_ok: bool = False
    """Done, and with success."""

    @property
    def runs(self) -> bool:
        """Whether the sweep is to run it."""
        return self.status in ("to do", "stale")

    def record(self, status: Literal["failed", "skipped"], reason: str) -> Record:
        """A record without a measurement."""
        return Record(
            status=status,
            reason=reason,
            cell_id=self.cell_id,
            code_id=self.code_id,
            env_id=self.env_id,
            name=self.config["name"],
            overrides=list(self.config["overrides"]),
            config=self.config,
            environment=self.environment,
        )


@dataclass
class Plan:
    """The cells of a sweep in the order of the command, and how to run them."""

    directory: Path
    cells: list[Cell]
    sweep: Mapping[str, Any]
    """The `sweep` node of the configuration."""
    command: list[str]
    n_equal: int = 0
    """Cells of the command left out because another one is the same."""
    jobs: list[str] = field(default_factory=list)
    """The cell_id of each job of the command."""
    kinds: list[dict[str, Any]] = field(default_factory=list)
    """The kinds of slots, and what they answered; see `kinds.Kinds.content`."""
    builds_extension: bool = False
    """Whether a cell compiles the extension first."""
    without_effect: list[str] = field(default_factory=list)
    """What was asked for and matches no cell, a line each."""
    note: str = ""
    """What is to be said of the cells, in a line."""

    def matching(self, partial: Mapping[str, Any], or_excluded: bool = False) -> list[Cell]:
        """The cells that a partial configuration matches."""
        cells = (cell for cell in self.cells if or_excluded or cell.status != "excluded")
        return [cell for cell in cells if variants.matches(cell.described, partial)]

    def to_run(self) -> list[Cell]:
        """The cells that the sweep is to run."""
        return [cell for cell in self.cells if cell.runs]

    def anchor_of(self, setting_id: str) -> Cell | None:
        """The variant of a setting that the others are compared with: the first that `sweep.anchor` describes."""
        partial = self.sweep["anchor"] or {}
        members = (cell for cell in self.cells if cell.setting_id == setting_id)
        possible = [cell for cell in members if cell.runs or cell.is_ok]
        return next((cell for cell in possible if variants.matches(cell.described, partial)), None)

    def write(self) -> None:
        """Write `plan.json`, before the first cell runs."""
        content = {
            "schema": 1,
            "name": self.directory.name,
            "commands": [*(words for words in read_commands(self.directory) if words != self.command), self.command],
            "compare": list(self.sweep["compare"]),
            "plotly": self.sweep["plotly"],
            "anchor": self.sweep["anchor"],
            "cells_equal_to_another": self.n_equal,
            "engine": self.sweep["engine"],
            "n_slots": dict(self.sweep["slots"]),
            "kinds": self.kinds,
            "cells": [
                {
                    "cell_id": cell.cell_id,
                    "directory": os.path.relpath(cell.directory, self.directory),
                    "status": cell.status,
                    "reason": cell.reason,
                    "variant": cell.variant,
                    "setting_id": cell.setting_id,
                    "code_id": cell.code_id,
                    "env_id": cell.env_id,
                    "env_ids": cell.env_ids,
                    "implementation": cell.implementation,
                }
                for cell in self.cells
            ],
        }
        store.write_atomic(self.directory / store.PLAN, json.dumps(content, indent=1).encode() + b"\n")


def make(
    composed: Iterable[tuple[DictConfig, Sequence[str], Path]],
    directory: Path,
    engine: Asked,
    command: list[str],
    typed: Collection[str] | None = None,
    of_experiment: Sequence[str] = (),
) -> Plan:
    """The plan for composed configurations, each with its overrides and its folder.

    Args:
        typed: the keys that the person set; None if this is only a part of a sweep. What has no effect in any cell is
            refused if it was typed, and else, for an experiment set it, named in `Plan.without_effect`.
        of_experiment: `key=value` of what an experiment sets in all cells.

    Raises:
        ValueError: a mistake that is in every cell, something that was typed and has no effect in any cell, or
            `sweep.stale=refuse` and there are stale results.
    """
    cells, n_equal, jobs, sweep, unread_everywhere = _cells(composed, of_experiment)
    folders.check(directory, [cell.directory for cell in cells])
    for cell, label in zip(cells, variants.labels([cell.content for cell in cells], sweep["compare"]), strict=True):
        cell.variant = label
        mappings = [partial for partial in sweep["exclude"] if isinstance(partial, Mapping)]  # another is a mistake
        if any(variants.matches(cell.described, partial) for partial in mappings):
            cell.status, cell.reason = "excluded", "excluded"
    _refuse_impossible(cells)  # before anybody is asked
    _skip_too_large(cells, engine)  # before a part of one is made
    builds = False
    for cell, seen in _look([cell for cell in cells if cell.runs], engine):
        cell.environment, cell.env_id = seen["env"], seen["env_id"]
        cell.env_ids = seen["env_ids"] if "env_ids" in seen else [seen["env_id"]]
        cell.device_id, cell.available_bytes = seen["device_id"], seen["available_bytes"]
        cell.implementation = seen["implementation"]
        builds = builds or (seen["builds"] and seen["skip"] is None)
        if seen["skip"] is not None:
            cell.status, cell.reason = "skipped", seen["skip"]
        else:
            judge(cell, sweep)
    _refuse_impossible(cells)
    plan = Plan(directory, cells, sweep, command, n_equal, jobs, builds_extension=builds)
    if typed is not None:
        plan.without_effect = _without_effect(plan, unread_everywhere, typed)
    _refuse_stale(plan)
    return plan


def _without_effect(plan: Plan, unread_everywhere: Mapping[str, str], typed: Collection[str]) -> list[str]:
    """What matches no cell. Raises `ValueError` if it was typed; an `exclude` may be there for other axes."""
    lines = dict(unread_everywhere)
    if (anchor := plan.sweep.get("anchor")) and plan.matching(anchor) == []:
        lines["sweep.anchor"] = (
            f"sweep.anchor={json.dumps(anchor)}: {_why_none(plan, anchor)}; name one, or set sweep.anchor=null (then "
            "the first variant is the anchor)."
        )
    for key, line in lines.items():
        if any(one == key or one.startswith(f"{key}.") for one in typed):
            raise ValueError(line)
    excluded = [partial for partial in plan.sweep["exclude"] if plan.matching(partial, or_excluded=True) == []]
    return [*lines.values(), *(f"sweep.exclude={json.dumps(p)}: {_why_none(plan, p)}." for p in excluded)]


def _why_none(plan: Plan, partial: Mapping[str, Any]) -> str:
    """Why no cell matches."""
    missing = variants.missing_key([cell.described for cell in plan.cells], partial)
    if missing is None:
        return "no cell of the sweep is like this"
    key, beside = missing
    where, _, word = key.rpartition(".")
    if near := nearest(word, beside).removeprefix(" Did you mean ").removesuffix("?"):
        known = f"nearest: {key.removesuffix(word)}{near}"
    else:
        known = f"{where or 'a cell'}: {', '.join(name for name in beside if name != '_target_') or 'none'}"
    return f"no cell of the sweep has a key {key} that changes its result ({known})"


def _cells(
    composed: Iterable[tuple[DictConfig, Sequence[str], Path]], of_experiment: Sequence[str]
) -> tuple[list[Cell], int, list[str], dict[str, Any], dict[str, str]]:
    cells: dict[str, Cell] = {}
    unread_somewhere: dict[str, str] = {}
    read: set[str] = set()
    sweep: dict[str, Any] = {}
    jobs = []
    for cfg, overrides, directory in composed:
        cfg.overrides = list(overrides)
        check_overrides(cfg, overrides, in_a_sweep=True)
        here = unread(cfg, overrides, in_a_sweep=True)
        waiting = [override for override in of_experiment if key_of(override) not in read]
        of_others = unread(cfg, waiting, in_a_sweep=True)
        unread_somewhere = {**of_others, **here, **unread_somewhere}
        read |= {key for override in overrides if (key := key_of(override)) not in here}
        read |= {key for override in waiting if (key := key_of(override)) not in of_others}
        mistake = None
        try:
            validate(cfg)
            inputs.require(cfg)
        except ValueError as error:
            mistake = error
            if not is_whole(cfg) or OmegaConf.missing_keys(cfg):
                raise
        container = plain(cfg)
        content = identity.content(container)
        said = unread(cfg, overrides, in_a_sweep=True, only_refused=False)
        not_read = {*here, *(key for key in _JOINS if key in said)}
        # What a cell with a mistake computes nobody knows.
        computes = identity.digest(_without(content, not_read) if mistake is None else content)
        if computes in cells:
            if keys := observations.differing(cells[computes].config, container):
                raise ValueError(
                    f"measure.{keys[0]}: a sweep measures each cell once, so this key can have only one value; use "
                    "another sweep.name for the other one."
                )
            jobs.append(cells[computes].cell_id)
            continue
        sweep = sweep or container["sweep"]
        cells[computes] = Cell(
            cell_id=identity.digest(content),
            directory=directory,
            config=container,
            content=content,
            described=identity.content(container, with_later=True),
            code_id=identity.code_id(targets.folders_of(cfg)),
            setting_id=variants.setting_id(content, container["sweep"]["compare"]),
        )
        jobs.append(cells[computes].cell_id)
        if mistake is not None:
            cells[computes].status, cells[computes].reason = "skipped", f"{_IMPOSSIBLE}{mistake}"
    unread_everywhere = {key: line for key, line in unread_somewhere.items() if key not in read}
    return list(cells.values()), len(jobs) - len(cells), jobs, sweep, unread_everywhere


def _without(content: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A content without keys that the cell does not read: what tells two cells apart."""
    found = copy.deepcopy(dict(content))
    for key in keys:
        node: Any = found
        *above, name = key.split(".")
        for group in above:
            node = node.get(group) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(name, None)
    return found


def _refuse_impossible(cells: Sequence[Cell]) -> None:
    """Raise `ValueError` where no combination is possible: a mistake, not gaps in the table."""
    reasons = [cell.reason or "" for cell in cells if cell.status != "excluded"]
    if reasons and all(reason.startswith(_IMPOSSIBLE) for reason in reasons):
        raise ValueError(reasons[0].removeprefix(_IMPOSSIBLE))


def _skip_too_large(cells: Sequence[Cell], engine: Asked) -> None:
    """Skip what does not fit into the memory. What has run before is not refused: it may be done."""
    asked = [cell for cell in cells if cell.runs]
    for cell, reason in zip(asked, engine.call("refusals", [cell.config for cell in asked]), strict=True):
        if reason is not None and not _has_run(cell):
            cell.status, cell.reason = "skipped", f"unavailable: {reason}"


def _has_run(cell: Cell) -> bool:
    record = store.find_record(cell.directory)
    return record is not None and record.status == "ok"


def _look(cells: Sequence[Cell], engine: Asked) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell with what the engine says of it; sizes of the input change nothing there, so it is asked once."""
    keys = []
    for cell in cells:
        parts = {key: part for key, part in cell.content.items() if key not in ("batch", "seq_len", "seed")}
        keys.append(identity.digest(parts))
    asked = dict(zip(keys, cells, strict=True))
    seen = dict(zip(asked, _seen([cell.config for cell in asked.values()], engine), strict=True))
    return ((cell, seen[key]) for cell, key in zip(cells, keys, strict=True))


def _seen(configs: Sequence[Mapping[str, Any]], engine: Asked) -> list[dict[str, Any]]:
    """What the engine says of each; of one whose parts end its process only the device, for building it will tell."""
    try:
        return list(engine.call("look", configs))
    except WorkerLostError:
        seen: list[dict[str, Any]] = []
        for config in configs:
            try:
                seen += engine.call("look", [config])
            except WorkerLostError:
                seen += engine.call("look", [config], False)
        return seen


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A configuration as it stands in a record."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def judge(cell: Cell, sweep: Mapping[str, Any]) -> None:
    """Set what is to be done about a cell that can run here, from the record in its folder."""
    try:
        record = store.read_record(cell.directory)
    except FileNotFoundError:
        return
    except ValueError:
        cell.reason = "the record cannot be read"
        return
    named = ("configuration", "code", "machine")
    is_current = (
        record.cell_id == cell.cell_id,
        record.code_id == cell.code_id,
        record.env_id is None or record.env_id in cell.env_ids,  # null: it failed before it looked
    )
    different = [name for name, same in zip(named, is_current, strict=True) if not same]
    if record.status == "skipped" or (record.reason or "").startswith(NOT_ENDED):
        cell.reason = f"previous run: {record.reason}"
    elif different and sweep["stale"] != "keep":
        cell.status, cell.reason = "stale", f"different {' and '.join(different)}"
    elif record.status == "failed" and sweep["retry_failed"]:
        cell.reason = f"previous run failed: {record.reason}"
    elif record.status == "ok" and sweep["stale"] != "keep" and (keys := _lacking(cell, record)):
        cell.status, cell.reason = "stale", f"measured without this {keys}"
    else:
        cell.status, cell.is_ok = "done", record.status == "ok"


def _lacking(cell: Cell, record: Record) -> str:
    """The keys by which the cell asks for more than the record has, for people."""
    return ", ".join(f"measure.{key}" for key in observations.lacking(cell.config, record.config))


def _refuse_stale(plan: Plan) -> None:
    stale = [cell for cell in plan.cells if cell.status == "stale"]
    if stale and plan.sweep["stale"] == "refuse":
        raise ValueError(
            f"sweep.stale=refuse: {len(stale)} of {len(plan.cells)} results in {plan.directory} are stale "
            f"({stale[0].variant}: {stale[0].reason}); use sweep.stale=rerun or keep, or another sweep.name."
        )


def read_commands(directory: Path) -> list[list[str]]:
    """The commands that filled a sweep's folder, the last one last."""
    try:
        content = files.read_json(directory / store.PLAN)
        return [[str(word) for word in words] for words in content["commands"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # the plan is rewritten, whatever was there


def read_statuses(directory: Path) -> dict[str, str]:
    """The status of each cell in the `plan.json` of a sweep's folder; empty if there is none that can be read."""
    try:
        content = files.read_json(directory / store.PLAN)
        return {cell["cell_id"]: cell["status"] for cell in content["cells"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def groups(plan: Plan) -> list[list[Cell]]:
    """The cells to run, in groups that are timed together; groups of equal models follow each other."""
    together: dict[str, list[Cell]] = {}
    for cell in plan.to_run():
        key = cell.setting_id if plan.sweep["interleave"] else cell.cell_id
        together.setdefault(key, []).append(cell)
    models: dict[str, int] = {}

    def model_of(group: list[Cell]) -> int:
        parts = [group[0].content[key] for key in ("model", "dtype", "device", "seed")]
        return models.setdefault(identity.digest(parts), len(models))

    return sorted(together.values(), key=model_of)
