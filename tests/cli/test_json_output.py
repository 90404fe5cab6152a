"""json_output.py: what `--json` prints of list, plan and doctor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe_lab.cli import listing
from moe_lab.cli.json_output import print_json
from moe_lab.cli.main import main
from moe_lab.sweep.engine import Worker
from tests import quick

ENTRY = {"name", "about"}
DESCRIBED = ENTRY | {"runs", "reason", "properties", "undeclared", "implementations", "used_here"}
CELL = {"cell_id", "directory", "variant", "setting_id", "status", "reason", "runs", "config"}
CELL |= {"router_implementation", "experts_implementation"}


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What `moe-lab WORDS` prints, read as strictly as JSON can be; in an empty folder, with an empty cache."""

    def run(*words: str) -> Any:
        (tmp_path / "here").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "here")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr("sys.argv", ["moe-lab"])
        assert main(list(words)) == 0
        out, err = capsys.readouterr()
        assert err == "" and out.isascii() and all(letter == "\n" or letter.isprintable() for letter in out)
        assert list((tmp_path / "here").iterdir()) == []
        return json.loads(out, parse_constant=pytest.fail)

    return run


def test_what_no_terminal_may_get_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters, directions of writing, halves of surrogates; numbers that JSON does not have are null."""
    content = {"text": "\x1b[31m\x7f\u202e\u00e9\x00\n", "nan": math.nan, "list": [math.inf, 1.5, None]}
    print_json(content)
    out = capsys.readouterr().out
    assert out.isascii() and all(letter == "\n" or letter.isprintable() for letter in out)
    assert json.loads(out) == {"schema": 1, "text": content["text"], "nan": None, "list": [None, 1.5, None]}


def test_every_group(document: Any) -> None:
    """With every option; of one group the same."""
    everything = document("list", "--json")
    assert set(everything) == {"schema", "groups"} and set(everything["groups"]) == set(listing.groups(None))
    assert all(set(option) == ENTRY for options in everything["groups"].values() for option in options)
    assert document("list", "model", "--json")["groups"] == {"model": everything["groups"]["model"]}


@pytest.mark.slow
def test_the_experts_with_what_they_declare(document: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As plain data of the worker's answer."""
    answer = {"properties": ["graph_safe"], "implementations": ["x"], "chosen": None, "skip": None, "undeclared": []}
    monkeypatch.setattr(Worker, "start", lambda self: None)
    monkeypatch.setattr(Worker, "call", lambda self, step, group, configs: [answer for _ in configs])
    options = document("list", "--json", "experts")["groups"]["experts"]
    assert [option["name"] for option in options] == sorted(
        path.stem for path in (Path(__file__).parents[2] / "conf" / "experts").glob("*.yaml")
    )
    assert all(
        set(option) == DESCRIBED and option["runs"] and option["properties"] == ["graph_safe"] for option in options
    )


@pytest.mark.slow
def test_a_plan(document: Any) -> None:
    """A cell that can run, and one that cannot, with its reason."""
    words = quick.overrides("moe_layer", "model.shape.top_k=2,9", "router=torch", "sweep.name=s")
    plan = document("plan", "-m", "--json", *words)
    assert (plan["directory"], plan["n_cells"], plan["n_to_run"], plan["n_duplicates"]) == ("outputs/s", 2, 1, 0)
    assert plan["expected_s"] > 0 and plan["expected_is_measured"] is False and plan["without_effect"] == []
    runs, cannot = plan["cells"]
    assert set(runs) == set(cannot) == CELL
    assert (runs["status"], runs["runs"], runs["reason"]) == ("to do", True, None)
    assert (runs["router_implementation"], runs["experts_implementation"]) == ("torch", "grouped")
    assert (cannot["status"], cannot["runs"]) == ("skipped", False) and "model.shape.top_k=9" in cannot["reason"]
    assert runs["config"]["model"]["shape"]["top_k"] == 2


@pytest.mark.slow
def test_the_machine(document: Any) -> None:
    """Its environment, and every option with whether it runs."""
    machine = document("doctor", "--json")
    assert {"environment", "env_id", "noise_floor", "load_average", "options", "tools"} <= set(machine)
    assert machine["environment"]["torch"] and machine["noise_floor"] is None
    runs = {option["option"]: option["runs"] for option in machine["options"]}
    assert runs["router=torch"] and not runs["router=native"]
