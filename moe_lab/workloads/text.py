"""workload=text: windows of real text, one file a domain.

A text is turned into tokens once per process and cut into windows of `seq_len` tokens that do not overlap. A window's
targets, the tokens that follow its own, lie in the same text.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moe_lab.models.tokenizer import Tokenizer
from moe_lab.ops.hash_uniform import hash_integers, stream_of
from moe_lab.records import files
from moe_lab.records.inputs import text_files

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Domain:
    """One file's tokens. Tensors are int64 on the CPU, shared by all who ask: nobody writes into them.

    `byte_ends_N[i]` is where the text of token i ends, in bytes of UTF-8 from the start of the file; it never falls.
    Bytes between the texts of two tokens, as a space that the tokenizer drops, count with the second. Where several
    tokens share a character, its bytes count with the first.
    """

    name: str
    ids_N: Tensor
    byte_ends_N: Tensor


class Windows(NamedTuple):
    """Windows of S tokens; all tensors int64 on the CPU. Domains are numbered as in `names`."""

    ids_WS: Tensor
    targets_WS: Tensor  # [w, s]: the token that follows ids_WS[w, s] in the text
    domain_W: Tensor
    bytes_W: Tensor  # bytes of text in the window's targets
    names: tuple[str, ...]  # of all domains, those left out too
    left_out: tuple[str, ...]  # names of the domains that are too short for one window


class _Stamp(NamedTuple):
    """A file as it was: another stamp, and it is read again."""

    file: Path
    mtime_ns: int
    size: int


def read_domains(path: str | Sequence[str] | None, vocab_size: int, tokenizer_file: Path | None) -> list[Domain]:
    """The texts of `workload.path`, in the order in which they are named; a file named twice is read once.

    Args:
        path: a file, a folder, or several of those. Of a folder all `*.txt` and `*.md` files directly in it, sorted by
            name, but for README.md, which is about the texts.
        vocab_size: of the model.
        tokenizer_file: a Hugging Face tokenizer.json. Without one the ids are the bytes of UTF-8, and the model must
            have 256 of them.

    Returns:
        a domain per file, named by the file's name without suffix; where two have the same, by as much of the path as
        tells them apart.

    Raises:
        ValueError: a text is missing, empty or not UTF-8, or the tokenizer is missing, unreadable or does not match
            the model.
    """
    if not path:
        raise ValueError("workload.path: workload=text needs a text file, a folder of text files or a list of these.")
    # A link keeps its own name: what it leads to is often called by a hash.
    files = {file.resolve(): Path(os.path.abspath(file)) for file in text_files(path)}.values()
    if tokenizer_file is None and vocab_size != 256:
        raise ValueError(
            f"workload=text: the model has {vocab_size} ids but no tokenizer; put the checkpoint's tokenizer.json "
            "next to its config.json, or use a model with 256 ids (bytes)."
        )
    if tokenizer_file is not None and not tokenizer_file.is_file():
        raise ValueError(f"workload=text: {tokenizer_file} not found; put the checkpoint's tokenizer.json there.")
    return list(
        _read(tuple(map(_stamp, files)), vocab_size, _stamp(tokenizer_file) if tokenizer_file is not None else None)
    )


def _stamp(file: Path) -> _Stamp:
    stat = file.stat()
    return _Stamp(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)  # every cell of a sweep asks for the same texts
def _read(texts: tuple[_Stamp, ...], vocab_size: int, tokenizer: _Stamp | None) -> tuple[Domain, ...]:
    files = [text.file for text in texts]
    contents = [_content(file) for file in files]
    if tokenizer is None:
        tokens = [_bytes(text) for text in contents]
    else:
        tokens = _encoded(contents, Tokenizer(tokenizer.file, vocab_size, "workload=text"))
    return tuple(
        Domain(name, torch.from_numpy(ids_N), torch.from_numpy(byte_ends_N))
        for name, (ids_N, byte_ends_N) in zip(_names(files), tokens, strict=True)
    )


def _content(file: Path) -> str:
    """The file's text, its line ends as they are."""
    try:
        content = files.read_text(file, files.MOST_TEXT_BYTES)
    except OSError as error:
        raise ValueError(f"workload.path: {file} cannot be read ({error.strerror}); use another file.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"workload.path: {file} is not UTF-8 (at byte {error.start}); convert it (for example "
            "with iconv) or remove it."
        ) from error
    if not content:
        raise ValueError(f"workload.path: {file} is empty; add text or remove it.")
    return content


def _names(files: Sequence[Path]) -> list[str]:
    """A name for each of `files`, all different."""

    def name(file: Path, parts: int) -> str:
        return "/".join(file.parts[-parts:]) if parts > 1 else file.stem

    names: dict[Path, str] = {}
    for parts in itertools.count(1):
        counts = Counter(name(file, parts) for file in files)
        names |= {file: name(file, parts) for file in files if file not in names and counts[name(file, parts)] == 1}
        if len(names) == len(files):
            break
    return [names[file] for file in files]


def _bytes(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of UTF-8 as ids, and where each ends."""
    ids_N = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
    return ids_N, np.arange(1, len(ids_N) + 1)


def _encoded(texts: Sequence[str], tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each text, the ids that a tokenizer.json gives, without special tokens, and at which byte each ends."""
    encodings = [tokenizer.encode_with_ends(text) for text in texts]
    return [
        (np.array(ids, dtype=np.int64), _byte_ends(text, ends))
        for text, (ids, ends) in zip(texts, encodings, strict=True)
    ]


def _byte_ends(text: str, char_ends: Sequence[int]) -> np.ndarray:
    """Where characters end, as bytes of UTF-8, made to never fall (a token that a tokenizer adds ends at 0)."""
    points_C = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    lengths_C = 1 + (points_C >= 0x80) + (points_C >= 0x800) + (points_C >= 0x10000)
    bytes_before_C1 = np.concatenate([[0], np.cumsum(lengths_C, dtype=np.int64)])
    return np.maximum.accumulate(bytes_before_C1[np.array(char_ends, dtype=np.int64)])


def windows(domains: Sequence[Domain], seq_len: int, n_windows: int | None, seed: int) -> Windows:
    """Windows of `seq_len` tokens that do not overlap, their domains taking turns: 0, 1, 2, 0, 1, 2, ...

    A domain of N tokens has (N - 1) // seq_len of them and drops out of the turns when they are used up. With
    `n_windows` the turns end there, and a domain that gives some of its windows gives evenly spaced ones, the seed
    deciding at which it starts. If there are no more than `n_windows`, or that is None, all are taken.

    Raises:
        ValueError: no domain is long enough for a window.
    """
    S, lengths_D = seq_len, np.array([len(domain.ids_N) for domain in domains])
    there_D = np.maximum(lengths_D - 1, 0) // S
    if not there_D.any():
        raise ValueError(
            f"workload.path: seq_len={S} needs a text of at least {S + 1} tokens, but the longest text has "
            f"{lengths_D.max()}; lower seq_len or use longer texts."
        )
    turn_W = np.concatenate([np.arange(there) for there in there_D])
    domain_W = np.repeat(np.arange(len(domains)), there_D)
    order_W = np.lexsort((domain_W, turn_W))[:n_windows]
    turn_W, domain_W = turn_W[order_W], domain_W[order_W]
    taken_D = np.bincount(domain_W, minlength=len(domains))
    # Of `there` windows `taken` are spread by turn * there / taken, rounded down. What is added before rounding moves
    # them all by less than one such step; multiples of the golden ratio put seeds that are neighbours far apart.
    shift_D = (seed * _GOLDEN % 1 * there_D).astype(np.int64)
    place_W = (turn_W * there_D[domain_W] + shift_D[domain_W]) // taken_D[domain_W]
    first_D = np.cumsum(lengths_D) - lengths_D
    start_W = torch.from_numpy(first_D[domain_W] + place_W * S)
    at_WS = start_W.unsqueeze(1) + torch.arange(S)
    ids_N, byte_ends_N = (torch.cat([getattr(d, name) for d in domains]) for name in ("ids_N", "byte_ends_N"))
    return Windows(
        ids_WS=ids_N[at_WS],
        targets_WS=ids_N[at_WS + 1],
        domain_W=torch.from_numpy(domain_W),
        bytes_W=byte_ends_N[start_W + S] - byte_ends_N[start_W],
        names=tuple(domain.name for domain in domains),
        left_out=tuple(domain.name for domain, there in zip(domains, there_D, strict=True) if not there),
    )


def uniform_ids(shape: tuple[int, ...], vocab_size: int, seed: int, device: torch.device) -> Tensor:
    """Ids drawn uniformly from the vocabulary in place of a text's, int64: `workload.ids=uniform`."""
    return hash_integers(shape, stream_of(seed, "workload", "uniform"), vocab_size, device)


def text_input(
    *,
    model: nn.Module,
    batch: int,
    seq_len: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    phase: str,
    path: str | Sequence[str] | None,
    ids: str,
) -> Tensor:
    """The model's input: `batch` windows of the texts in `path` (`workload.path`), a row each.

    With `ids="uniform"` (`workload.ids`) as many windows of ids drawn from the vocabulary. The model's
    `tokenizer_file`, if it has one, is the tokenizer.json.

    Returns:
        int64 token ids [batch, seq_len].

    Raises:
        ValueError: the model takes no token ids, or the texts cannot be read or are too short.
    """
    if model.vocab_size is None:
        raise ValueError(
            "workload=text: the model takes hidden states, not tokens; use a model with an embedding, such as "
            "decoder_moe."
        )
    domains = read_domains(path, int(model.vocab_size), getattr(model, "tokenizer_file", None))  # type: ignore[arg-type]
    ids_BS = windows(domains, seq_len, batch, seed).ids_WS
    if len(ids_BS) < batch:
        raise ValueError(
            f"workload.path={path}: the texts have {len(ids_BS)} windows of seq_len={seq_len} tokens, but {batch} are "
            "needed; lower batch or seq_len (or router.calibration_tokens), or add text."
        )
    if ids == "uniform":
        return uniform_ids((batch, seq_len), int(model.vocab_size), seed, device)  # type: ignore[arg-type]
    return ids_BS.to(device)
