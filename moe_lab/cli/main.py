"""`moe-lab`: a plain Hydra application with one-line errors and exit codes.

Exit codes: 0 all ok, or some ok and the others skipped; 1 a run failed; 2 the person's input, or an implementation or a
device that is not there; 130 Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from moe_lab.cli import completion, foreign, listing, typed
from moe_lab.cli.commands import COMMANDS
from moe_lab.cli.help import help_text
from moe_lab.config import experiments, targets
from moe_lab.config.checks import refuse_hydras_keys
from moe_lab.config.compose import CONFIG_MODULE, config_loader, finish, name_sweep
from moe_lab.config.hydra_patches import VERSION_BASE, register, register_plugins
from moe_lab.config.mistakes import explain
from moe_lab.config.unread import unread
from moe_lab.records import inputs, store
from moe_lab.records.schema import Record
from moe_lab.terminal import Filtered
from moe_lab.trackers.outbox import Outbox

OK, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
_FULL_ERROR = "HYDRA_FULL_ERROR"

_records: list[Record] = []
_mistakes: list[Exception] = []


def _task(cfg: DictConfig, trusted: Sequence[str], environment: Mapping[str, str]) -> float | None:
    """Hydra's job: run, keep the record for the table, return the median latency (for sweepers that optimise).

    It never raises an ordinary error: Hydra would print it in its own manner, and a launcher might drop other jobs.
    In a multirun it is called under launchers other than ours, whose processes know neither the trusted folders nor the
    environment (numbers of threads) of this one.
    """
    hydra_config = HydraConfig.get()
    directory = Path(hydra_config.runtime.output_dir)
    overrides = list(hydra_config.overrides.task)
    try:
        for folder in trusted:
            targets.trust(folder)
        if hydra_config.mode == RunMode.MULTIRUN:
            record = foreign.run_job(cfg, overrides, directory, environment)
        else:
            refuse_hydras_keys(hydra_config.overrides.hydra, in_a_sweep=False)
            cfg = finish(cfg, overrides)
            for line in unread(cfg, experiments.set_by(config_loader(), hydra_config), in_a_sweep=False).values():
                _say(line)
            inputs.require(cfg)
            _say_what_takes_long()
            outbox = Outbox(cfg.tracker, directory, is_sweep=False)
            from moe_lab.runs.run import run  # imports torch: not before there is something to compute

            record = run(cfg, directory)
            outbox.send([directory], _say, is_last=True)
            if outbox.names:
                record.warnings = store.read_record(directory).warnings  # with what the trackers did not get
            _records.append(record)
    except Exception as error:  # a run's failure is a record: this is a configuration that does not make a run
        _mistakes.append(error)
        _remove_if_empty(directory)
        return None
    return record.latency_ms.p50 if record is not None and record.latency_ms is not None else None


def _say(text: str) -> None:
    print(f"moe-lab: {text}", file=sys.stderr)


def _say_what_takes_long() -> None:
    """Two logs on standard error: that the extension is built, which takes a minute, and that a run waits."""
    for name in ("moe_lab.extension", "moe_lab.waiting"):
        log = logging.getLogger(name)
        if not log.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("moe-lab: %(message)s"))
            log.addHandler(handler)


def _remove_if_empty(directory: Path) -> None:
    """Hydra made the run's directory before anybody looked at the configuration; a mistake leaves none behind."""
    if [path.name for path in directory.glob("*")] in ([], [".hydra"]):
        shutil.rmtree(directory, ignore_errors=True)
        store.remove_empty(foreign.made)


def _report(errors: Sequence[BaseException], wants_traceback: bool) -> None:
    """One line for each different mistake, or their tracebacks."""
    if wants_traceback:
        for error in errors:
            traceback.print_exception(error)
    else:
        for line in dict.fromkeys(explain(error) for error in errors):
            print(f"moe-lab: {line}", file=sys.stderr)


def _of_the_results_folder(error: Exception, arguments: Sequence[str]) -> Exception:
    """With the key and the remedy, if the folder for the results is what could not be made."""
    given = [word.partition("=")[::2] for word in arguments if word.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
    usual = "hydra.sweep.dir" if {"-m", "--multirun"} & set(arguments) else "hydra.run.dir"
    key, folder = given[-1] if given else (usual, "outputs")
    if not isinstance(error, OSError) or not str(error.filename).startswith(folder):
        return error
    text = f"{key}={folder}: {error.filename}: {error.strerror}; choose another folder for the results."
    return ValueError(text).with_traceback(error.__traceback__)


def _words() -> dict[str, list[str]]:
    """The commands and what may stand behind them."""
    options = {
        "report": ["--plotly", "--tables"],
        "plot": ["--by", "--dpi", "--font", "--font-size", "--format", "--log", "--output", "--size"],
        "trace": ["--config-dir", "--logits", "--out", "--to", "--tokens"],
        "import": [
            "bench_moe",
            "llama_cpp",
            "parquet",
            "routing_npz",
            "sglang",
            "vllm",
            "--n-experts",
            "--out",
            "--top-k",
        ],
        "analyze": ["--cfg"],
        "export": ["--config-dir", "--open", "--verify"],
        "list": ["--json", *listing.groups(None)],
        "doctor": ["--json", "--noise", "--rates"],
        "build": ["--arch"],
        "clean": ["--failed", "--stale", "--older-than", "--remove"],
    }
    return {name: options.get(name, []) for name in COMMANDS}


def _show(*, sends: bool = True) -> None:
    """The table of what ran; of a sweep also its files. `sends` them, and what is left of the records, to trackers."""
    multirun = sys.modules.get("moe_lab.sweep.multirun")
    sweep = multirun.current if multirun is not None else None
    if sweep is None and _records:
        from moe_lab.cli.table import print_records

        print_records(_records)
    if sweep is not None and sweep.plan is not None:
        from moe_lab.cli.table import print_sweep
        from moe_lab.results import outputs

        if sends:
            sweep.send_records()
        _records.extend(sweep.records())
        print_sweep(_records, sweep.plan.sweep["compare"], sweep.plan.sweep["anchor"])
        outputs.write(sweep.directory, with_report=sweep.plan.sweep["report"])
        outputs.say(sweep.directory)
        if sends:
            sweep.send_files()
    if exports := [record.export for record in _records if record.status == "ok" and record.export is not None]:
        from moe_lab.cli.export import words_of_all

        print(words_of_all(exports))


def _end_multirun() -> None:
    multirun = sys.modules.get("moe_lab.sweep.multirun")
    if multirun is not None:
        try:
            multirun.end()
        except KeyboardInterrupt:  # halfway: the rest is to end, too
            multirun.end()


def main(argv: list[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Filtered(sys.stdout), Filtered(sys.stderr)
    try:
        return _main(argv)
    finally:
        sys.stdout, sys.stderr = streams


def _compose_and_run(arguments: Sequence[str]) -> None:
    """What Hydra's language asks for: text about a configuration, a run, or a multirun and its table."""
    if "--version" in arguments:
        print(typed.versions())
        return
    words = typed.read(arguments, COMMANDS)
    config_dir: str | None = words.given.config_dir
    if words.given.help:
        print(help_text(words.overrides, config_dir), end="")
        return
    if config_dir is not None:
        targets.trust(config_dir)
    sys.argv[1:] = words.words()
    name_sweep(words.overrides)
    register_plugins()
    trusted, environment = targets.trusted(), dict(os.environ)

    def task(cfg: DictConfig) -> float | None:  # pickled with what it refers to, for launchers with processes
        return _task(cfg, trusted, environment)

    path = f"pkg://{CONFIG_MODULE}"
    hydra.main(config_path=path, config_name="config", **VERSION_BASE)(task)()
    _show()


def _main(argv: list[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    sys.argv = [sys.argv[0], *arguments]
    _records.clear()
    _mistakes.clear()
    wants_traceback = os.environ.get(_FULL_ERROR) == "1"
    # Hydra prints errors in its own manner and exits with 1, unless it is told to let them through.
    os.environ[_FULL_ERROR] = "1"
    try:
        register()
        if arguments and arguments[0] in COMMANDS:
            return COMMANDS[arguments[0]](list(arguments[1:]))
        if not ({"-sc", "--shell-completion"} & set(arguments) and completion.complete(_words())):
            _compose_and_run(arguments)
    except KeyboardInterrupt:
        is_command = bool(arguments) and arguments[0] in COMMANDS  # these leave no record
        known = "" if is_command else "; a record that was begun has the results up to this point"
        print(f"moe-lab: interrupted{known}", file=sys.stderr)
        try:
            _show(sends=False)  # nobody who stops a sweep waits for a server; the next run sends it
        except KeyboardInterrupt:
            print("moe-lab: interrupted again, before the tables were written; moe-lab report does it", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # tasks raise nothing: this is a configuration that could not be composed
        _report([_of_the_results_folder(error, arguments)], wants_traceback)
        return MISTAKE
    except foreign.RefusedError as error:
        _report([error.__cause__ or error], wants_traceback)
        return MISTAKE
    finally:
        _end_multirun()
        if not wants_traceback:
            os.environ.pop(_FULL_ERROR, None)
    if _mistakes:
        _report(_mistakes, wants_traceback)
        return MISTAKE
    statuses = {record.status for record in _records}
    if statuses == {"skipped"}:  # as a single run that cannot run here
        is_excluded = {record.reason for record in _records} == {"excluded"}
        why = "every cell is excluded (sweep.exclude)" if is_excluded else "no cell could run (see moe-lab doctor)"
        print(f"moe-lab: {why}", file=sys.stderr)
        return MISTAKE
    return FAILED if "failed" in statuses else OK


if __name__ == "__main__":
    sys.exit(main())
