"""completion.py: what a real bash completes behind `moe-lab`."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_lab.cli import listing
from moe_lab.cli.commands import COMMANDS
from moe_lab.config.schemas import LOADS

SCRIPTS = Path(sys.prefix) / "bin"
pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or not (SCRIPTS / "moe-lab").exists(), reason="no bash, or moe-lab is not installed"
)
INSTALL = 'eval "$(moe-lab -sc install=bash)"\n'
# As bash calls the function that `complete -F` names: the line, the cursor at its end, the word under it.
_ASK = r"""
ask() {
    COMP_LINE="$1" COMP_POINT=${#1} COMPREPLY=()
    read -ra COMP_WORDS <<< "$1"
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    [[ "$1" == *" " ]] && COMP_CWORD=$((COMP_CWORD + 1))
    hydra_bash_completion
    echo "${COMPREPLY[*]}"
}
while IFS= read -r line; do ask "$line"; done
"""
ROUTERS = {f"router={path.stem}" for path in listing.groups(None)["router"]}
OPTIONS = {
    "moe-lab rou": {"router.", "router="},
    "moe-lab router=": ROUTERS,
    "moe-lab router=torch,si": {"router=torch,sinkhorn"},
    "moe-lab -m router=torch,": {word.replace("=", "=torch,") for word in ROUTERS - {"router=torch"}},
    "moe-lab plan -m router=torch,hash,sink": {"router=torch,hash,sinkhorn"},
    "moe-lab workload.load=": {f"workload.load={load}" for load in LOADS},
    "moe-lab workload.load=native,h": {"workload.load=native,hot"},
    "moe-lab model/shape=demo,ol": {"model/shape=demo,olmoe_1b_7b"},
    "moe-lab batch=1,": set(),
    "moe-lab pl": {"plan", "plot"},
    "moe-lab re": {"report"},
    "moe-lab co": {"compare"},
    "moe-lab do": {"doctor"},
    "moe-lab plan -m rou": {"router.", "router="},
    "moe-lab plan -m router=": ROUTERS,
    "moe-lab plan router=torch experts=lo": {"experts=loop"},
    "moe-lab -m sweep.va": {"sweep.variants="},
    "moe-lab plan model/sh": {"model/shape="},
    "moe-lab list ro": {"router"},
    "moe-lab list ": set(listing.groups(None)),
    "moe-lab doctor --": {"--json", "--noise", "--rates"},
    "moe-lab compare ": set(),
    "moe-lab report ": set(),
    "moe-lab report --": {"--plotly", "--tables"},
    "moe-lab plot outputs/s batch --b": {"--by"},
    "moe-lab export ": set(),
    "moe-lab export --": {"--config-dir", "--open", "--verify"},
    "moe-lab build --": {"--arch"},
    "moe-lab bu": {"build"},
    "moe-lab ex": {"export", "experts=", "experts.", "experiment=", "execution=", "execution.", "export=", "export."},
    "moe-lab nothing-like-it": set(),
}


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "TERM": "dumb"}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What one bash, in an empty folder, answers to each line; nothing on stderr."""
    done = subprocess.run(
        ["bash", "--norc", "-c", INSTALL + _ASK],
        input="".join(f"{line}\n" for line in (*OPTIONS, "moe-lab ")),
        cwd=tmp_path_factory.mktemp("empty"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return dict(zip((*OPTIONS, "moe-lab "), map(str.split, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("line", "expected"), [pytest.param(*item, id=item[0]) for item in OPTIONS.items()])
@pytest.mark.slow
def test_bash_completes(line: str, expected: set[str], answers: dict[str, list[str]]) -> None:
    """Words, their options, and Hydra's language; each once."""
    assert set(answers[line]) == expected
    assert len(answers[line]) == len(expected)


@pytest.mark.slow
def test_at_the_start_words_stand_beside_hydras_keys(answers: dict[str, list[str]]) -> None:
    """All of both."""
    assert set(COMMANDS) <= set(answers["moe-lab "])
    assert {"router=", "batch="} <= set(answers["moe-lab "])


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[int]:
    """The terminal of an interactive bash that knows the completion; its prompt is `ready>`."""
    process, descriptor = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        variables = {**environment(), "PS1": "ready>", "INPUTRC": os.devnull, "HISTFILE": os.devnull}
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], variables)
    read_until(descriptor, "ready>")
    os.write(descriptor, b"bind 'set enable-bracketed-paste off'; " + INSTALL.encode() + b"echo in''stalled\n")
    read_until(descriptor, "installed\r\nready>")  # in one: what is read beyond a text is gone
    yield descriptor
    os.close(descriptor)
    os.kill(process, 9)
    os.waitpid(process, 0)


def read_until(descriptor: int, text: str) -> str:
    """What the terminal shows up to and with `text`."""
    shown, deadline = "", time.monotonic() + 60
    while text not in shown:
        assert time.monotonic() < deadline, shown
        if select.select([descriptor], [], [], 1)[0]:
            shown += os.read(descriptor, 4096).decode()
    return shown


@pytest.mark.slow
def test_the_tab_key_in_a_terminal(terminal: int) -> None:
    """Typed, not called: a word, and behind `plan` a value that Hydra knows."""
    os.write(terminal, b"moe-lab doc\t")
    assert read_until(terminal, "moe-lab doctor").endswith("moe-lab doctor")
    os.write(terminal, b"\x15moe-lab plan -m router=sin\t")
    assert "router=sinkhorn" in read_until(terminal, "moe-lab plan -m router=sinkhorn")
    os.write(terminal, b"\x15moe-lab -m router=torch,sink\t")
    assert "router=torch,sinkhorn" in read_until(terminal, "moe-lab -m router=torch,sinkhorn")
