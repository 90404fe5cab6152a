"""models/tokenizer.py: text to ids and back, token by token too, and what is said of a file that is damaged."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from moe_lab.models.tokenizer import Bytes, Stream, Tokenizer
from tests.models import tokenizers
from tests.models.checkpoints import complaint
from tests.models.tokenizers import MAKERS, write

WORD_LEVEL = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}


def streamed(tokenizer: Bytes | Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> list[str]:
    """The pieces that the tokens add, and what is left at the end."""
    stream = Stream(tokenizer, prompt)
    return [*(stream.add(token) for token in ids), stream.end()]


makers = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MAKERS.items()])


@makers
def test_pieces_add_up_to_what_the_library_makes_of_all_ids(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Every sequence of up to four tokens after a prompt of one: the spaces are where they belong."""
    file = make(tmp_path / "tokenizer.json")
    library, tokenizer = Library.from_file(str(file)), Tokenizer(file, 300)
    n_ids = min(8, library.get_vocab_size())
    checked = 0
    for ids in itertools.chain(*(itertools.product(range(n_ids), repeat=length) for length in (2, 3, 4))):
        prompt, rest = ids[:1], ids[1:]
        before, whole = library.decode(prompt), library.decode(ids)
        assert before + "".join(streamed(tokenizer, prompt, rest)) == whole, ids
        checked += whole.count(" ") > 0
    assert checked > 100


@makers
def test_the_first_space_after_a_prompt_is_not_lost(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """The decoders drop the first space of a text, and that is the prompt's; each word comes with its own."""
    tokenizer = Tokenizer(make(tmp_path / "tokenizer.json"), 300)
    ids = tokenizer.encode("the sun is up")
    first = len(tokenizer.encode("the"))
    assert streamed(tokenizer, ids[:first], ids[first:]) == [" sun", " is", " up", ""]


def test_a_special_token_in_the_text_loses_no_space(tmp_path: Path) -> None:
    """It is not shown, and what follows is not the beginning of a text."""
    tokenizer = Tokenizer(tokenizers.pieces(tmp_path / "tokenizer.json"), 300)
    the, sun, up = (tokenizer.encode(word)[-1] for word in ("the", "sun", "up"))
    assert "".join(streamed(tokenizer, [1, the], [sun, 1, 2, up])) == " sun up"
    assert "".join(streamed(tokenizer, [1], [1, sun, up])) == "sun up"


@given(st.binary(max_size=12), st.text(max_size=3))
def test_bytes_are_characters_as_soon_as_they_are_whole(content: bytes, prompt: str) -> None:
    """No piece is of half a character, and what never becomes whole is replaced at the end, not lost."""
    got = streamed(Bytes(), list(prompt.encode()), list(content))
    assert "".join(got) == content.decode(errors="replace")


@given(st.text(max_size=8))
def test_whole_characters_come_with_their_last_byte(text: str) -> None:
    """So nothing waits for the next one."""
    *pieces, rest = streamed(Bytes(), [], list(text.encode()))
    assert [piece for piece in pieces if piece] == list(text.replace("\ufffd", "")) or "\ufffd" in text
    assert rest == "" or "\ufffd" in text


@pytest.mark.parametrize("make", [pytest.param(m, id=m.__name__) for m in (tokenizers.byte_level, tokenizers.pieces)])
def test_a_character_of_several_tokens_is_one_piece(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """And half of one at the end is U+FFFD."""
    tokenizer = Tokenizer(make(tmp_path / "tokenizer.json"), 300)
    ids = tokenizer.encode("the \U00010348")
    start = next(n for n in range(1, len(ids)) if "\ufffd" in tokenizer.decode(ids[: n + 1]))
    assert len(ids) - start == 4
    assert streamed(tokenizer, ids[:start], ids[start:]) == ["", "", "", "\U00010348", ""]
    cut = streamed(tokenizer, ids[:start], ids[start:-1])
    assert cut[:-1] == ["", "", ""] and set(cut[-1]) == {"\ufffd"}


def test_a_tokenizer_that_cuts_and_fills_up_does_neither(tmp_path: Path) -> None:
    """Both are for training."""
    cut = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    file = tokenizers.words(tmp_path / "tokenizer.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "truncation": cut}))
    assert Tokenizer(file, 300).encode("the sun") == [1, 2]


def test_ids_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    """Another model's tokenizer; one that the text does not need may be there."""
    tokenizer = Tokenizer(tokenizers.words(tmp_path / "tokenizer.json"), 4)
    assert tokenizer.encode("the sun is") == [1, 2, 3]
    for encode in (tokenizer.encode, tokenizer.encode_with_ends):
        message = complaint(lambda encode=encode: encode("the up"))
        assert "tokenizer.json gives the id 4, but the model has 4 ids; use the checkpoint's own" in message
    assert tokenizer.has_text(4) and not tokenizer.has_text(5) and tokenizer.decode([1, 77, 2]) == "the sun"


DAMAGES: list[tuple[str, Any]] = [
    ("empty", ""),
    ("git_lfs_pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 49\n"),
    ("cut_short", '{"version": "1.0", "trunc'),
    ("web_page", "<!DOCTYPE html>\n<html>"),
    ("list", "[1]"),
    ("no_text", b"\xff\xfe{}"),
    ("deep", '{"model":' * 99_999),
    ("no_model", {"model": None}),
    ("model_unknown", {"model": {"type": "Sorcery", "vocab": {}}}),
    ("vocabulary_of_text", {"model": {**WORD_LEVEL, "vocab": {"a": "0"}}}),
    ("vocabulary_negative", {"model": {**WORD_LEVEL, "vocab": {"a": -1}}}),
    ("unknown_token_missing", {"model": {**WORD_LEVEL, "unk_token": "z"}}),
    ("merge_of_no_token", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}),
    ("unigram_of_nothing", {"model": {"type": "Unigram", "unk_id": None, "vocab": []}}),
    ("regular_expression", {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}}),
    ("charsmap_empty_panics", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}),
    ("charsmap_short_panics", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}),
    (
        "template_without_its_token_panics",
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
    ),
]


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in DAMAGES])
def test_a_damaged_tokenizer_is_one_line(content: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whether the library raises or panics, when it loads the file or when it encodes; it prints no stack trace."""
    file = tmp_path / "tokenizer.json"
    if isinstance(content, dict):
        write(file, **{"model": WORD_LEVEL, **content})
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = complaint(lambda: Tokenizer(file, 256).encode("a b"))
    assert message.startswith(f"model.path: {file} is not a valid tokenizer.json (") and len(message) < 300
    assert "copy it from the checkpoint again" in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", [pytest.param(e, id=e.__name__) for e in (KeyboardInterrupt, SystemExit)])
def test_who_wants_to_stop_is_not_held(error: type[BaseException], tmp_path: Path) -> None:
    """Ctrl-C while a large vocabulary is loaded is no damage."""
    tokenizer = Tokenizer(tokenizers.words(tmp_path / "tokenizer.json"), 300)
    with pytest.raises(error), tokenizer._explained():
        raise error


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    """A FIFO would be waited for; a link that leads nowhere is not a model of bytes."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    for name in ("fifo", "dangling", "zero", "sparse", "."):
        message = complaint(lambda name=name: Tokenizer(tmp_path / name, 256))
        assert f"model.path: {tmp_path / name} cannot be read (" in message


def test_standard_error_is_there_again_afterwards(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever happened in between."""
    (tmp_path / "tokenizer.json").write_text("{")
    complaint(lambda: Tokenizer(tmp_path / "tokenizer.json", 256))
    os.write(2, b"here")
    assert capfd.readouterr().err == "here"
