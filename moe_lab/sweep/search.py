"""A search: batches of trials through the same plan, lock, resume and worker as every sweep.

A batch is the default, which is the configuration without what is searched, and the trials asked for at once. The
default is done after the first batch and runs along in the others, so every trial has a ratio to it from the same
rounds. `search.json` is written before a batch runs, with the trials and no results (`records/search.py`).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, IntegerNode, OmegaConf

from moe_lab.config.hydra_patches import SEARCHER
from moe_lab.config.schemas import GROUPS
from moe_lab.config.unread import key_of
from moe_lab.errors import UnavailableError, nearest
from moe_lab.records import identity
from moe_lab.records import search as searches
from moe_lab.records.schema import Record
from moe_lab.records.search import DIRECTIONS, FILE, RATIO, Constraint, Objective, Outcome, Search, Trial
from moe_lab.sweep import space as spaces
from moe_lab.sweep.multirun import JobComposer, Multirun, spanned_by
from moe_lab.sweep.plan import Plan
from moe_lab.sweep.space import Space

_NAME = "hydra/sweeper=moe_lab_optuna"
_NODE = "hydra.sweeper"
_SAMPLERS = ("tpe", "nsga2", "random")
_LACKS = "the record has no "


class Asked(NamedTuple):
    """What a configuration asks for."""

    space: Space
    fixed: list[str]
    """The overrides of every trial, and of the default."""
    search: Search
    n_trials: int
    n_jobs: int

    def job(self, trial: Trial) -> list[str]:
        """The overrides of a trial's cell."""
        return [*self.fixed, *trial.overrides]


def is_search(config: DictConfig) -> bool:
    """Whether a master configuration asks for a search."""
    return bool(config.hydra.sweeper._target_ == SEARCHER)


def read(loader: ConfigLoader, config: DictConfig) -> Asked:
    """The search that a master configuration asks for.

    Raises:
        ValueError: a mistake in it.
        UnavailableError: Optuna is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UnavailableError(f"{_NAME} needs Optuna; run pip install 'moe-lab[search]'.")
    node: Any = OmegaConf.to_container(config.hydra.sweeper)
    if node["sampler"] not in _SAMPLERS:
        near = nearest(str(node["sampler"]), _SAMPLERS)
        raise ValueError(f"{_NODE}.sampler={node['sampler']}: must be one of {', '.join(_SAMPLERS)}.{near}")
    for key, least in (("n_trials", 1), ("n_jobs", 1), ("population", 2), ("seed", 0)):
        if node[key] < least:
            raise ValueError(f"{_NODE}.{key}={node[key]}: must be a number >= {least}.")
    if config.sweep.anchor is not None:
        raise ValueError("sweep.anchor: has no effect in a search, which compares with the default; remove it.")
    variants, overrides = spanned_by(loader, config, may_have_axes=True)
    parser = OverridesParser.create(config_loader=loader)
    space, fixed = spaces.of([parser.parse_overrides(entry) for entry in variants], overrides)
    _require_whole(space, config)
    most, n = config.sweep.max_cells, min(node["n_trials"], space.size or node["n_trials"])
    if n > most:
        raise ValueError(
            f"sweep.max_cells={most}: these are up to {n:,} trials; set {_NODE}.n_trials to a smaller number, or "
            f"sweep.max_cells={n}."
        )
    search = Search(
        objectives=_objectives(node["objectives"]),
        constraints=_constraints(node["constraints"]),
        space=space.lines(),
        sampler=node["sampler"],
        population=node["population"],
        seed=node["seed"],
    )
    _require_ratios(search, space, config.sweep)
    return Asked(space, fixed, search, node["n_trials"], node["n_jobs"])


def _require_whole(space: Space, config: DictConfig) -> None:
    """Raise `ValueError` for an interval of any numbers where the key of the default is a whole one."""
    for axis in (*space.axes, *(axis for entry in space.entries for axis in entry.axes)):
        place, _, name = axis.key.rpartition(".")
        node: Any = OmegaConf.select(config, place) if place else config
        if (
            not axis.texts
            and isinstance(node, DictConfig)
            and isinstance(node._get_node(name, validate_access=False), IntegerNode)
        ):
            low, high = math.floor(axis.ends[0]), math.ceil(axis.ends[1])
            raise ValueError(f"{axis.line}: {axis.key} is a whole number; write int(interval({low},{high})).")


def _objectives(lines: Sequence[str]) -> list[Objective]:
    place = f"{_NODE}.objectives"
    if not 1 <= len(lines) <= 2:
        raise ValueError(f"{place}: these are {len(lines)}; write one or two, such as [minimize latency_ms].")
    found = []
    for line in lines:
        direction, _, name = line.strip().partition(" ")
        if direction not in DIRECTIONS or not name.strip():
            near = nearest(direction, DIRECTIONS)
            raise ValueError(f"{place}: {line}: must be {' or '.join(DIRECTIONS)}, and a column.{near}")
        found.append(Objective(searches.column(name.strip(), place), direction))
    if len({one.column for one in found}) < len(found):
        raise ValueError(f"{place}: {found[0].column} stands twice; remove one.")
    return found


def _constraints(node: Any) -> list[Constraint]:
    place = f"{_NODE}.constraints"
    if not isinstance(node, dict | None):
        raise ValueError(f"{place}={node}: must be columns and their limits, such as {{peak_mb: {{max: 500}}}}.")
    found = []
    for name, limits in (node or {}).items():
        is_read = isinstance(limits, dict) and limits and limits.keys() <= {"min", "max"}
        if not is_read or not all(_is_limit(end) for end in limits.values()):
            raise ValueError(f"{place}: {name}: {limits}: must be limits, such as {{max: 2.0}} or {{min: 1, max: 2}}.")
        if "min" in limits and "max" in limits and limits["min"] > limits["max"]:
            raise ValueError(f"{place}: {name}: {limits}: no value is within; min must not be more than max.")
        ends = {end: float(value) for end, value in limits.items()}
        found.append(Constraint(searches.column(str(name), place), **ends))
    columns = [one.column for one in found]
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise ValueError(f"{place}: {twice[0]} stands twice; write both limits in one: {{min: 1, max: 2}}.")
    return found


def _is_limit(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _require_ratios(search: Search, space: Space, sweep: DictConfig) -> None:
    """Raise `ValueError` if a ratio to the default is asked for and trials are not timed beside it."""
    if RATIO not in search.columns:
        return
    if not sweep.interleave:
        raise ValueError(f"{RATIO}: there is none with sweep.interleave=false; set it to true.")
    groups = {key_of(key).partition(".")[0] for key in space.searched()}
    if apart := sorted(groups - set(sweep.compare)):
        compare = ",".join([*sweep.compare, *(group for group in apart if group in GROUPS)])
        sizes = [key for key in apart if key not in GROUPS]  # batch, seq_len, seed: of a setting, not of a variant
        remedy = f"give {sizes[0]} one value" if sizes else f"set sweep.compare=[{compare}]"
        hint = f" {_NODE}.seed is that of the sampler." if "seed" in sizes else ""
        raise ValueError(
            f"{RATIO}: {(sizes or apart)[0]} is searched and not compared, so trials are not timed beside the default; "
            f"{remedy}, or use latency_ms.{hint}"
        )


def begin(composer: JobComposer, directory: Path) -> tuple[Asked, Search]:
    """What a multirun is asked to search, and the search in its folder. Raises as `read`, and as `run`."""
    asked = read(composer.loader, composer.config)
    composer.typed -= {key_of(key) for key in asked.space.searched()}  # one may have no effect in a first batch
    ((default, *_),) = composer.jobs([asked.fixed])
    return asked, _journal(directory, replace(asked.search, default=identity.cell_id(default)))


def known_jobs(composer: JobComposer, directory: Path) -> tuple[list[list[str]], str]:
    """The jobs before anything runs, and what to say of them: the default, and the trials so far or a first batch."""
    asked, search = begin(composer, directory)
    from moe_lab.sweep.study import Study  # imports Optuna, whose lack `begin` explains

    overrides = [trial.overrides for trial in search.trials]
    if not overrides:
        choices = Study(asked.space, search).ask(min(asked.n_jobs, asked.n_trials))
        overrides = [choice.overrides for choice in choices]
    size = "" if asked.space.size is None else f", from {asked.space.size:,} combinations"
    note = f"a search: the default and {len(overrides)} of {asked.n_trials} trials{size}; results choose the others"
    return [asked.fixed, *([*asked.fixed, *one] for one in overrides)], note


def run(this: Multirun) -> None:
    """Run a search in the folder of a multirun, or continue the one that is there.

    Raises:
        ValueError: a mistake in it; a search over something else in the folder; an objective that no trial records.
        UnavailableError: Optuna is not installed.
        OSError: a record cannot be written.
        KeyboardInterrupt: Ctrl-C, after what was there was written.
    """
    from moe_lab.sweep.study import Study

    asked, search = begin(this.composer, this.directory)
    study = Study(asked.space, asked.search)
    if search.trials:
        search, default, outcomes, goes_on = _run(this, asked, search, search.trials, "of the trials so far")
        _require_values(default, outcomes, this.directory)
        for _, batch in groupby(search.trials, key=lambda trial: trial.batch):
            trials = list(batch)
            study.repeat(trials)
            study.tell([outcomes[trial.number] for trial in trials])
        if not goes_on:
            return
    while (n := min(asked.n_jobs, asked.n_trials - len(search.trials))) > 0:
        first, number = len(search.trials), search.trials[-1].batch + 1 if search.trials else 0
        choices = study.ask(n)
        if not choices:
            this.progress.say(f"search: the space is exhausted, no combination is left beside the {first} tried")
            return
        trials = [Trial(first + at, number, choice.params, choice.overrides) for at, choice in enumerate(choices)]
        last = first + len(trials)
        which = f"trial {last}" if len(trials) == 1 else f"trials {first + 1} to {last}"
        how = f"{which} of {asked.n_trials}"
        search, default, outcomes, goes_on = _run(this, asked, search, trials, how)
        if number == 0:
            _require_values(default, outcomes, this.directory)
        study.tell(outcomes)
        if not goes_on:
            return


def _run(
    this: Multirun, asked: Asked, search: Search, trials: Sequence[Trial], how: str
) -> tuple[Search, Outcome, list[Outcome], bool]:
    """Run a batch, or the trials of an earlier session.

    Returns the search with these trials, what became of the default and of each trial, and whether the search goes on.
    """
    before = search.trials[: trials[0].number]
    added = this.prepare([asked.fixed, *map(asked.job, trials)], len(before), f", {how}")
    _require_default(search, added)
    cell_ids = added.jobs[1:]
    known = [replace(trial, cell_id=cell_id) for trial, cell_id in zip(trials, cell_ids, strict=True)]
    search = replace(search, trials=[*before, *known])
    search.write(this.directory)
    records = this.execute(added)
    default, *outcomes = [_outcome(search, records.get(cell_id)) for cell_id in added.jobs]
    return search, default, outcomes, _goes_on(added, records)


def _outcome(search: Search, record: Record | None) -> Outcome:
    return search.outcome(None if record is None else searches.row_of(record))


def _goes_on(added: Plan, records: dict[str, Record]) -> bool:
    is_failed = any(record.status == "failed" for record in records.values())
    return not (added.sweep["fail_fast"] and is_failed)


def _require_values(default: Outcome, outcomes: Sequence[Outcome], directory: Path) -> None:
    """Raise `ValueError` if trials ran and none has a value that is asked for; their records are kept."""
    lacking = {outcome.reason for outcome in outcomes if (outcome.reason or "").startswith(_LACKS)}
    if lacking and not any(outcome.values for outcome in outcomes):
        (directory / FILE).unlink()  # so that it can be begun again with another column
        column = sorted(map(str, lacking))[0].removeprefix(_LACKS)
        if column == RATIO:
            if default.state in ("failed", "not run"):
                raise ValueError(_without_default(default.reason or default.state, "change it so that it runs"))
            hint = "they were timed without the default; use another sweep.name, or choose latency_ms"
            raise ValueError(f"{_NODE}: no trial has recorded {column}; {hint}.")
        hint = "needs workload=text and a checkpoint" if column.startswith("quality.") else "choose another column"
        raise ValueError(f"{_NODE}: no trial has recorded {column}; {hint}.")


def _require_default(search: Search, added: Plan) -> None:
    """Raise `ValueError` before trials are timed if a ratio to the default is asked for, which will not run."""
    (default,) = (cell for cell in added.cells if cell.cell_id == added.jobs[0])
    if RATIO in search.columns and default.status in ("skipped", "excluded"):
        remedy = "leave it out of sweep.exclude" if default.status == "excluded" else "change it so that it runs"
        raise ValueError(_without_default(default.reason or default.status, remedy))


def _without_default(why: str, remedy: str) -> str:
    default = f"the default has no result ({why.rstrip('.')})"
    return f"{_NODE}: no trial has {RATIO}, for {default}; {remedy}, or use latency_ms."


def _journal(directory: Path, asked: Search) -> Search:
    """The search that is in the folder, or this one without a trial."""
    try:
        found = searches.read(directory)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{directory / FILE}: cannot be read ({error}); use another sweep.name.") from error
    if found is None:
        return asked
    for key in ("default", "objectives", "constraints", "space", "sampler", "population", "seed"):
        mine, theirs = getattr(asked, key), getattr(found, key)
        if mine != theirs:
            is_typed = key in ("sampler", "population", "seed")
            how = f"has {_NODE}.{key}={theirs}, this one {mine}" if is_typed else f"differs in {key}"
            raise ValueError(
                f"{directory}: the search there {how}, and a search goes on as it began; "
                "give this one a name of its own: sweep.name=NAME."
            )
    return found
