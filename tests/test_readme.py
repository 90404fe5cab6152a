"""Every command of the README runs as it stands (the timing cut short), and ends as the README says.

Of those with files that are not here, and of sweeps that take long, every cell is composed.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_lab.cli.commands import COMMANDS as WORDS
from moe_lab.config.checks import check_overrides, validate
from moe_lab.config.compose import composing_multirun
from moe_lab.sweep import multirun, search
from tests import quick

CONF = Path(__file__).parent.parent / "conf"
README = CONF.with_name("README.md").read_text()
FENCED = re.findall(r"^\.venv/bin/(moe-lab .+)$", README, re.MULTILINE)
IN_TABLE = re.findall(r"^\| `[^|]*\| `(moe-lab [^`]+)`|`(moe-lab measure[^`]+)`", README, re.MULTILINE)
COMMANDS = list(dict.fromkeys(FENCED + [first or second for first, second in IN_TABLE]))
# Those of the table and the first build a model of the demo's size; a sweep, a text and an OLMoE layer take a while.
SLOW = {"model=moe_layer", "model=decoder_moe", "generate", "plan"}
QUICK = [command for command in FENCED if not SLOW & set(command.split())]
TRIED = [
    pytest.param(command, id=command.replace("moe-lab ", "")[:60], marks=[] if command in QUICK else [pytest.mark.slow])
    for command in COMMANDS
]


# Comments end a line, a backslash goes on in the next; the files named are not here, but others in their place are.
BLOCKS = "\n".join(re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
SUBSTITUTES = {"/models/OLMoE-1B-7B": str(quick.TINY_OLMOE), "notes.txt": str(quick.TEXTS)}
PLAIN = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^moe-lab .+$", BLOCKS, re.MULTILINE)]
COMPOSED = [words for words in PLAIN if words[0] == "plan" or words[0] not in WORDS]
LARGE = "experiment=router_kernels"  # 160 cells take a while to compose


def test_the_readme_has_the_commands_that_are_tried() -> None:
    """The patterns above find them: six outside the table, and nine pairs of demo and moe-lab."""
    assert len(FENCED) == 6
    assert len(COMPOSED) >= 9 and sum("model=checkpoint" in words for words in COMPOSED) == 2
    assert len(COMMANDS) >= 12
    assert "moe-lab measure.routing=false device=cpu" in COMMANDS


def test_the_readme_lists_every_option() -> None:
    """In its section on groups, each under the name that is typed."""
    listed = set(re.findall(r"`([^`]+)`", README.split("\n## Groups\n")[1].split("\n## ")[0]))
    places = [path.relative_to(CONF) for path in CONF.rglob("*.yaml")]
    options = {path.stem for path in places if path.parts[0] not in ("_base", "analysis") and len(path.parts) > 1}
    assert len(options) > 90 and options <= listed, options - listed


@pytest.mark.parametrize("command", TRIED)
def test_a_command_of_the_readme_runs(command: str, tmp_path: Path) -> None:
    """Exit code 0 and a row that is ok; 2 and one line for what the README calls unavailable, or has no device."""
    (tmp_path / "assets").symlink_to(quick.ASSETS)
    records = not any(word in command for word in ("--help", " plan ", " generate "))
    short = ["measure.max_time_s=0.1", "measure.warmup_s=0"] if records else []
    arguments = [sys.executable, "-m", "moe_lab", *shlex.split(command)[1:], *short]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if "device=cuda" in command and not torch.cuda.is_available():
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        return
    assert done.returncode == 0, done.stderr
    if records:
        assert list(tmp_path.glob("outputs/*/*/result.json"))
        assert "failed" not in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=" ".join(words)[:60], marks=pytest.mark.slow if LARGE in words else [])
        for words in COMPOSED
    ],
)
@pytest.mark.slow
def test_a_command_of_the_readme_names_what_there_is(words: list[str]) -> None:
    """Every cell is composed and checked."""
    overrides = [word for word in words if word not in ("-m", "plan")]
    for name, other in SUBSTITUTES.items():
        overrides = [word.replace(name, other) for word in overrides]
    with composing_multirun(overrides, None) as (loader, config):
        composer = multirun.JobComposer(loader, config)
        if search.is_search(config):
            pytest.importorskip("optuna", reason="pip install 'moe-lab[search]'")
            jobs, _ = search.known_jobs(composer, Path("no-folder"))
        else:
            jobs = multirun.expand(loader, config)
        for cfg, typed, _ in composer.jobs(jobs):
            validate(cfg)
            check_overrides(cfg, typed, in_a_sweep="-m" in words)
