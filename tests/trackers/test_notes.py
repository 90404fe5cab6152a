"""trackers/notes.py: what was sent, beside the records."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lab.records import store
from moe_lab.trackers import notes


def test_a_sweep_keeps_its_key_and_another_has_another(tmp_path: Path) -> None:
    """Notes do not change it."""
    (tmp_path / "other").mkdir()
    key = notes.key_of(tmp_path)
    notes.add(tmp_path, "mlflow", "here", "1")
    assert notes.key_of(tmp_path) == key != notes.key_of(tmp_path / "other")


def test_a_note_is_of_a_tracker_a_place_and_a_content(tmp_path: Path) -> None:
    """The newer content at one place takes the place of the older; other places keep theirs."""
    notes.add(tmp_path, "mlflow", "here", "1")
    notes.add(tmp_path, "mlflow", "there", "1")
    notes.add(tmp_path, "wandb", "here", "1")
    notes.add(tmp_path, "mlflow", "here", "2")
    sent = [
        (tracker, place, content)
        for tracker in ("mlflow", "wandb")
        for place in ("here", "there")
        for content in "12"
        if notes.is_sent(tmp_path, tracker, place, content)
    ]
    assert sent == [("mlflow", "here", "2"), ("mlflow", "there", "1"), ("wandb", "here", "1")]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut-off"),
        pytest.param(b"[]", id="a-list"),
        pytest.param(b'{"sent": 3}', id="a-number"),
        pytest.param(b'{"sent": [3]}', id="a-list-of-numbers"),
    ],
)
def test_what_is_no_note_is_as_none(content: bytes, tmp_path: Path) -> None:
    """Then the record is sent, and it is written anew."""
    (tmp_path / store.SENT).write_bytes(content)
    assert not notes.is_sent(tmp_path, "mlflow", "here", "1")
    notes.add(tmp_path, "mlflow", "here", "1")
    assert notes.is_sent(tmp_path, "mlflow", "here", "1")
    assert len(notes.key_of(tmp_path)) == 8
