"""commands.py: the words beside Hydra's language: help, exit codes, what is imported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moe_lab.commands import COMMANDS
from tests import tiny
from tests.results.compared import record, write
from tests.test_cli import loaded_modules

_IN_ONE_PROCESS = (
    "import contextlib, io, json, os, sys; from moe_lab.cli import main\n"
    "os.chdir(sys.argv[1])\n"
    "for arguments in json.loads(sys.argv[2]):\n"
    "    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:\n"
    "        try:\n"
    "            code = main(arguments)\n"
    "        except SystemExit as left:\n"
    "            code = left.code\n"
    "    print(json.dumps([code, out.getvalue(), err.getvalue(), 'torch' in sys.modules]))"
)

HELP = {
    "plan": ["moe-lab plan [-m] OVERRIDES", "nothing is run or written"],
    "report": ["moe-lab report", "directory", "a sweep's folder"],
    "compare": ["moe-lab compare", "--threshold", "exit codes"],
    "list": ["moe-lab list", "--config-dir", "router, model, experts"],
    "doctor": ["moe-lab doctor", "--noise"],
}
MISTAKES = {
    "report nowhere": "nowhere",
    "report": "report: .*required: directory .moe-lab report --help.",
    "report a b": "report: unrecognized arguments: b",
    "list rooter": "rooter: no such group; there are .*router.*Did you mean router",
    "list --all": "list: unrecognized arguments: --all",
    "list --config-dir": "list: .*--config-dir.*expected one argument",
    "doctor --loud": "doctor: unrecognized arguments: --loud",
    "doctor now": "doctor: unrecognized arguments: now",
    "compare a": "compare: .*required: B",
    "compare nowhere nowhere": "nowhere: there is no such folder",
}


def run(commands: list[list[str]], cwd: Path) -> list[tuple[int, str, str, bool]]:
    """(exit code, stdout, stderr, whether torch is loaded by then) of each `moe-lab ...` in one process."""
    printed = tiny.python(_IN_ONE_PROCESS, cwd, json.dumps(commands), env={"COLUMNS": "80"})
    return [tuple(json.loads(line)) for line in printed.splitlines()]  # type: ignore[misc]


def test_every_word_has_a_help(tmp_path: Path) -> None:
    """Exit code 0, its options, no torch; --help of the whole names every word."""
    assert HELP.keys() == COMMANDS.keys()
    *each, whole = run([*([word, option] for option in ("--help", "-h") for word in HELP), ["--help"]], tmp_path)
    for (word, parts), result in zip([*HELP.items(), *HELP.items()], each, strict=True):
        code, out, err, has_torch = result
        assert (code, err, has_torch) == (0, "", False), word
        assert all(part in out for part in parts), out
    assert all(f"moe-lab {word} " in whole[1] for word in HELP)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """Whoever finds it: argparse, the command, or what it calls. No torch is needed to find it."""
    for (typed, pattern), result in zip(MISTAKES.items(), run([m.split() for m in MISTAKES], tmp_path), strict=True):
        code, out, err, has_torch = result
        assert (code, out, has_torch) == (2, "", False), (typed, err)
        assert re.fullmatch(f"moe-lab: .*{pattern}.*\n", err), (typed, err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", [pytest.param(word, id=word) for word in ("list", "report", "compare")])
def test_results_are_read_without_torch(word: str, tmp_path: Path) -> None:
    """Listing options needs no pandas either."""
    for name in ("a", "b"):
        write(tmp_path / name, record(1.0))
    arguments = {"list": [], "report": ["a"], "compare": ["a", "b"]}[word]
    modules = loaded_modules([word, *arguments], tmp_path)
    assert not {"torch", "triton"} & modules
    assert ("pandas" in modules) == (word != "list")
