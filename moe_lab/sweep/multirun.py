"""Between Hydra and a sweep: the present multirun of this process, whatever the launcher."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf, open_dict

from moe_lab.errors import UnavailableError
from moe_lab.records.schema import Record
from moe_lab.sweep import plan as planning
from moe_lab.sweep import session
from moe_lab.sweep.engine import Engine, Worker, WorkerLostError
from moe_lab.sweep.in_process import InProcess
from moe_lab.sweep.lock import LOCK, OWNER, Lock
from moe_lab.sweep.plan import Plan
from moe_lab.sweep.session import Progress

LOG = "worker.log"
current: Multirun | None = None


class Multirun:
    """One sweep folder, locked, with an engine that starts while Hydra composes."""

    def __init__(self, loader: ConfigLoader, config: DictConfig, progress: Progress):
        self.composer, self.progress = JobComposer(loader, config), progress
        self.directory = Path(config.hydra.sweep.dir)
        self.plan: Plan | None = None
        self._lock = Lock(self.directory)
        self.engine: Engine = InProcess()
        if config.sweep.worker:
            worker = Worker(self.directory / LOG)
            worker.start()
            self.engine = worker

    def run(self, job_overrides: Sequence[Sequence[str]], first_number: int) -> list[float]:
        """Plan and run the jobs; the median latency of each (ms), NaN where there is none."""
        added = self._make(self.composer.jobs(job_overrides, first_number), is_whole_sweep=self.plan is None)
        self.plan = added if self.plan is None else _joined(self.plan, added)
        session.write_plan(self.plan)
        self.progress.announce(self.plan)
        records = {record.cell_id: record for record in session.execute(added, self.engine, self.progress)}
        return [_p50(records.get(cell_id)) for cell_id in added.jobs]

    def announce(self, how: str) -> None:
        """Plan only: another launcher runs the jobs, `how` says in what way."""
        self.plan = self._make(self.composer.jobs(expand(self.composer.loader, self.composer.config)))
        self.engine.close()
        session.write_plan(self.plan)
        self.progress.announce(self.plan, how)

    def _make(self, jobs: Iterator[tuple[DictConfig, list[str], Path]], *, is_whole_sweep: bool = True) -> Plan:
        try:
            return planning.make(jobs, self.directory, self.engine, command(), is_whole_sweep=is_whole_sweep)
        except WorkerLostError as lost:
            raise UnavailableError(f"the worker process could not start ({lost}); see {self.directory / LOG}") from lost

    def records(self) -> list[Record]:
        """What is known of every cell."""
        return session.records(self.plan.cells) if self.plan is not None else []

    def close(self) -> None:
        """End the worker and give the folder free. Without a plan nothing happened, and nothing is left behind."""
        self.engine.close()
        self._lock.release()
        if self.plan is None:
            for name in (LOCK, OWNER, "multirun.yaml"):
                (self.directory / name).unlink(missing_ok=True)
            log = self.directory / LOG
            if log.exists() and not log.stat().st_size:
                log.unlink()
            with suppress(OSError):  # there is more in it: results of an earlier sweep
                self.directory.rmdir()


def begin(loader: ConfigLoader, config: DictConfig, progress: Progress) -> Multirun:
    """The multirun of this process, begun with Hydra's master configuration. Raises `ValueError` if it is locked."""
    global current
    assert current is None
    current = Multirun(loader, config, progress)
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

    Hydra's sweepers throw that away, and it is half of the work. And every job would read the same files anew.
    """

    def __init__(self, loader: ConfigLoader, config: DictConfig):
        self.loader, self.config = loader, config
        loader.repository = _remembering(loader.get_search_path())  # type: ignore[attr-defined]
        self._compose = loader.load_sweep_config
        self._validated: dict[tuple[str, ...], DictConfig] = {}
        loader.load_sweep_config = self._remember  # type: ignore[method-assign]

    def _remember(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        composed = self._compose(master_config, sweep_overrides)
        self._validated[tuple(sweep_overrides)] = composed
        return composed

    def jobs(
        self, job_overrides: Sequence[Sequence[str]], first_number: int = 0
    ) -> Iterator[tuple[DictConfig, list[str], Path]]:
        """(configuration, its overrides, its folder) of each job."""
        for number, overrides in enumerate(job_overrides, start=first_number):
            composed = self._validated.pop(tuple(overrides), None)
            if composed is None:
                composed = self._compose(self.config, list(overrides))
            with open_dict(composed):
                composed.hydra.job.id, composed.hydra.job.num = str(number), number
                directory = Path(self.config.hydra.sweep.dir) / str(composed.hydra.sweep.subdir)
                task_overrides = list(composed.hydra.overrides.task)
                del composed["hydra"]
                yield composed, task_overrides, directory


def _remembering(search_path: ConfigSearchPath) -> ConfigRepository:
    """A repository whose copies read every file once in all: Hydra takes a copy for each job."""
    loaded: dict[tuple[str, ...], ConfigResult | None] = {}

    class Repository(ConfigRepository):
        def load_config(self, config_path: str) -> ConfigResult | None:
            key = config_path, *(source.path for source in self.sources)
            if key not in loaded:
                loaded[key] = super().load_config(config_path)
            return copy.deepcopy(loaded[key])

    return Repository(search_path)


def expand(loader: ConfigLoader, config: DictConfig) -> list[list[str]]:
    """The overrides of each job that Hydra's basic sweeper makes of a master configuration."""
    params: dict[str, Any] = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}))  # type: ignore[assignment]
    arguments = [f"{key}={value}" for key, value in params.items()]
    arguments += list(config.hydra.overrides.task)
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return jobs


def _joined(before: Plan, added: Plan) -> Plan:
    """A sweeper that optimises launches several batches."""
    known = {cell.cell_id for cell in before.cells}
    before.cells += [cell for cell in added.cells if cell.cell_id not in known]
    before.n_equal += added.n_equal
    return before


def _p50(record: Record | None) -> float:
    return record.latency_ms.p50 if record is not None and record.latency_ms is not None else math.nan
