"""results/energy.py: the page's section of energy."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import synthetic
from moe_lab.records.store import read_record, write_record
from moe_lab.results.aggregate import aggregate
from moe_lab.results.energy import Energy, energy
from tests.results import observed

WATTS = (500.0, 400.0, 600.0)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Energy:
    """Of eight cells, three with an energy: 10 J an iteration of 8 tokens at 1000 W."""
    directory = tmp_path_factory.mktemp("energy")
    folders = [folder for folder in synthetic.sweep(directory, 8) if read_record(folder).status == "ok"]
    for folder, watts in zip(folders, WATTS, strict=False):
        record = read_record(folder)
        observed.add(record, watts, "GPU power cap" if watts == 600 else "")
        write_record(folder, record)
    made = energy(aggregate(directory).runs)
    assert made is not None
    return made


def column(found: Energy, head: str) -> list[str]:
    return [row[found.heads.index(head)] for row in found.rows]


def test_a_row_for_each_cell_with_an_energy(found: Energy) -> None:
    """Its energy per token by hand, its mean power, and which counter that was."""
    assert sorted(column(found, "J / token")) == ["0.5", "0.625", "0.75"]
    assert sorted(column(found, "W")) == ["400", "500", "600"]
    assert sorted(column(found, "throttled blocks")) == ["0", "0", "10"]
    assert column(found, "counter share") == ["1%"] * 3
    assert found.counters == ["NVML total energy (the whole GPU with its memory)"]


def test_the_anchor_is_divided_by(found: Energy) -> None:
    """Of those cells that have one with an energy; the anchor itself has none."""
    assert sorted(column(found, "energy x anchor")) == ["", "0.8", "1.2"]


def test_without_an_energy_there_is_no_section(tmp_path: Path) -> None:
    """Nor a row of zeros."""
    synthetic.sweep(tmp_path, 4)
    assert energy(aggregate(tmp_path).runs) is None
