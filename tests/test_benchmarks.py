"""benchmarks/: each is in the index under the command that its docstring gives, and `--help` answers at once."""

from __future__ import annotations

import ast
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import add_rms_norm, check, decode_kernels, energy_profiles, pack_peers, sort_and_combine, tune_experts
from tests import tiny

FOLDER = tiny.ROOT / "benchmarks"
HELPERS = {"__init__", "browser", "peer_stubs", "plain_decoder", "synthetic", "transformers_peer", "turns"}
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


@pytest.mark.slow
def test_help_runs_nothing() -> None:
    """Exit code 0, the docstring and the options."""
    answers = json.loads(tiny.python(_HELP, *NAMES, env={"PYTHONPATH": str(tiny.ROOT), "COLUMNS": "120"}))
    for name in NAMES:
        code, out = answers[name]
        assert code == 0 and out.startswith("usage: "), name
        assert docstring(name).splitlines()[0] in out and "--help" in out


# ---- make bench-check


def _checked(tmp_path: Path, quoted: str, printed: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> int:
    """The exit code where a document quotes so and a benchmark prints so."""
    (tmp_path / "page.md").write_text(f"It costs little.\n\na / b: {quoted}\n")
    monkeypatch.setattr(check, "run", lambda arguments: f"| a table |\na / b: {printed}\n")
    monkeypatch.setattr(sys, "argv", ["check"])
    return check.main({"planted": [check.Quote("page.md", "a / b", **more)]}, tmp_path)


@pytest.mark.parametrize(
    ("quoted", "printed", "more", "code"),
    [
        pytest.param("1.20", "1.20", {}, 0, id="equal"),
        pytest.param("1.20", "1.50", {}, 0, id="within_the_tolerance"),
        pytest.param("1.20", "1.60", {}, 1, id="beyond_the_tolerance"),
        pytest.param("1.20", "0.10", {}, 0, id="better"),
        pytest.param("1.20", "0.10", {"holds_both_ways": True}, 1, id="not_better_but_other"),
        pytest.param("1.20", "1.31", {"limit": 1.3}, 1, id="above_the_limit"),
        pytest.param("1.20", "nothing", {}, 1, id="not_printed"),
        pytest.param("many", "1.20", {}, 1, id="not_quoted"),
        pytest.param("1.2\n\na / b: 1.3", "1.20", {}, 1, id="quoted_twice"),
    ],
)
def test_a_quote_that_does_not_hold_fails(
    quoted: str, printed: str, more: dict[str, Any], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the exit code of `make bench-check`."""
    assert _checked(tmp_path, quoted, printed, monkeypatch, **more) == code


def test_a_benchmark_that_ends_badly_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that prints nothing has nothing that holds."""
    (tmp_path / "page.md").write_text("a / b: 1\n")
    monkeypatch.setattr(sys, "argv", ["check"])
    assert check.main({"nothing_of_this_name": [check.Quote("page.md", "a / b")]}, tmp_path) == 1


def test_every_ratio_is_quoted_once() -> None:
    """In its document, within its own limit, by a benchmark that exists; the others are left out for a reason."""
    assert {arguments.split()[0] for arguments in check.CHECKS} | check.LEFT_OUT.keys() == {*NAMES} - {"check"}
    for quotes in check.CHECKS.values():
        for quote in quotes:
            quoted = quote.find(quote.quoted, (tiny.ROOT / quote.document).read_text())
            assert quoted is not None, quote.text
            assert quote.complaint(quoted, quoted) is None


def test_a_benchmark_that_is_not_checked_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped name would check nothing, and hold."""
    monkeypatch.setattr(sys, "argv", ["check", "--only", "agregate"])
    with pytest.raises(SystemExit, match="2"):
        check.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
@pytest.mark.parametrize(
    "benchmark",
    [
        pytest.param(each, id=each.__name__.rpartition(".")[2])
        for each in (add_rms_norm, decode_kernels, energy_profiles, sort_and_combine, tune_experts)
    ],
)
def test_what_needs_a_gpu_says_so_in_one_line(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    assert capsys.readouterr().err.endswith("benchmark: error: a CUDA device is needed\n")


def fat_binary(*entries: tuple[int, int, bytes]) -> bytes:
    """Of (kind, architecture, code), as nvcc lays them out."""
    body = b"".join(
        struct.pack("<HHIQ12xI32x", kind, 0x101, 64, len(code), architecture) + code
        for kind, architecture, code in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_a_packed_library_keeps_the_code_of_one_gpu() -> None:
    """Zeros in place of the others' and of PTX, in every fat binary; all else stays, and so does every length."""
    before = b"head" + fat_binary((2, 80, b"a80"), (2, 90, b"a90"), (1, 90, b"ptx")) + b"between"
    library = before + fat_binary((2, 120, b"b120"), (2, 90, b"b90")) + b"tail"
    packed = pack_peers.only_sm_90(library)
    expected = library
    for code in (b"a80", b"ptx", b"b120"):
        expected = expected.replace(code, bytes(len(code)))
    assert packed == expected != library


def test_a_wheel_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind pip's own words."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match=rf"^pack_peers: pip cannot download nothing==1; .* the wheel in {tmp_path}$"):
        pack_peers.fetch(["nothing==1"], tmp_path)


def test_what_only_looks_like_a_fat_binary_is_left_alone() -> None:
    """Code that compares with the magic number has it too; or the lengths do not fit."""
    magic = struct.pack("<I", 0xBA55ED50)
    for library in (magic, magic + b"cmp" * 20, fat_binary((7, 80, b"code")), fat_binary((2, 80, b"code"))[:-1]):
        assert pack_peers.only_sm_90(library) == library
