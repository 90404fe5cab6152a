"""sweep/standing.py: the files that say what a slot does."""

from __future__ import annotations

from pathlib import Path

from moe_lab.sweep import standing
from moe_lab.sweep.standing import FOLDER, Board


def test_what_slots_do_is_read_until_the_end(tmp_path: Path) -> None:
    """Group, cell, step and counts, by slot; nothing is left behind; logs stay."""
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "dead.json").write_text("{}")  # of a driver that was killed
    with Board(tmp_path) as board:
        assert standing.read(tmp_path) == []
        board.at("b", 7, "cell-x", "verify", "job 12")
        board.at("a", 3, "cell-y", "time")
        board.ended("a", is_failed=False)
        board.ended("a", is_failed=True)
        a, b = standing.read(tmp_path)
        assert (a.slot, a.group, a.cell, a.step, a.n_done, a.n_failed, a.note) == ("a", 3, "cell-y", "time", 2, 1, "")
        assert (b.slot, b.group, b.cell, b.step, b.n_done, b.note) == ("b", 7, "cell-x", "verify", 0, "job 12")
        assert a.begun == b.begun <= b.updated <= a.updated
        board.at("b", None, None, None)
        assert standing.read(tmp_path)[1].cell is None
        board.gone("a")
        a = standing.read(tmp_path)[0]
        assert (a.group, a.cell, a.step, a.n_done, a.n_failed) == (None, None, "gone", 2, 1)
        board.at("a", 4, "cell-z", "build")  # it is back
        board.ended("a", is_failed=False)
        assert standing.read(tmp_path)[0].n_done == 3
        board.gone("never-seen")
        assert len(standing.read(tmp_path)) == 2
    assert not (tmp_path / FOLDER).exists()


def test_the_same_step_is_not_written_again(tmp_path: Path) -> None:
    """A step that is told at every round costs no file."""
    with Board(tmp_path) as board:
        board.at("a", 1, "x", "time")
        before = (tmp_path / FOLDER / "a.json").stat().st_ino
        board.at("a", 1, "x", "time")
        assert (tmp_path / FOLDER / "a.json").stat().st_ino == before


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    """Half a file of another machine, fields of another version."""
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "half.json").write_text('{"slot": "ha')
    (tmp_path / FOLDER / "other.json").write_text('{"place": 1}')
    assert standing.read(tmp_path) == []
