"""hydra_node.py: an experiment found through a search path runs no code and writes nowhere but in the run's folder.

Each hostile configuration goes through the command line, in this process. `{mark}` is a file that it would make,
`{victim}` one that it would change; `evil` is a module on the path that makes the mark when it is imported.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_lab.cli.main import main
from moe_lab.config import hydra_node
from tests import quick

EVIL = "from pathlib import Path\nPath({mark!r}).write_text('')\nclass Callback: pass\ndef call(*a, **k): pass\n"

HANDLER = "hydra: {{job_logging: {{root: {{handlers: [h]}}, handlers: {{h: {handler}}}}}}}"
FORMATTER = "hydra: {{job_logging: {{root: {{handlers: []}}, formatters: {{f: {formatter}}}}}}}"
FILTER = "hydra: {{job_logging: {{root: {{handlers: []}}, filters: {{f: {filter}}}}}}}"


def log(template: str, **parts: str) -> str:
    """A template with one part; what is left in braces is for `{mark}` and `{victim}`."""
    text = template
    for name, part in parts.items():
        text = text.replace("{" + name + "}", part)
    return text.replace("{{", "{").replace("}}", "}")


HOSTILE = {
    # what runs in a job of Slurm
    "slurm-setup": "sweep: {engine: slurm, slurm: {setup: ['touch {mark}']}}",
    "slurm-python": "sweep: {engine: slurm, slurm: {python: 'touch {mark};'}}",
    "slurm-options": "sweep: {engine: slurm, slurm: {options: {bcast: '{victim}'}}}",
    "slurm-options-interpolated": "x: {prolog: '{victim}'}\nsweep: {slurm: {options: '${x}'}}",
    # hydra.callbacks
    "callback-system": "hydra: {callbacks: {e: {_target_: os.system, command: 'touch {mark}'}}}",
    "callback-popen": "hydra: {callbacks: {e: {_target_: subprocess.Popen, args: [touch, '{mark}']}}}",
    "callback-module": "hydra: {callbacks: {e: {_target_: evil.Callback}}}",
    "callback-write-through-an-import": "hydra: {callbacks: {e: {"
    "_target_: hydra.experimental.callbacks.Path.write_text, "
    "_args_: [{_target_: hydra.experimental.callbacks.Path, _args_: ['{victim}']}, x]}}}",
    "callback-unlink-through-an-import": "hydra: {callbacks: {e: {_target_: hydra.experimental.callbacks.Path.unlink,"
    " _args_: [{_target_: hydra.experimental.callbacks.Path, _args_: ['{victim}']}]}}}",
    "callback-touch": "hydra: {callbacks: {e: {_target_: hydra.experimental.callbacks.Path.touch,"
    " _args_: [{_target_: hydra.experimental.callbacks.Path, _args_: ['{mark}']}]}}}",
    "callback-pickle-load": "hydra: {callbacks: {e: {_target_: hydra.experimental.callbacks.pickle.load}}}",
    "callback-pickle-info": "hydra: {callbacks: {e: {_target_: hydra.experimental.callbacks.PickleJobInfoCallback}}}",
    "callback-internal": "hydra: {callbacks: {e: {_target_: hydra._internal.core_plugins.basic_sweeper.Path.touch}}}",
    "callback-test-utils": "hydra: {callbacks: {e: {_target_: hydra.test_utils.test_utils.run_process,"
    " cmd: [touch, '{mark}']}}}",
    "callback-plugin-prefix": "hydra: {callbacks: {e: {_target_: hydra_plugins.evil.Callback}}}",
    "callback-look-alike": "hydra: {callbacks: {e: {_target_: mоe_lab.cli.foreign.ForeignLauncher}}}",
    "callback-fullwidth": "hydra: {callbacks: {e: {_target_: ｏｓ.system, command: 'touch {mark}'}}}",
    "callback-ours-and-more": "hydra: {callbacks: {e: {_target_: moe_lab.cli.foreign.ForeignLauncher.__init__}}}",
    "callback-import-of-ours": "hydra: {callbacks: {e: {_target_: moe_lab.cli.foreign.Path.touch}}}",
    "callback-interpolated": "debug: {t: os.system}\n"
    "hydra: {callbacks: {e: {_target_: '${debug.t}', command: 'touch {mark}'}}}",
    "callback-node-interpolated": "debug: {e: {_target_: os.system, command: 'touch {mark}'}}\n"
    "hydra: {callbacks: {e: '${debug.e}'}}",
    "callback-created": "hydra: {callbacks: {e: \"${oc.create:'{_target_: os.system, command: touch {mark}}'}\"}}",
    "callback-nested": "hydra: {callbacks: {e: {_target_: moe_lab.cli.foreign.ForeignLauncher,"
    " x: [{y: {_target_: os.system, command: 'touch {mark}'}}]}}}",
    "callback-partial": "hydra: {callbacks: {e: {_target_: os.system, _partial_: true, command: 'touch {mark}'}}}",
    "callback-convert": "hydra: {callbacks: {e: {_target_: builtins.eval, _convert_: all, "
    '_args_: [\'open("{mark}", "w")\']}}}',
    "callback-not-text": "hydra: {callbacks: {e: {_target_: [os, system]}}}",
    "callback-empty": "hydra: {callbacks: {e: {_target_: ''}}}",
    "callback-replaces-ours": "hydra: {callbacks: {other_launchers: {_target_: evil.Callback}}}",
    # hydra.launcher, hydra.sweeper
    "launcher-target": "hydra: {launcher: {_target_: os.system}}",
    "launcher-prefix": "hydra: {launcher: {_target_: hydra_plugins.evil.Launcher}}",
    "launcher-internal": "hydra: {launcher: {_target_: hydra._internal.core_plugins.basic_launcher.Path}}",
    "launcher-nested": "hydra: {launcher: {x: {_target_: os.system, command: 'touch {mark}'}}}",
    "launcher-folder": "defaults:\n  - override /hydra/launcher: joblib\n"
    "hydra: {launcher: {temp_folder: '{victim}.d'}}",
    "launcher-expression": "defaults:\n  - override /hydra/launcher: joblib\n"
    'hydra: {launcher: {pre_dispatch: \'__import__("os").system("touch {mark}")\'}}',
    "sweeper-target": "hydra: {sweeper: {_target_: subprocess.Popen}}",
    "sweeper-nested": "hydra: {sweeper: {sampler: {_target_: os.system, command: 'touch {mark}'}}}",
    "sweeper-params-hydra": "hydra: {mode: MULTIRUN, sweeper: {params: {hydra.run.dir: '{victim}.d', batch: '1,2'}}}",
    "sweeper-params-added": "hydra: {mode: MULTIRUN, sweeper: {params: {+hydra.callbacks.e._target_: evil.Callback}}}",
    "sweeper-params-env": "hydra: {mode: MULTIRUN, sweeper: {params: {+hydra.job.env_set.PATH: /tmp}}}",
    "sweeper-params-group": "hydra: {mode: MULTIRUN, sweeper: {params: {hydra/job_logging: default}}}",
    "sweeper-params-place": "hydra: {mode: MULTIRUN, sweeper: {params: {export.dir: '{victim}.d'}}}",
    "variants-hydra": "hydra: {mode: MULTIRUN}\nsweep: {variants: [{hydra.run.dir: '{victim}.d'}]}",
    "variants-added": "hydra: {mode: MULTIRUN}\nsweep: {variants: [{+hydra.callbacks.e._target_: evil.Callback}]}",
    "variants-place": "hydra: {mode: MULTIRUN}\nsweep: {variants: [{batch: 1}, {++export.dir: '{victim}.d'}]}",
    "sweeper-params-above-a-place": "hydra: {mode: MULTIRUN, sweeper: {params: {sweep: '{{name: ../x}}'}}}",
    # hydra.job, hydra.overrides
    **{
        f"env-{name}": f"hydra: {{job: {{env_set: {{{name}: '{{victim}}.d'}}}}}}"
        for name in ("PATH", "CXX", "LD_PRELOAD", "PYTHONPATH", "TRITON_CACHE_DIR", "HOME", "XDG_CACHE_HOME", "x")
    },
    "env-copy": "hydra: {job: {env_copy: [HOME]}}",
    "env-copy-of-nothing": "hydra: {job: {env_copy: [NO_SUCH_VARIABLE]}}",
    "overrides-hydra": "hydra: {overrides: {hydra: ['hydra.run.dir={victim}.d']}}",
    "overrides-task": "hydra: {mode: MULTIRUN, overrides: {task: ['export.dir={victim}.d']}}",
    "secret": "name: '${oc.env:AWS_SECRET}'",
    "secret-with-default": "name: '${oc.env:GITHUB_TOKEN,none}'",
    "secret-nested": "debug: {v: SSH_AUTH_SOCK}\nname: 'x${oc.env:${debug.v}}'",
    # where files go
    "run-dir": "hydra: {run: {dir: '{victim}.d'}}",
    "run-dir-up": "hydra: {run: {dir: ../../elsewhere}}",
    "run-dir-here": "hydra: {run: {dir: .}}",
    "run-dir-interpolated": "debug: {d: '{victim}.d'}\nhydra: {run: {dir: '${debug.d}'}}",
    "sweep-dir": "hydra: {mode: MULTIRUN, sweep: {dir: '{victim}.d'}}",
    "sweep-subdir": "hydra: {mode: MULTIRUN, sweep: {subdir: ../../../elsewhere}}",
    "sweep-name-up": "hydra: {mode: MULTIRUN}\nsweep: {name: ../elsewhere}",
    "sweep-name-absolute": "hydra: {mode: MULTIRUN}\nsweep: {name: '{victim}.d'}",
    "sweep-name-dots": "hydra: {mode: MULTIRUN}\nsweep: {name: ..}",
    "output-subdir": "hydra: {output_subdir: '{victim}.d'}",
    "output-subdir-up": "hydra: {output_subdir: ../../../elsewhere}",
    "export-dir": "export: {name: netron, dir: '{victim}.d', overwrite: true}",
    # hydra.job_logging, hydra.hydra_logging
    "file": log(HANDLER, handler="{class: logging.FileHandler, filename: '{victim}'}"),
    "file-emptied": log(HANDLER, handler="{class: logging.FileHandler, filename: '{victim}', mode: w}"),
    "file-up": log(HANDLER, handler="{class: logging.FileHandler, filename: '${hydra.runtime.output_dir}/../../../x'}"),
    "file-dots": log(HANDLER, handler="{class: logging.FileHandler, filename: '${hydra.runtime.output_dir}/..'}"),
    "file-beside": log(HANDLER, handler="{class: logging.FileHandler, filename: '${hydra.runtime.output_dir}x/y'}"),
    "file-relative": log(HANDLER, handler="{class: logging.FileHandler, filename: x.log}"),
    "file-job-name": "hydra: {job: {name: ../../../x}, job_logging: {root: {handlers: [h]}, handlers: {h: "
    "{class: logging.FileHandler, filename: '${hydra.runtime.output_dir}/${hydra.job.name}.log'}}}}",
    "file-mode": log(
        HANDLER, handler="{class: logging.FileHandler, filename: '${hydra.runtime.output_dir}/x', mode: r+}"
    ),
    "file-of-hydras-log": "hydra: {hydra_logging: {root: {handlers: [h]}, handlers: {h: {class: logging.FileHandler, "
    "filename: '{victim}', mode: w}}}}",
    "file-interpolated": "debug: {f: '{victim}'}\n"
    + log(HANDLER, handler="{class: logging.FileHandler, filename: '${debug.f}', mode: w}"),
    "class-interpolated": "debug: {c: evil.Callback}\n" + log(HANDLER, handler="{class: '${debug.c}'}"),
    "rotating": log(HANDLER, handler="{class: logging.handlers.RotatingFileHandler, filename: '{victim}'}"),
    "watched": log(HANDLER, handler="{class: logging.handlers.WatchedFileHandler, filename: '{victim}'}"),
    "socket": log(HANDLER, handler="{class: logging.handlers.SocketHandler, host: localhost, port: 9}"),
    "smtp": log(HANDLER, handler="{class: logging.handlers.SMTPHandler, mailhost: localhost}"),
    "handler-factory": log(HANDLER, handler="{(): os.system, command: 'touch {mark}'}"),
    "handler-factory-of-hydra": log(
        HANDLER, handler="{(): hydra.test_utils.test_utils.run_process, cmd: [touch, '{mark}']}"
    ),
    "handler-module": log(HANDLER, handler="{class: evil.Callback}"),
    "handler-prefix": log(HANDLER, handler="{class: logging.os.system}"),
    "handler-attribute": log(HANDLER, handler="{class: logging.StreamHandler, '.': {x: y}}"),
    "handler-stream": log(HANDLER, handler="{class: logging.StreamHandler, stream: 'ext://evil.call'}"),
    "handler-stream-attribute": log(HANDLER, handler="{class: logging.StreamHandler, stream: 'ext://sys.modules'}"),
    "handler-level-external": log(HANDLER, handler="{class: logging.StreamHandler, level: 'ext://evil.call'}"),
    "handler-level-config": log(HANDLER, handler="{class: logging.StreamHandler, level: 'cfg://handlers.h'}"),
    "formatter-factory": log(FORMATTER, formatter="{(): os.system, command: 'touch {mark}'}"),
    "formatter-class": log(FORMATTER, formatter="{class: evil.Callback}"),
    "formatter-prefix": log(FORMATTER, formatter="{(): hydra.core.utils.Path, fmt: x}"),
    "formatter-colorlog": log(FORMATTER, formatter="{(): colorlog.sys.exit}"),
    "formatter-external": log(FORMATTER, formatter="{format: 'ext://evil.call'}"),
    "filter-factory": log(FILTER, filter="{(): subprocess.Popen, args: [touch, '{mark}']}"),
    "filter-class": log(FILTER, filter="{class: evil.Callback}"),
    "root-external": "hydra: {job_logging: {root: {handlers: ['ext://evil.call']}}}",
    "logger-external": "hydra: {job_logging: {root: {handlers: []}, loggers: {x: {level: 'ext://evil.call'}}}}",
    "log-key": "hydra: {job_logging: {root: {handlers: []}, evil: {(): evil.call}}}",
    "hydras-log": "hydra: {hydra_logging: {root: {handlers: [h]}, "
    "handlers: {h: {(): os.system, command: 'touch {mark}'}}}}",
    # the application's own nodes
    "router": "router: {_target_: evil.call}",
    "app-router-through-an-import": "router: {_target_: moe_lab.routers.base.torch.load}",
    "app-router-imported": "router: {_target_: moe_lab.models.checkpoint_weights.Path}",
    "model": "model: {_target_: torch.hub.load}",
    "experts-nested": "experts: {x: {_target_: os.system, command: 'touch {mark}'}}",
}


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """A hostile configuration that came through would leave its handlers behind."""
    handlers, level = list(logging.root.handlers), logging.root.level
    yield
    logging.root.handlers[:], logging.root.level = handlers, level


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, beside what a stranger gave and what must stay as it is."""
    for name in ("work", "there/experiment", "victim"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "victim" / "file").write_text("precious")
    (tmp_path / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "victim" / "mark")))
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["moe-lab"])
    for name in ("AWS_SECRET", "GITHUB_TOKEN", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "hunter2")
    return tmp_path


def write(place: Path, content: str) -> list[str]:
    """The arguments that find the experiment `content`."""
    for name, path in (("{mark}", place / "victim" / "mark"), ("{victim}", place / "victim" / "file")):
        content = content.replace(name, str(path))
    (place / "there" / "experiment" / "x.yaml").write_text(f"# @package _global_\n{content}\n")
    return [f"hydra.searchpath=[file://{place}/there]", "experiment=x", *quick.overrides("moe_layer")]


def everything(place: Path) -> dict[str, str]:
    """What lies outside the working directory, and what a run left in it."""
    files = (path for path in place.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(place)): path.read_text() for path in files}


# One for each check of hydra_node, and of each family of names: all of them take a minute.
QUICK = {
    *("slurm-setup", "callback-system", "callback-nested", "callback-interpolated", "callback-ours-and-more"),
    *("launcher-target", "launcher-folder", "sweeper-target", "sweeper-nested", "sweeper-params-hydra"),
    *("sweeper-params-above-a-place", "variants-place", "env-PATH", "env-copy", "overrides-hydra", "overrides-task"),
    *("secret", "run-dir", "sweep-dir", "sweep-subdir", "sweep-name-up", "sweep-name-absolute", "output-subdir"),
    *("export-dir", "file", "file-of-hydras-log", "file-mode", "class-interpolated", "rotating", "watched", "socket"),
    *("smtp", "handler-factory", "handler-stream", "handler-level-external", "formatter-class", "filter-factory"),
    *("root-external", "logger-external", "log-key", "hydras-log", "router", "app-router-imported", "model"),
    "experts-nested",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, id=name, marks=() if name in QUICK else pytest.mark.slow) for name in HOSTILE]
)
def test_a_hostile_experiment_is_one_line_and_nothing_happens(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2; no file is made, changed or gone; no secret is printed."""
    arguments = write(place, HOSTILE[name])
    before = everything(place)
    code = main(arguments)
    said = capsys.readouterr()
    assert code == 2, said.out
    assert said.out == "" and len(said.err.splitlines()) == 1 and said.err.startswith("moe-lab: ")
    assert "hunter2" not in said.err
    after = everything(place)
    if not name.startswith("app-"):  # these are found when the run is built, and it has a folder by then
        assert after == before
    assert {path: text for path, text in after.items() if not path.startswith("work/outputs/runs/")} == before
    assert "evil" not in sys.modules


def test_there_are_many() -> None:
    """The list is the promise of SECURITY.md; of each family one is among the fast tests."""
    assert len(HOSTILE) >= 60
    assert {name.partition("-")[0] for name in QUICK} == {name.partition("-")[0] for name in HOSTILE}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["hydra.searchpath=[pkg://evil]"], id="search-path"),
        pytest.param(["hydra.searchpath=[pkg://evil/conf]"], id="search-path-below"),
        pytest.param(["--config-path", "pkg://evil"], id="config-path"),
        pytest.param(["--experimental-rerun", "{pickle}"], id="pickle"),
        pytest.param(["--experimental-rerun={pickle}"], id="pickle-in-one-word"),
        pytest.param(["--exp", "{pickle}"], id="pickle-abbreviated"),
        pytest.param(["--config-dir", "{there}", "router=json"], id="library"),
    ],
)
def test_a_word_that_would_run_code_is_refused(
    words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package to search in would be imported, a pickle executed."""
    pickle = place / "p.pickle"
    pickle.write_bytes(b"cos\nsystem\n(S'touch " + str(place / "victim" / "mark").encode() + b"'\ntR.")
    (place / "there" / "router").mkdir()
    (place / "there" / "router" / "json.yaml").write_text("_target_: json.call\nname: json\n")
    (place / "there" / "json.py").write_text(EVIL.format(mark=str(place / "victim" / "mark")))
    words = [word.format(pickle=pickle, there=place / "there") for word in words]
    assert main([*words, *quick.overrides("moe_layer")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (place / "victim" / "mark").exists()
    assert "evil" not in sys.modules


TYPED = {
    "run": ["hydra.run.dir={place}/typed"],
    "output": ["hydra.output_subdir=mine"],
    "launcher": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1"],
    "slurm": ["sweep.slurm.setup=[module load cuda]", "+sweep.slurm.options.reservation=lab"],
}


@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in TYPED])
def test_what_is_typed_is_trusted(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line says where files go."""
    words = [word.format(place=place) for word in TYPED[name]]
    assert main([*words, *quick.overrides("minimal"), "--cfg", "hydra"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_log_in_the_runs_folder_is_written_and_follows_no_link(place: Path) -> None:
    """Hydra's own job_logging=default works; in the place of its file there may be a link."""
    words = [*quick.overrides("minimal"), "hydra/job_logging=default", "hydra.run.dir=run"]
    done = subprocess.run([sys.executable, "-m", "moe_lab", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (place / "work" / "run" / "moe_lab.log").exists()
    (place / "work" / "run" / "moe_lab.log").unlink()
    os.symlink(place / "victim" / "file", place / "work" / "run" / "moe_lab.log")
    done = subprocess.run([sys.executable, "-m", "moe_lab", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "link" in done.stderr
    assert (place / "victim" / "file").read_text() == "precious"


def test_what_was_checked_is_what_hydra_reads(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An interpolation could come to mean something else after the check; none is left."""
    assert main(["hydra/job_logging=default", *quick.overrides("minimal"), "--cfg", "hydra"]) == 0
    text = capsys.readouterr().out
    assert "filename: ${hydra.runtime.output_dir}/moe_lab.log" in text
    assert f"class: {hydra_node._LOG_FILE}" in text
