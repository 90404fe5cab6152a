"""cli/card.py: `moe-lab card`, of real records; the hub's own loader reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from moe_lab.cli import card
from moe_lab.cli.fit import Column
from moe_lab.records.store import PLAN, RESULT
from tests.results.compared import record, write

HOST = {"node": "host-of-mine", "device_name": "A | B", "moe_lab": "0.2.0"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cells that were timed, one that failed, one that was skipped, one that cannot be read."""
    cells = [record(1.0 * batch, config={"batch": batch}, environment=HOST) for batch in (1, 8)]
    assert cells[0].latency_ms is not None
    cells[0].latency_ms.ci95_low, cells[0].latency_ms.ci95_high = 0.9, 1.2
    cells[0].warnings = ["busy machine: other processes used 49% of the CPUs."]
    failed = record(config={"batch": 2}, status="failed", reason="out_of_memory: 3 < 4 | 5", environment=HOST)
    skipped = record(config={"batch": 4}, status="skipped", reason="no such device")
    folder = write(tmp_path_factory.mktemp("card") / "small", *cells, failed, skipped)
    (folder / "broken").mkdir()
    (folder / "broken" / RESULT).write_text("{")
    command = ["moe-lab", "-m", "batch=1,8", "model.path=/home/me/model"]
    plan = {"schema": 1, "compare": ["router"], "anchor": None, "name": "small", "commands": [command], "cells": []}
    (folder / PLAN).write_text(json.dumps(plan))
    return folder


@pytest.fixture(scope="module")
def readme(results: Path) -> Path:
    """Written where an earlier card is, of which one plot is not drawn any more."""
    (results / "card" / "plots").mkdir(parents=True)
    (results / "card" / "README.md").write_text("tags: [moe-lab]")
    (results / "card" / "plots" / "phases.png").write_bytes(b"")
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


def test_its_pictures_are_there_and_no_others(readme: Path) -> None:
    """A picture of an earlier card goes away."""
    shown = re.findall(r"\]\((plots/[^)]+)\)", readme.read_text())
    assert shown == ["plots/latency_over_batch.png"]
    assert {path.name for path in (readme.parent / "plots").iterdir()} == {Path(name).name for name in shown}
    assert all(Image.open(readme.parent / name).format == "PNG" for name in shown)


def test_it_does_not_tell_the_machines_name(readme: Path, results: Path) -> None:
    """Neither the text nor a table; the results themselves keep it."""
    assert HOST["node"] in pq.read_table(results / "runs.parquet")["environment.node"].to_pylist()
    for path in readme.parent.rglob("*"):
        assert path.is_dir() or HOST["node"].encode() not in path.read_bytes(), path
    runs = pq.read_table(readme.parent / "data" / "runs.parquet")
    assert HOST["node"] not in str(runs.to_pylist())


@pytest.mark.slow
def test_it_says_what_to_look_at_before_an_upload(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A license that is not known, and a command with a folder of this machine."""
    assert card.main([str(results), "-o", str(results / "other")]) == 0
    path, license_line, commands = capsys.readouterr().out.splitlines()
    assert path == f"{results}/other/README.md" and license_line == "license: unknown; --license ID sets it"
    assert commands.startswith("The commands in it name folders of this machine")
    assert front_of(Path(path))["license"] == "unknown"


def test_other_files_are_not_written_over(results: Path, tmp_path: Path) -> None:
    """A folder with something else, a file, and results without a record are one line each; nothing is written."""
    (tmp_path / "README.md").write_text("mine")
    for output in (tmp_path, tmp_path / "README.md"):
        with pytest.raises(ValueError, match=rf"^--output={output}: "):
            card.main([str(results), "-o", str(output)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no readable records; give the folder of a run or a sweep\.$"):
        card.main([str(tmp_path / "empty")])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_table_in_markdown() -> None:
    """Names on the left, numbers on the right; what would be markup is text."""
    columns = [Column("name", ["a*b", "c|d"], is_name=True), Column("ms", ["1", "<2"])]
    rows = ["| name | ms |", "| :-- | --: |", "| a\\*b | 1 |", "| c\\|d | &lt;2 |"]
    assert card.markdown_table(columns).splitlines() == rows
