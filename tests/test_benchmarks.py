"""benchmarks/: each is in the index under the command that its docstring gives, and `--help` answers at once."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from tests import tiny

FOLDER = tiny.ROOT / "benchmarks"
HELPERS = {"browser", "synthetic"}
"""What benchmarks and tests share; not started themselves."""
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} - HELPERS)
ROWS = re.findall(
    r"^\| `(python -m benchmarks\.(\w+)[^`]*)` \| (.+) \| (.+) \|$", (FOLDER / "README.md").read_text(), re.M
)
INDEX = {name: command for command, name, _, _ in ROWS}
# All in one process, because torch and transformers take seconds to import.
_HELP = """
import contextlib, io, json, runpy, sys
answers = {}
for name in sys.argv[1:]:
    sys.argv = ["", "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
            code = "it went on"
        except SystemExit as end:
            code = end.code
    answers[name] = [code, out.getvalue()]
print(json.dumps(answers))
"""


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""


def test_every_benchmark_is_in_the_index() -> None:
    """Once, and nothing else is; the files of its tables exist."""
    assert [name for _, name, _, _ in ROWS] == NAMES
    for *_, tables in ROWS:
        links = re.findall(r"\]\(([^)]+)\)", tables)
        assert links and all((FOLDER / link).is_file() for link in links)


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_gives_the_command_of_the_index(name: str) -> None:
    """Its first line that is a command, up to a comment; every command is started as a module."""
    commands = re.findall(r"^ {4}(.*python3? .+?)(?: {2,}#.*)?$", docstring(name), re.MULTILINE)
    assert commands[0] == INDEX[name]
    assert all(f"-m benchmarks.{name}" in command for command in commands if "benchmarks" in command)
    assert f"benchmarks/{name}.py" not in docstring(name)


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in sorted(FOLDER.glob("*.py"))])
def test_nothing_is_imported_from_the_tests(path: Path) -> None:
    """At no depth of the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [module for module in modules if module.split(".")[0] == "tests"]


def test_help_runs_nothing() -> None:
    """Exit code 0, the docstring and the options."""
    answers = json.loads(tiny.python(_HELP, *NAMES, env={"PYTHONPATH": str(tiny.ROOT), "COLUMNS": "120"}))
    for name in NAMES:
        code, out = answers[name]
        assert code == 0 and out.startswith("usage: "), name
        assert docstring(name).splitlines()[0] in out and "--help" in out
