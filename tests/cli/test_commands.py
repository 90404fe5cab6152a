"""commands.py: the words beside Hydra's language: help, exit codes, what is imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lab.cli.commands import COMMANDS
from moe_lab.cli.main import main
from tests import quick, tiny
from tests.cli.test_main import loaded_modules
from tests.results.compared import record, write

_IN_ONE_PROCESS = (
    "import contextlib, io, json, os, sys; from moe_lab.cli.main import main\n"
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
    "status": ("directory", "outputs/NAME"),
    "plan": ["moe-lab plan [-m] [--json] OVERRIDES", "nothing is run or written"],
    "report": ["moe-lab report", "directory", "a sweep's folder", "--tables"],
    "plot": [
        "moe-lab plot",
        "directory [X] [Y]",
        "--by",
        "--log",
        "--output",
        "--format",
        "--size",
        "--font",
        "examples:",
    ],
    "card": ["moe-lab card", "DIRECTORY", "--license ID", "hf upload NAME DIR/card --repo-type dataset"],
    "compare": ["moe-lab compare", "--threshold", "exit codes"],
    "generate": ["moe-lab generate", "KEY=VALUE", "--max-tokens", "--temperature", "default: 200", "--prefill-chunk"],
    "trace": ["moe-lab trace", "KEY=VALUE | FILE", "--logits", "--to {parquet,vllm}"],
    "import": ["moe-lab import", "vllm, sglang, llama_cpp", "--top-k", "the trace to write"],
    "analyze": ["moe-lab analyze", "TRACE KEY=VALUE", "--cfg", "conf/analyze.yaml"],
    "stability": ["moe-lab stability", "KEY=VALUE", "--variants", "what running again changes", "--tokens"],
    "allocate": ["moe-lab allocate", "KEY=VALUE", "--budget", "--tokens", "default: 2048"],
    "export": ["moe-lab export", "RUN_DIR", "export.KEY=VALUE", "--open", "--verify DIR", "--config-dir", "exit codes"],
    "inspect": ["moe-lab inspect", "DIR", "no weights are read", "--json"],
    "list": ["moe-lab list", "--config-dir", "router, model, experts", "architectures"],
    "doctor": ["moe-lab doctor", "--noise", "--rates PATH", "expert_cache.rates"],
    "build": ["moe-lab build", "--arch", "80,90"],
    "clean": ["moe-lab clean", "--older-than DAYS", "Nothing is removed without --remove"],
}
MISTAKES = {
    "report nowhere": "nowhere",
    "report": "report: .*required: directory .moe-lab report --help.",
    "report a b": "report: unrecognized arguments: b",
    "report --tables nowhere": "nowhere",
    "plot": "plot: .*required: directory",
    "plot nowhere batch": "plot: give X and Y, or neither",
    "plot nowhere batch latency_ms.p50": "nowhere: folder not found",
    "card": "card: .*required: directory",
    "card nowhere": "nowhere: folder not found",
    "card . --license CC": "--license=CC: must be an identifier of the hub, such as cc-by-4.0",
    "export": "export: give either RUN_DIR or --verify DIR .moe-lab export --help.",
    "export a --verify b": "export: give either RUN_DIR or --verify DIR",
    "export nowhere": "nowhere: not the folder of a run .*nowhere/config.yaml",
    "export nowhere --loud": "export: unrecognized arguments: --loud",
    "build --arch sm_90": "--arch sm_90: must be compute capabilities .* such as 80,90, or cpu",
    "build now": "build: unrecognized arguments: now",
    "inspect": "inspect: .*required: DIR",
    "inspect nowhere": "nowhere/config.json cannot be read .*give the folder of a Hugging Face checkpoint",
    "list architectures --config-dir d": "list architectures: --config-dir: has no effect",
    "list rooter": "rooter: unknown group; choose one of .*router.*Did you mean router",
    "list --all": "list: unrecognized arguments: --all",
    "list --config-dir": "list: .*--config-dir.*expected one argument",
    "doctor --loud": "doctor: unrecognized arguments: --loud",
    "doctor --rates nowhere": "doctor: --rates nowhere: no such file or folder",
    "doctor --rates . --noise": "doctor: --noise and --rates: give one of them at a time",
    "doctor now": "doctor: unrecognized arguments: now",
    "compare a": "compare: .*required: B",
    "compare nowhere nowhere": "nowhere: folder not found",
    "generate": "generate: .*required: prompt, model.path=DIR",
    "generate abc": "generate: .*required: model.path=DIR",
    "generate abc model.path=d --max-tokens few": "generate: .*--max-tokens: invalid int value: 'few'",
    "generate abc model.path=d --loud": "generate: unrecognized arguments: --loud",
}
MISSPELT = {
    "reprot x": "reprot: not a command and not a KEY=VALUE override .* Did you mean report[?]",
    "Doctor": "Doctor: not a command .* Did you mean doctor[?]",
    "routr torch": "routr: not a command .* Did you mean router=[?]",
    "batch": "batch: not a command and not a KEY=VALUE override .moe-lab --help lists them..",
    "-m reprot": "reprot: .* KEY=VALUE .*",
    "plan reprot": "reprot: not a command .* Did you mean report[?]",
    "batch=1 reprot": "reprot: .* KEY=VALUE .*",
}
SCRIPTS = {"aggregate": "report", "build_router_ext": "build", "export_netron": "export", "plot": "plot"}
OF_GENERATE = {  # typed behind a prompt
    "router=native": r"model\.path has no value: set model\.path=",
    "model.path=nowhere": r"model\.path=nowhere: nowhere/config\.json cannot be read .*; give the folder",
    "model=decoder_moe": "model=decoder_moe: .*use model=checkpoint",
    "model=decoder_moe router=torch": "model=decoder_moe: .*use model=checkpoint",
    "{} foo": "foo: not a KEY=VALUE override",
    "{} --max-tokens 0": "--max-tokens 0: must be an integer >= 1",
    "{} --temperature -1": "--temperature -1.0: must be a number >= 0",
    "{} --prefill-chunk 0": "--prefill-chunk 0: must be an integer >= 1",
    "{} router=soft": "router=soft mixes .*or another router",
    "{} execution=cuda_graph device=cpu": "execution=cuda_graph: .*use execution=eager",
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


def test_a_misspelt_command_is_told_from_an_override(tmp_path: Path) -> None:
    """The nearest command, or the nearest group, in one line; exit code 2 and nothing is written."""
    for (typed, pattern), result in zip(MISSPELT.items(), run([m.split() for m in MISSPELT], tmp_path), strict=True):
        code, out, err, _ = result
        assert (code, out) == (2, ""), typed
        assert re.fullmatch(f"moe-lab: {pattern}\n", err), err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_a_command_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 130; a command has no record to speak of."""

    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["moe-lab"])
    monkeypatch.setitem(COMMANDS, "export", interrupted)
    assert main(["export", "RUN_DIR"]) == 130
    assert capsys.readouterr() == ("", "moe-lab: interrupted\n")


def test_ctrl_c_again_while_the_tables_are_written_is_one_more_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code stays 130."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["moe-lab"])
    monkeypatch.setattr("moe_lab.cli.main._compose_and_run", interrupted)
    monkeypatch.setattr("moe_lab.cli.main._show", interrupted)
    assert main(["-m", "router=torch,switch"]) == 130
    first, again = capsys.readouterr().err.splitlines()
    assert first == "moe-lab: interrupted; a record that was begun has the results up to this point"
    assert again == "moe-lab: interrupted again, before the tables were written; moe-lab report does it"


def test_a_script_is_the_command_under_another_name(tmp_path: Path) -> None:
    """One after the other in one process, from another folder."""
    code = (
        "import contextlib, io, json, runpy, sys\n"
        "for path in sys.argv[1:]:\n"
        "    sys.argv = [path, '--help']\n"
        "    sys.path.insert(0, path.rpartition('/')[0])\n"  # as where Python is called with it
        "    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        try:\n"
        "            runpy.run_path(path, run_name='__main__')\n"
        "        except SystemExit as left:\n"
        "            code = left.code\n"
        "    print(json.dumps([code or 0, out.getvalue(), err.getvalue()]))\n"
        "    del sys.path[0], code"
    )
    command = [sys.executable, "-c", code, *(tiny.ROOT / "scripts" / f"{name}.py" for name in SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    for word, line in zip(SCRIPTS.values(), done.stdout.splitlines(), strict=True):
        code, out, err = json.loads(line)
        assert (code, err) == (0, "") and out.startswith(f"usage: moe-lab {word} ")


def test_these_are_all_the_scripts() -> None:
    """A fifth one needs a line in `SCRIPTS`; `cluster` is what `make cluster-up` calls (tests/test_cluster.py)."""
    assert {path.stem for path in (tiny.ROOT / "scripts").glob("*.py")} - {"cluster", "oldest"} == SCRIPTS.keys()


@pytest.mark.slow
def test_a_mistake_of_generate_prints_no_text(tmp_path: Path) -> None:
    """One line and exit code 2; the prompt is not printed before it is known that something can follow."""
    path = f"model.path={quick.TINY_OLMOE}"
    commands = [["generate", "abc", *typed.format(path).split()] for typed in OF_GENERATE]
    patterns = [
        *OF_GENERATE.values(),
        "the prompt is empty",
        "the prompt has 1024 tokens, but .* at most 1024; shorten it",
    ]
    commands += [["generate", prompt, path] for prompt in ("", "x" * 1024)]
    for typed, pattern, result in zip(commands, patterns, run(commands, tmp_path), strict=True):
        code, out, err, _ = result
        assert (code, out) == (2, ""), (typed, err)
        assert re.fullmatch(f"moe-lab: .*{pattern}.*\n", err), (typed, err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_text_begins_with_its_prompt_and_is_the_same_again(tmp_path: Path) -> None:
    """The likeliest, and one drawn by a seed; how many tokens and how long each took stand on standard error."""
    command = ["generate", "def read(path):\n", f"model.path={quick.TINY_OLMOE}", "device=cpu", "--max-tokens", "12"]
    warm = [*command, "--temperature", "0.9", "seed=3"]
    found = run([command, command, warm, warm, [*warm[:-1], "seed=4"], [*command, "router=sinkhorn"]], tmp_path)
    texts = [out for _, out, _, _ in found]
    for code, out, err, _ in found:
        assert code == 0, err
        assert out.startswith("def read(path):\n") and out.endswith("\n")
        rate = r"[\d.]+ ms each after the first, [\d.e+]+ tokens/s"
        assert re.search(rf"^moe-lab: 12 tokens, {rate} \(execution=eager\)\n\Z", err, re.M)
    assert texts[0] == texts[1] and texts[2] == texts[3]
    assert len({texts[0], texts[2], texts[4]}) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "word",
    [
        pytest.param("list", id="list"),
        pytest.param("report", id="report"),
        pytest.param("compare", id="compare", marks=pytest.mark.slow),  # test_compare.py asks too
    ],
)
def test_results_are_read_without_torch(word: str, tmp_path: Path) -> None:
    """Listing options needs no pandas either."""
    for name in ("a", "b"):
        write(tmp_path / name, record(1.0))
    arguments = {"list": [], "report": ["a"], "compare": ["a", "b"]}[word]
    modules = loaded_modules([word, *arguments], tmp_path)
    assert not {"torch", "triton"} & modules
    assert ("pandas" in modules) == (word != "list")
