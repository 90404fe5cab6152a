"""results/profiles.py: the page's section of profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import synthetic
from moe_lab.records.store import TIMELINE, read_record, write_record
from moe_lab.results.aggregate import aggregate
from moe_lab.results.profiles import HEADS, profiles
from tests.results import observed


def test_a_profile_shows_its_longest_kernels(tmp_path: Path) -> None:
    """The longest first, with who computes them; a link only to a file that is there."""
    folders = [folder for folder in synthetic.sweep(tmp_path, 4) if read_record(folder).status == "ok"]
    for folder in folders[:2]:
        record = read_record(folder)
        observed.add(record)
        write_record(folder, record)
    (folders[0] / TIMELINE).write_bytes(b"")
    found = profiles(tmp_path, aggregate(tmp_path).runs)
    assert len(found) == 2 and found[0].title != found[1].title
    assert sorted(bool(one.timeline) for one in found) == [False, True]
    for one in found:
        assert one.heads == HEADS and one.total == "5 kernels, 0.79 ms"
        assert one.rows[0] == ["_up_kernel", "experts", "experts=fused", "1", "0.41", "51.9%"]
        assert one.rows[-1][1:3] == ["other", "other"]
        assert one.ncu.startswith("ncu ") and "the same order" in one.note and "1,234 events" in one.note


@pytest.mark.parametrize("top", [pytest.param("x", id="text"), pytest.param([{"name": "k"}], id="keys")])
def test_what_is_no_list_of_kernels_is_an_empty_table(top: object, tmp_path: Path) -> None:
    """Whoever wrote it."""
    folder = next(folder for folder in synthetic.sweep(tmp_path, 4) if read_record(folder).status == "ok")
    record = read_record(folder)
    observed.add(record)
    assert record.profile is not None
    record.profile["top"] = top
    write_record(folder, record)
    (found,) = profiles(tmp_path, aggregate(tmp_path).runs)
    assert found.rows == []


def test_without_a_profile_there_is_no_section(tmp_path: Path) -> None:
    """As in all older records."""
    synthetic.sweep(tmp_path, 4)
    assert profiles(tmp_path, aggregate(tmp_path).runs) == []
