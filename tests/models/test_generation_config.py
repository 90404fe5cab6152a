"""models/generation_config.py: the ids that end a text, and what is named because it is not followed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from moe_lab.models.generation_config import FILE, GenerationConfig, read
from tests.models.checkpoints import complaint


def found(folder: Path, content: Any) -> GenerationConfig:
    (folder / FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    return read(folder, 256)


@pytest.mark.parametrize(
    ("content", "ends"),
    [
        pytest.param({"eos_token_id": 7}, {7}, id="one"),
        pytest.param({"eos_token_id": [0, 7]}, {0, 7}, id="several"),
        pytest.param({"eos_token_id": 0}, {0}, id="0"),
        pytest.param({"eos_token_id": [255]}, {255}, id="the_last"),
        pytest.param({"eos_token_id": None}, None, id="null"),
        pytest.param({"eos_token_id": []}, None, id="empty"),
        pytest.param({}, None, id="absent"),
    ],
)
def test_ends_are_one_id_or_several_or_not_said(content: dict[str, Any], ends: set[int] | None, tmp_path: Path) -> None:
    """As transformers writes them."""
    assert found(tmp_path, content).ends == ends


def test_no_file_says_nothing(tmp_path: Path) -> None:
    """Most checkpoints for research have none."""
    assert read(tmp_path, 256) == GenerationConfig()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param({"eos_token_id": "</s>"}, "eos_token_id=</s> must be", id="text"),
        pytest.param({"eos_token_id": True}, "eos_token_id=True must be", id="true"),
        pytest.param({"eos_token_id": -1}, "eos_token_id=-1 must be", id="negative"),
        pytest.param({"eos_token_id": [1, 2.0]}, "eos_token_id=[1, 2.0] must be", id="float"),
        pytest.param({"eos_token_id": 256}, "eos_token_id=256: the model has 256 ids", id="not_an_id"),
        pytest.param({"eos_token_id": 10**400}, "eos_token_id=1000", id="10**400"),
        pytest.param("", "not valid JSON (Expecting", id="empty_file"),
        pytest.param("version https://git-lfs.github.com/spec/v1", "not valid JSON (Expecting", id="git_lfs_pointer"),
        pytest.param("[2]", "not a JSON object", id="list"),
        pytest.param('{"temperature": NaN}', "NaN is not a finite number", id="nan"),
        pytest.param('{"eos_token_id": 1, "eos_token_id": 2}', "eos_token_id stands twice", id="twice"),
        pytest.param('{"a":' * 99_999, "nested deeper than 100 levels", id="deep"),
    ],
)
def test_what_cannot_be_meant_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    """In one line with the file's name."""
    message = complaint(lambda: found(tmp_path, content))
    assert str(tmp_path / FILE) in message and said in message and len(message) < 300


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    """Nobody writes into that FIFO."""
    os.mkfifo(tmp_path / FILE)
    assert "not a plain file" in complaint(lambda: read(tmp_path, 256))


def test_settings_that_are_not_followed_are_named(tmp_path: Path) -> None:
    """Unless they mean what happens anyway."""
    neutral = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "num_beams": 1, "repetition_penalty": 1.0}
    neutral |= {"bos_token_id": 1, "pad_token_id": 0, "transformers_version": "4.40.0", "top_k": None}
    assert found(tmp_path, {**neutral, "eos_token_id": 2}).unread == ()
    sampled = {"do_sample": True, "temperature": 0.6, "top_k": 20, "max_new_tokens": 9, "x\x1b": "\x1b[2J"}
    assert found(tmp_path, {**neutral, **sampled}).unread == (
        "do_sample=True",
        "max_new_tokens=9",
        "temperature=0.6",
        "top_k=20",
        "x\\x1b=\\x1b[2J",
    )
