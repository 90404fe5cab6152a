"""models/checkpoint_text_part.py: the text part of models that read images too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_lab.models.checkpoint_config import read
from moe_lab.models.checkpoint_text_part import HAVE_TEXT_PART
from tests.models.checkpoints import build, checkpoint, complaint, edit_config

kinds = pytest.mark.parametrize("kind", sorted(HAVE_TEXT_PART))


@pytest.mark.parametrize("part", [..., None, {}, 3])
@kinds
def test_without_a_text_part_there_is_nothing_to_load(kind: str, part: Any, tmp_path: Path) -> None:
    """It is named."""
    content = {"model_type": kind, "text_config": part}
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in content.items() if value is not ...})
    )
    assert "text_config" in complaint(lambda: read(tmp_path))


@kinds
def test_keys_of_other_parts_are_known_and_others_are_named(kind: str, tmp_path: Path) -> None:
    """With the part that they stand in."""
    folder = checkpoint(kind, tmp_path)
    assert read(folder).unread == ()
    edit_config(folder, lambda content: content["text_config"].update(attn_softcap=3), frames=2)
    assert read(folder).unread == ("frames", "text_config.attn_softcap")
    (said,) = [text for text in build(folder).warnings() if "images" in text]
    assert "only its text part is loaded" in said


@kinds
def test_the_parts_must_agree(kind: str, tmp_path: Path) -> None:
    """On the type, and on whether the head is the embedding, which has a default of its own."""
    folder = checkpoint(kind, tmp_path)
    edit_config(folder, tie_word_embeddings=True)
    assert "both must be the same" in complaint(lambda: read(folder))
    edit_config(folder, tie_word_embeddings=False)
    edit_config(folder, lambda content: content["text_config"].update(model_type="olmoe"))
    assert "model_type=olmoe is not supported" in complaint(lambda: read(folder))


def test_without_a_key_the_head_is_the_embedding_in_gemma_alone(tmp_path: Path) -> None:
    """As transformers has it."""
    for kind, tied in (("gemma4", True), ("qwen3_5_moe", False)):
        folder = checkpoint(kind, tmp_path / kind)
        edit_config(folder, lambda content: content["text_config"].pop("tie_word_embeddings"), tie_word_embeddings=...)
        assert read(folder).decoder["tie_embeddings"] is tied
