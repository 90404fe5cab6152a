"""Between Hydra and a sweep: the present multirun of this process, whatever the launcher."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf, open_dict

from moe_lab.config import checks, entries, experiments, many_compositions
from moe_lab.config.unread import key_of
from moe_lab.errors import UnavailableError
from moe_lab.records import files, store, variants
from moe_lab.records.schema import NOT_ENDED, Record
from moe_lab.sweep import places, session
from moe_lab.sweep import plan as planning
from moe_lab.sweep.engine import Engine, Worker, WorkerLostError
from moe_lab.sweep.in_process import InProcess
from moe_lab.sweep.kinds import Kinds
from moe_lab.sweep.lock import LOCK, OWNER, Lock
from moe_lab.sweep.plan import Plan
from moe_lab.sweep.session import Progress
from moe_lab.sweep.standing import FOLDER
from moe_lab.trackers.outbox import Outbox

if TYPE_CHECKING:
    from moe_lab.sweep.pool import Pool

LOG = "worker.log"
current: Multirun | None = None


class Multirun:
    """One sweep folder, locked, with an engine that starts while Hydra composes."""

    def __init__(self, loader: ConfigLoader, config: DictConfig, progress: Progress, words: list[str]):
        checks.validate_sweep(config)  # slots are opened before a job is composed
        require_cells(loader, config)  # Hydra would compose all of them first
        self.composer, self.progress = JobComposer(loader, config), progress
        self.directory, self.words = Path(config.hydra.sweep.dir), words
        self.outbox = Outbox(config.tracker, self.directory, is_sweep=True)
        self.plan: Plan | None = None
        self._made = store.missing_folders(self.directory)
        self._lock = Lock(self.directory)
        left = self.directory / "multirun.yaml"  # Hydra writes it, and follows links, and waits for who reads a pipe
        if left.is_symlink():
            left.unlink()
        elif left.exists() and not left.is_file():
            files.set_aside(left)
        self.pool: Pool | None = None
        self.engine: Engine = InProcess()
        if places.has_slots(config.sweep):
            try:
                self.pool = places.open_pool(config.sweep, self.directory, progress.say)
            except BaseException:
                self.close()
                raise
        elif config.sweep.worker:
            worker = Worker(self.directory / LOG)
            worker.start()
            self.engine = worker
        self.asked = Kinds(self.pool or places.OnlyOne(self.engine), config.sweep.require)

    def run(self, job_overrides: Sequence[Sequence[str]], first_number: int) -> list[float]:
        """Plan and run the jobs; the median latency of each (ms), NaN where there is none."""
        added = self.prepare(job_overrides, first_number)
        records = self.execute(added)
        return [_p50(records.get(cell_id)) for cell_id in added.jobs]

    def prepare(self, job_overrides: Sequence[Sequence[str]], first_number: int, how: str | None = None) -> Plan:
        """Plan the jobs and write the plan of all so far; `how` they are run is said in the line about them."""
        added = self._make(self.composer.jobs(job_overrides, first_number), is_first=self.plan is None)
        self.plan = added if self.plan is None else _joined(self.plan, added)
        session.write_plan(self.plan)
        self.progress.announce(self.plan, how)
        if added.to_run():
            self.outbox.begin(self.progress.say)
        return added

    def execute(self, added: Plan) -> dict[str, Record]:
        """Run what was prepared; the records of its cells."""
        if self.pool is not None:
            from moe_lab.sweep import spread

            # Some slot is always timing, so records are sent when all have ended (`send_records`).
            done = spread.execute(added, self.pool, self.progress)
        else:
            done = session.execute(added, self.engine, self.progress, self.outbox)
        return {record.cell_id: record for record in done}

    def announce(self, how: str) -> None:
        """Plan only: another launcher runs the jobs, `how` says in what way."""
        self.plan = self._make(self.composer.jobs(expand(self.composer.loader, self.composer.config)))
        self.engine.close()
        session.write_plan(self.plan)
        self.progress.announce(self.plan, how)

    def _make(self, jobs: Iterator[tuple[DictConfig, list[str], Path]], *, is_first: bool = True) -> Plan:
        try:
            typed = self.composer.typed if is_first else None
            plan = planning.make(jobs, self.directory, self.asked, self.words, typed, self.composer.of_experiment)
        except WorkerLostError as lost:
            raise UnavailableError(f"the worker process could not start ({lost}); see {self.directory / LOG}") from lost
        plan.kinds = self.asked.content() if self.pool is not None else []
        return plan

    def records(self) -> list[Record]:
        """What is known of every cell."""
        return session.records(self.plan.cells) if self.plan is not None else []

    def send_records(self) -> None:
        """Send the trackers what they have not got, when nothing runs; before the tables, which show the warnings."""
        if self.plan is not None:
            self.outbox.send([cell.directory for cell in self.plan.cells], self.progress.say, is_last=True)

    def send_files(self) -> None:
        """Send the trackers the tables, the plots and the page."""
        if self.plan is not None:
            have_ended = [not (record.reason or "").startswith(NOT_ENDED) for record in self.records()]
            self.outbox.end(self.progress.say, is_complete=have_ended == [True] * len(self.plan.cells))

    def close(self) -> None:
        """End the worker and give the folder free. Without a plan nothing happened, and nothing is left behind."""
        self.engine.close()
        if self.pool is not None:
            self.pool.close()
        self._lock.release()
        if self.plan is None:
            with suppress(OSError):  # there is more in it: results of an earlier sweep; or it became read-only
                for log in (self.directory / FOLDER).glob("*.log"):
                    log.unlink()
                store.remove_empty([self.directory / FOLDER])
                for name in (LOCK, OWNER, "multirun.yaml"):
                    (self.directory / name).unlink(missing_ok=True)
                log = self.directory / LOG
                if log.is_file() and not log.stat().st_size:
                    log.unlink()
                store.remove_empty([self.directory, *self._made])


def begin(loader: ConfigLoader, config: DictConfig, progress: Progress, words: list[str] | None = None) -> Multirun:
    """The multirun of this process, begun with Hydra's master configuration. Raises `ValueError` if it is locked.

    `words` are the command that runs it again; None: the one that was typed.
    """
    global current
    assert current is None
    current = Multirun(loader, config, progress, words or command())
    return current


def end() -> None:
    """Close the present multirun, if there is one."""
    global current
    if current is not None:
        current.close()
        current = None


def command() -> list[str]:
    """What was typed, to be typed again."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


class JobComposer:
    """Composes the jobs of a multirun; what the sweeper composed to validate them is not composed again.

    Hydra's sweepers throw that away, and it is half of the work.
    """

    def __init__(self, loader: ConfigLoader, config: DictConfig):
        self.loader, self.config = loader, config
        many_compositions.remember(loader, in_a_sweep=True)
        self._compose = loader.load_sweep_config
        self._validated: dict[tuple[str, ...], DictConfig] = {}
        loader.load_sweep_config = self._remember  # type: ignore[method-assign]
        self.typed = {key_of(override) for override in config.hydra.overrides.task}
        """The keys that the person set, not an experiment."""
        self.of_experiment = experiments.set_by(loader, config.hydra)
        """`key=value` of what the experiment's own file sets, its sweep aside."""
        if entries.KEY in self.typed:
            self.typed |= entries.keys_of(entries.overrides_of(config.sweep.variants, may_have_axes=True))

    def _remember(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        composed = self._compose(master_config, sweep_overrides)
        self._validated[tuple(sweep_overrides)] = composed
        return composed

    def jobs(
        self, job_overrides: Sequence[Sequence[str]], first_number: int = 0
    ) -> Iterator[tuple[DictConfig, list[str], Path]]:
        """(configuration, its overrides, its folder) of each job. Raises `ValueError` if there is none."""
        if not job_overrides:  # of another sweeper than Hydra's basic one
            raise ValueError(
                f"hydra.sweeper={self.config.hydra.sweeper._target_}: made no cell; leave hydra/sweeper out."
            )
        for number, overrides in enumerate(job_overrides, start=first_number):
            composed = self._validated.pop(tuple(overrides), None)
            if composed is None:
                composed = self._compose(self.config, list(overrides))
            self._refuse_a_sweep_of_its_own(composed)
            with open_dict(composed):
                composed.hydra.job.id, composed.hydra.job.num = str(number), number
                directory = Path(self.config.hydra.sweep.dir) / str(composed.hydra.sweep.subdir)
                task_overrides = list(composed.hydra.overrides.task)
                del composed["hydra"]
                yield composed, task_overrides, directory

    def _refuse_a_sweep_of_its_own(self, composed: DictConfig) -> None:
        """Raise `ValueError` for what an experiment says of a sweep where it is the experiment of some cells only."""
        keys = [f"sweep.{key}" for key in composed.sweep if composed.sweep[key] != self.config.sweep[key]]
        if entries.KEY in self.typed and entries.KEY in keys:
            keys.remove(entries.KEY)  # it was typed, so that of the experiment does not hold
        if composed.hydra.sweeper != self.config.hydra.sweeper:
            keys.append("hydra.sweeper")
        if composed.tracker != self.config.tracker:
            keys.append("tracker")
        if keys:
            raise ValueError(
                f"{keys[0]}: has no effect in an experiment that only some cells have (an axis, or in an entry of "
                f"{entries.KEY}); choose experiment={composed.hydra.runtime.choices.experiment} for the whole sweep."
            )


def expand(loader: ConfigLoader, config: DictConfig) -> list[list[str]]:
    """The overrides of each job: every entry of `sweep.variants` with every combination of the axes.

    Raises:
        ValueError: there is none, or they are more than `sweep.max_cells`; an entry that cannot be read, or sets what
            is set elsewhere.
    """
    require_cells(loader, config)
    chosen, axes = spanned_by(loader, config)
    (jobs,) = BasicSweeper.split_arguments(axes, max_batch_size=None)
    return [[*entry, *job] for entry in chosen or [[]] for job in jobs]


def require_cells(loader: ConfigLoader, config: DictConfig) -> None:
    """Raise `ValueError` if the axes of a master configuration span no cell, or more than `sweep.max_cells`.

    Another sweeper than these chooses its cells itself, and how many.
    """
    if not str(config.hydra.sweeper._target_).endswith((".BasicSweeper", ".MoeLabSweeper")):
        return
    chosen, overrides = spanned_by(loader, config)
    swept = [override for override in overrides if override.is_sweep_override()]
    for axis in swept:
        value = axis.value()
        if isinstance(value, RangeSweep) and not value.step:
            raise ValueError(f"{axis.input_line}: a step of 0 never ends; write {axis.key_or_group}=A,B.")
        if isinstance(value, IntervalSweep):
            raise ValueError(
                f"{axis.input_line}: only a sweeper that optimises reads it; write {axis.key_or_group}=A,B."
            )
    axes = [(axis.key_or_group, _length(axis)) for axis in swept]
    for axis, (key, length) in zip(swept, axes, strict=True):
        if not length:
            known = f"moe-lab list {key} shows the options" if isinstance(axis.value(), Glob) else f"write {key}=A,B"
            raise ValueError(f"{axis.input_line}: no value matches, so the sweep has no cell; {known}.")
    axes = [*([(entries.KEY, len(chosen))] if chosen else []), *axes]
    if config.sweep.max_cells < 1:
        raise ValueError(f"sweep.max_cells={config.sweep.max_cells}: must be a number >= 1.")
    n_cells, most = math.prod(length for _, length in axes), config.sweep.max_cells
    if n_cells > most:
        spanned = " * ".join(f"{length:,} of {key}" for key, length in axes)
        raise ValueError(
            f"sweep.max_cells={most}: these are {n_cells:,} cells ({spanned}); shorten an axis or set "
            f"sweep.max_cells={n_cells}."
        )


def spanned_by(
    loader: ConfigLoader, config: DictConfig, *, may_have_axes: bool = False
) -> tuple[list[list[str]], list[Override]]:
    """The entries of `sweep.variants`, and the other overrides, axes among them.

    What is typed holds: entries over the axis of an experiment that is a key of all of them, and a key over all entries
    of an experiment if all of them set it. In a search the entries may have axes too.
    """
    chosen = entries.overrides_of(config.sweep.variants, may_have_axes=may_have_axes)
    typed = list(config.hydra.overrides.task)
    others = {}
    for override in _overrides(loader, config):
        line = str(override.input_line)
        if (key := key_of(line)).partition(".")[0] == "tracker" and override.is_sweep_override():
            several = f"several trackers are {key}=[A,B]" if key == "tracker" else "choose one value"
            raise ValueError(f"{line}: not an axis, for every cell is sent to the same place; {several}.")
        if key != entries.KEY:
            others[override.get_key_element()] = override
        elif override.is_sweep_override() or line not in typed:
            raise ValueError(f"{line}: not an axis; type one list of entries, or write it in a YAML file under sweep.")
    in_all = set.intersection(*(entries.keys_of([entry]) for entry in chosen or [[]]))
    if entries.KEY in (typed_keys := {key_of(line) for line in typed}):
        others = {k: o for k, o in others.items() if o.input_line in typed or key_of(str(o.input_line)) not in in_all}
    elif in_all & typed_keys:
        chosen = []
    entries.refuse_keys_given_twice(chosen, list(others.values()))
    return chosen, list(others.values())


def _overrides(loader: ConfigLoader, config: DictConfig) -> list[Override]:
    params: dict[str, Any] = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}))  # type: ignore[assignment]
    arguments = [f"{key}={value}" for key, value in params.items()]
    arguments += list(config.hydra.overrides.task)
    return OverridesParser.create(config_loader=loader).parse_overrides(arguments)


def _length(axis: Override) -> int:
    """How many values an axis has; those of a range are not made to count them."""
    value = axis.value()
    if isinstance(value, RangeSweep):
        start, stop, step = (float(number) for number in (value.start or 0, value.stop or 0, value.step))
        return max(0, math.ceil((stop - start) / step))
    return sum(1 for _ in axis.sweep_string_iterator())


def _joined(before: Plan, added: Plan) -> Plan:
    """A sweeper that optimises launches several batches: what was to run has run, and all have names of one kind."""
    for cell in before.to_run():
        record = store.find_record(cell.directory)
        if record is not None:
            cell.status, cell.is_ok = "done", record.status == "ok"
    known = {cell.cell_id for cell in before.cells}
    before.cells += [cell for cell in added.cells if cell.cell_id not in known]
    before.n_equal += added.n_equal
    contents = [cell.content for cell in before.cells]
    for cell, label in zip(before.cells, variants.labels(contents, before.sweep["compare"]), strict=True):
        cell.variant = label
    return before


def _p50(record: Record | None) -> float:
    return record.latency_ms.p50 if record is not None and record.latency_ms is not None else math.nan
