"""`moe-lab generate`: the text that a checkpoint writes, one token at a time from its cache."""

from __future__ import annotations

import codecs
import itertools
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from omegaconf import DictConfig
from torch import Tensor

from moe_lab.config.checks import refuse_other_keys
from moe_lab.config.compose import compose
from moe_lab.measure.clocks import STEPS
from moe_lab.measure.tolerances import exact_products
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.serving import Decode
from moe_lab.records.identity import option_name
from moe_lab.runs import build

_DEFAULTS = ("model=checkpoint", "router=native")
_READ = ("model.*", "router.*", "experts.*", "device", "dtype", "execution", "seed")
_CALIBRATED_ON = ("workload", "workload.path", "seq_len")
"""What it reads of a configuration."""


class _Bytes:
    """A vocabulary of 256 bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token: int) -> str:
        """What this token adds to the text so far; nothing while a character is not whole."""
        return self._decoder.decode(bytes([token]))


class _Tokenizer:
    """A tokenizer.json."""

    def __init__(self, file: str):
        from tokenizers import Tokenizer
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._stream = Tokenizer.from_file(file), DecodeStream(skip_special_tokens=True)
        self._tokenizer.no_truncation()  # a tokenizer.json may ask for both
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, token: int) -> str:
        """See `_Bytes.decode`."""
        return self._stream.step(self._tokenizer, token) or ""


def _tokenizer_of(model: Checkpoint) -> _Bytes | _Tokenizer:
    if model.tokenizer_file is not None:
        return _Tokenizer(str(model.tokenizer_file))
    if model.vocab_size != 256:
        raise ValueError(
            f"model.path={model.folder}: no tokenizer.json found, and the {model.vocab_size} ids are not bytes; add "
            "the checkpoint's tokenizer.json."
        )
    return _Bytes()


def choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """The next token, int64 []: the likeliest, or with a temperature one drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return logits_V.argmax()
    shares_V = (logits_V.float() / temperature).softmax(-1)
    return torch.multinomial(shares_V, 1, generator=generator)[0]


def generate(cfg: DictConfig, prompt: str, max_tokens: int, temperature: float = 0.0) -> Iterator[str]:
    """The pieces of text that follow `prompt`, at most `max_tokens` tokens, until the model ends it.

    Raises:
        ValueError: no checkpoint, an empty prompt, or one that leaves no room in the model's longest sequence.
        UnavailableError: an implementation or a device that is not here.
    """
    if not build.is_checkpoint(cfg.model):
        raise ValueError(
            f"model={option_name(cfg.model)}: cannot generate text, because it is not trained; use model=checkpoint."
        )
    device = build.resolve_device(cfg)
    model = build.build_model(cfg, device)
    assert isinstance(model, Checkpoint)
    cfg.workload.phase = "decode"
    build.require_runnable(cfg, model)
    tokenizer = _tokenizer_of(model)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty; give some text to continue.")
    room = model.max_positions - len(ids)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, but the model supports at most {model.max_positions}; shorten it."
        )
    n = min(max_tokens, room)
    ids_1N = torch.zeros(1, len(ids) + n, dtype=torch.int64, device=device)
    ids_1N[0, : len(ids)] = torch.tensor(ids)
    task = Decode(model, model.make_cache(1, ids_1N.shape[1]), len(ids) - 1)
    if len(ids) > 1:
        task.fill(ids_1N)
    step = STEPS[cfg.execution.name](task, ids_1N)
    generator = torch.Generator(device).manual_seed(int(cfg.seed))
    for position in range(len(ids), len(ids) + n):
        token = choose(step().y[0, -1], temperature, generator)
        ids_1N[0, position] = token
        task.advance()
        if int(token) in model.ends:
            return
        yield tokenizer.decode(int(token))


def main(prompt: str, overrides: Sequence[str], config_dir: str | None, max_tokens: int, temperature: float) -> None:
    """Print the prompt and what follows it as it comes; how long it took goes to standard error."""
    if max_tokens < 1:
        raise ValueError(f"--max-tokens {max_tokens}: must be an integer >= 1.")
    if temperature < 0:
        raise ValueError(f"--temperature {temperature}: must be a number >= 0.")
    refuse_other_keys(overrides, (*_READ, *_CALIBRATED_ON), "moe-lab generate")
    cfg = compose([*_DEFAULTS, *overrides], config_dir=config_dir)
    stamps = []
    with exact_products():
        pieces = generate(cfg, prompt, max_tokens, temperature)
        first = next(pieces, None)  # a mistake is found before anything is printed
        print(prompt, end="")
        for piece in [] if first is None else itertools.chain([first], pieces):
            print(piece, end="", flush=True)
            stamps.append(time.perf_counter())
    print()
    if len(stamps) > 1:
        ms = (stamps[-1] - stamps[0]) * 1e3 / (len(stamps) - 1)
        text = f"{len(stamps)} tokens, {ms:.3g} ms each after the first (execution={cfg.execution.name})"
        print(f"moe-lab: {text}", file=sys.stderr)
