"""cli/card.py: `moe-lab card`, of real records; the hub's own loader reads it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from moe_lab.cli import card
from moe_lab.cli.fit import Column
from moe_lab.records.schema import NOT_SENT
from moe_lab.records.store import PLAN, RESULT
from tests.results.compared import record, write

TRACKER = "tracker-of-mine:5000"
HOST = {"node": "host-of-mine", "device_name": "A | B", "moe_lab": "0.2.0"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cells that were timed, one that failed, one that was skipped, one that cannot be read."""
    cells = [record(1.0 * batch, config={"batch": batch}, environment=HOST) for batch in (1, 8)]
    assert cells[0].latency_ms is not None
    cells[0].latency_ms.ci95_low, cells[0].latency_ms.ci95_high = 0.9, 1.2
    cells[0].warnings = [
        "busy machine: other processes used 49% of the CPUs.",
        f"{NOT_SENT}mlflow: http://{TRACKER}: it is down; run the same command again to send it.",
    ]
    failed = record(config={"batch": 2}, status="failed", reason="out_of_memory: 3 < 4 | 5", environment=HOST)
    skipped = record(config={"batch": 4}, status="skipped", reason="no such device")
    folder = write(tmp_path_factory.mktemp("card") / "small", *cells, failed, skipped)
    (folder / "broken").mkdir()
    (folder / "broken" / RESULT).write_text("{")
    command = ["moe-lab", "-m", "batch=1,8", "model.path=/home/me/model", "tracker=mlflow"]
    command += [f"tracker.mlflow.uri=http://{TRACKER}", f"+tracker.more={TRACKER}"]
    plan = {"schema": 1, "compare": ["router"], "anchor": None, "name": "small", "commands": [command], "cells": []}
    (folder / PLAN).write_text(json.dumps(plan))
    return folder


@pytest.fixture(scope="module")
def readme(results: Path) -> Path:
    """Written where an earlier card is, of which one plot is not drawn any more; a person put another one there."""
    (results / "card" / "plots").mkdir(parents=True)
    (results / "card" / "README.md").write_text("---\npretty_name: 'moe-lab: earlier'\n---\n")
    (results / "card" / "plots" / "phases.png").write_bytes(b"")
    (results / "card" / "plots" / "loss.png").write_bytes(b"mine")
    assert card.main([str(results), "--license", "cc-by-4.0"]) == 0
    return results / "card" / "README.md"


def front_of(readme: Path) -> dict[str, object]:
    """The YAML between the first two lines of dashes."""
    _, front, _ = readme.read_text().split("---\n", 2)
    content = yaml.safe_load(front)
    assert isinstance(content, dict)
    return content


def test_its_front_matter_names_files_that_are_there(readme: Path) -> None:
    """License, tags, and a configuration for each table, of which one is the default."""
    front = front_of(readme)
    assert front["license"] == "cc-by-4.0" and "moe-lab" in front["tags"]
    configs = front["configs"]
    assert [config["config_name"] for config in configs] == list(card.TABLES)
    assert [config["config_name"] for config in configs if config.get("default")] == ["summary"]
    rows = {config["config_name"]: pq.read_table(readme.parent / config["data_files"]).num_rows for config in configs}
    assert rows == {"summary": 4, "runs": 4, "samples": 0}


def test_the_hubs_own_loader_reads_it(readme: Path) -> None:
    """As a card of a data set and of a model."""
    hub = pytest.importorskip("huggingface_hub")
    data = hub.DatasetCard.load(readme).data
    assert (data.license, data.pretty_name) == ("cc-by-4.0", "moe-lab: small")
    assert hub.ModelCard.load(readme).data.tags == list(card.TAGS)


def test_a_row_has_its_interval_and_a_failure_its_reason(readme: Path) -> None:
    """A bar in a text does not end its field."""
    text = readme.read_text()
    (row,) = re.findall(r"^\| sinkhorn \| 1 .*$", text, re.MULTILINE)
    assert "| 1 ms [0.9, 1.2] |" in row
    assert "- failed (1 cells): out_of_memory: 3 &lt; 4 \\| 5\n" in text
    assert "- skipped (1 cells): no such device\n" in text
    assert "- busy machine: other processes used 49% of the CPUs.\n" in text
    assert re.search(r"^- broken/result.json could not be read: ", text, re.MULTILINE)
    assert "| device_name | A \\| B" in text
    assert "moe-lab -m batch=1,8 model.path=/home/me/model" in text


def test_every_table_has_as_many_fields_in_each_row(readme: Path) -> None:
    """Else a reader of Markdown drops some."""
    tables = re.findall(r"(?:^\|.*\n)+", readme.read_text(), re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_its_pictures_are_there(readme: Path) -> None:
    """A picture of an earlier card goes away, and no picture of a person."""
    shown = re.findall(r"\]\((plots/[^)]+)\)", readme.read_text())
    assert shown == ["plots/latency_over_batch.png"]
    assert {path.name for path in (readme.parent / "plots").iterdir()} == {"latency_over_batch.png", "loss.png"}
    assert (readme.parent / "plots" / "loss.png").read_bytes() == b"mine"
    assert all(Image.open(readme.parent / name).format == "PNG" for name in shown)


def test_it_does_not_tell_names_of_machines(readme: Path, results: Path) -> None:
    """Of this one or of a tracker, neither in the text nor in a table; the results themselves keep them."""
    runs = pq.read_table(results / "runs.parquet")
    assert HOST["node"] in runs["environment.node"].to_pylist() and TRACKER in str(runs["warnings"].to_pylist())
    tables = [pq.read_table(path).to_pylist() for path in (readme.parent / "data").iterdir()]
    text = readme.read_text() + str(tables)
    assert HOST["node"] not in text and TRACKER not in text and "tracker=" not in text
    assert "busy machine: " in str(tables)
    for path in readme.parent.rglob("*"):
        assert path.is_dir() or HOST["node"].encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_it_says_what_to_look_at_before_an_upload(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A license that is not known, and a command with a folder of this machine."""
    assert card.main([str(results), "-o", str(results / "other")]) == 0
    path, license_line, commands = capsys.readouterr().out.splitlines()
    assert path == f"{results}/other/README.md" and license_line == "license: unknown; --license ID sets it"
    assert commands.startswith("The commands in it name folders of this machine")
    assert front_of(Path(path))["license"] == "unknown"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"mine", id="text"),
        pytest.param(b"# Trained with moe-lab\n", id="names-moe-lab"),
        pytest.param(b"---\ntags: [moe-lab]\n---\n", id="another-card"),
        pytest.param(b"---\n- [\n---\nmoe-lab", id="no-yaml"),
        pytest.param(b"\xff\xfe moe-lab", id="no-utf-8"),
    ],
)
def test_other_files_are_not_written_over(content: bytes, results: Path, tmp_path: Path) -> None:
    """A folder with something else, a file, one below a file: one line each; nothing is written."""
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "phases.png").write_bytes(content)
    (tmp_path / "README.md").write_bytes(content)
    for output in (tmp_path, tmp_path / "README.md", tmp_path / "README.md" / "x"):
        with pytest.raises(ValueError, match=rf"^--output={output}: .*; give a"):
            card.main([str(results), "-o", str(output)])
    files = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"README.md": content, "phases.png": content}


def test_without_a_record_nothing_is_written(tmp_path: Path) -> None:
    """It says what to give."""
    with pytest.raises(ValueError, match=r": no readable records; give the folder of a run or a sweep\.$"):
        card.main([str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_card_that_was_killed_is_written_again(results: Path, tmp_path: Path) -> None:
    """Before each of its files takes its place, with nothing of the killed process left."""
    code = (
        "import os, sys; from moe_lab.cli.main import main; real, n = os.replace, int(sys.argv.pop(1));\n"
        "def replace(a, b):\n"
        "    global n\n"
        f"    n -= str(b).startswith({str(tmp_path)!r})\n"
        "    os.kill(os.getpid(), 9) if n < 0 else real(a, b)\n"
        "os.replace = replace; sys.exit(main())"
    )
    for kept in (0, 1, 3):
        output = tmp_path / str(kept)
        words = [sys.executable, "-c", code, str(kept), "card", str(results), "-o", str(output)]
        assert subprocess.run(words, capture_output=True, timeout=120).returncode == -signal.SIGKILL
        left = [path.name for path in output.rglob("*") if path.is_file()]
        assert sum(name.endswith(".tmp") for name in left) == 1 and len(left) == kept + 1
        assert card.main([str(results), "-o", str(output)]) == 0
        assert {path.name for path in output.rglob("*") if path.is_file()} == {
            "README.md",
            "latency_over_batch.png",
            *(f"{name}.parquet" for name in card.TABLES),
        }


def test_a_table_in_markdown() -> None:
    """Names on the left, numbers on the right; what would be markup is text."""
    columns = [Column("name", ["a*b", "c|d"], is_name=True), Column("ms", ["1", "<2"])]
    rows = ["| name | ms |", "| :-- | --: |", "| a\\*b | 1 |", "| c\\|d | &lt;2 |"]
    assert card.markdown_table(columns).splitlines() == rows
