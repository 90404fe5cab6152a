"""Small tokenizer.json files, of each way to say where a space is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from tests.workloads.test_text import byte_level as trained_bytes

WORDS = ["the", "sun", "is", "up"]


def write(file: Path, **parts: Any) -> Path:
    """A tokenizer.json with these parts."""
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], **dict.fromkeys(names), **parts}))
    return file


def special(number: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, "special": True, **flags}


def pieces(file: Path) -> Path:
    """As Llama's and Mixtral's: a mark before a word, a decoder that drops the first space, bytes, <s> in front."""
    vocab = {text: number for number, text in enumerate(["<unk>", "<s>", "</s>", *(f"▁{word}" for word in WORDS), "▁"])}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    pair: list[dict[str, Any]] = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return write(
        file,
        added_tokens=[special(number, text) for text, number in vocab.items() if number < 3],
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, to_mark]},
        post_processor={
            "type": "TemplateProcessing",
            "single": [begin, pair[0]],
            "pair": pair,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        decoder={"type": "Sequence", "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        model={
            "type": "Unigram",
            "unk_id": 0,
            "byte_fallback": True,
            "vocab": [[text, 0.0 if text.startswith("▁") else -9.0] for text in vocab],
        },
    )


def metaspace(file: Path, scheme: str = "always") -> Path:
    """Words with the mark, by the parts that are called Metaspace."""
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}
    vocab = {text: number for number, text in enumerate(["<unk>", *(f"▁{word}" for word in WORDS)])}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    return write(file, pre_tokenizer=space, decoder=space, model=model)


def wordpiece(file: Path) -> Path:
    """As BERT's: words, their continuations, and a decoder that puts no space before a full stop."""
    vocab = {text: number for number, text in enumerate(["[UNK]", *WORDS, "##ny", "."])}
    model = {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]", "max_input_chars_per_word": 100}
    return write(
        file,
        pre_tokenizer={"type": "Whitespace"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
        model={**model, "continuing_subword_prefix": "##"},
    )


def words(file: Path) -> Path:
    """Words without a decoder."""
    vocab = {text: number for number, text in enumerate(["<unk>", *WORDS])}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    return write(file, pre_tokenizer={"type": "Whitespace"}, model=model)


MAKERS = {"pieces": pieces, "metaspace": metaspace, "wordpiece": wordpiece, "words": words}


def byte_level(file: Path) -> Path:
    """As Qwen's and OLMoE's."""
    tokenizer = Tokenizer.from_file(str(trained_bytes(file)))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(file))
    return file
