"""Text to the ids of a model and back: a tokenizer.json by the tokenizers library, or the 256 bytes.

A tokenizer.json is data from somebody else. What the library makes of a damaged one, an exception or a panic with a
stack trace, is one line here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moe_lab.models.checkpoint_keys import shown
from moe_lab.records import files


class Bytes:
    """The bytes of UTF-8, for a model with 256 ids."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def has_text(self, token: int) -> bool:
        return True


class Tokenizer:
    """A tokenizer.json, for a model with `vocab_size` ids. `key` is what a message begins with.

    Raises:
        ValueError: the file is not a tokenizer.json, or one of another model.
    """

    def __init__(self, file: Path, vocab_size: int, key: str = "model.path"):
        self._file, self._vocab_size, self._key = file, vocab_size, key
        try:
            content = files.read_bytes(file, files.MOST_TEXT_BYTES)
        except OSError as error:
            raise ValueError(f"{key}: {file} cannot be read ({error.strerror}).") from error
        with self._explained():
            from tokenizers import Tokenizer as Library  # here: models of bytes need none

            self._library = Library.from_buffer(content)
            self._library.no_truncation()  # a tokenizer.json may ask for both
            self._library.no_padding()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, and those that the tokenizer adds, as one that begins a text."""
        with self._explained():
            ids = list(self._library.encode(text).ids)
        self._require_known(ids)
        return ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """(the ids of `text` alone, and for each the character at which it ends)."""
        with self._explained():
            encoding = self._library.encode(text, add_special_tokens=False)
            ids, ends = list(encoding.ids), [end for _, end in encoding.offsets]
        self._require_known(ids)
        return ids, ends

    def _require_known(self, ids: Sequence[int]) -> None:
        largest = max(ids, default=0)
        if largest >= self._vocab_size:
            raise ValueError(
                f"{self._key}: {self._file} gives the id {largest}, but the model has {self._vocab_size} ids; "
                "use the checkpoint's own tokenizer.json."
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, without special tokens and ids that the tokenizer does not have."""
        with self._explained():
            return str(self._library.decode(list(ids), skip_special_tokens=True))

    def has_text(self, token: int) -> bool:
        """Whether the tokenizer has this id."""
        return self._library.id_to_token(token) is not None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """An error of the library as one line; the report of a panic, which it writes by itself, is left out."""
        try:
            with _no_stderr():
                yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic is no Exception
            reason = shown(str(error).strip() or type(error).__name__)
            raise ValueError(
                f"{self._key}: {self._file} is not a valid tokenizer.json ({reason}); copy it from the checkpoint "
                "again."
            ) from error


@contextmanager
def _no_stderr() -> Iterator[None]:
    """What is written to the process's standard error inside, by any language, goes nowhere."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Stream:
    """The text that is added to a text by token after token.

    What a token adds depends on what is before it: decoders drop the first space of a text, and a character may take
    several tokens. So the tokens are decoded together with those before them, from the last place where the text was
    whole, and the difference is what is new.
    """

    def __init__(self, tokenizer: Bytes | Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._ids, self._first, self._n_said = list(prompt), 0, len(prompt)
        self._said = tokenizer.decode(prompt)

    def add(self, token: int) -> str:
        """What this token adds to the text; nothing while a character is not whole."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids[self._first :])
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._said) :]
        last = self._tokenizer.decode(self._ids[self._n_said :])
        if last:  # else it is only what is not shown, after which a space would be taken for the first
            self._first, text = self._n_said, last
        self._said, self._n_said = text, len(self._ids)
        return new

    def end(self) -> str:
        """What is left: the replacement of a character that did not become whole."""
        return self._tokenizer.decode(self._ids[self._first :])[len(self._said) :]
