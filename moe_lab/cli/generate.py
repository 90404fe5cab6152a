"""`moe-lab generate`: the text that a checkpoint writes, one token at a time from its cache."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
from omegaconf import DictConfig
from torch import Tensor

from moe_lab.config.checks import refuse_other_keys
from moe_lab.config.unread import key_of
from moe_lab.measure.clocks import STEPS
from moe_lab.measure.tolerances import exact_products
from moe_lab.models import generation_config
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.checkpoint_keys import shown, some
from moe_lab.models.moe_layer import moe_layers
from moe_lab.models.serving import Decode
from moe_lab.models.tokenizer import Bytes, Stream, Tokenizer
from moe_lab.records.identity import option_name
from moe_lab.runs import build, passes, trained
from moe_lab.terminal import write_data

_COMMAND = "moe-lab generate"
_READ = ("model.*", "router.*", "experts.*", "device", "dtype", "execution", "seed")
_CALIBRATED_ON = ("workload", "workload.path", "seq_len")
"""What it reads of a configuration; the latter only for a router that is fitted on a text."""

Say = Callable[[str], None]


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _tokenizer_of(model: Checkpoint) -> Bytes | Tokenizer:
    if model.tokenizer_file is not None:
        return Tokenizer(model.tokenizer_file, model.vocab_size)
    if model.vocab_size != 256:
        raise ValueError(
            f"model.path={model.folder}: no tokenizer.json found, and the {model.vocab_size} ids are not bytes; add "
            "the checkpoint's tokenizer.json."
        )
    return Bytes()


def choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """The next token, int64 []: the likeliest, or with a temperature one drawn from softmax(logits / temperature).

    With q exponential, p / q is largest at i with the probability p_i. torch.multinomial does this too, but waits for
    the device to look whether p is valid.
    """
    if temperature == 0:
        return logits_V.argmax()
    below_V = logits_V.double() - logits_V.max()  # so that no temperature makes them infinite
    p_V = (below_V / temperature).softmax(-1)
    return (p_V / torch.empty_like(p_V).exponential_(generator=generator)).argmax()


def _require_logits(largest: float, position: int) -> None:
    if not math.isfinite(largest):  # NaN if any is; -inf only if all are
        raise ValueError(
            f"the logits of position {position} are NaN, +inf or all -inf, so no token can be chosen; check the "
            "weights, and use dtype=bf16 or fp32 if they overflow in fp16."
        )


def _encode(tokenizer: Bytes | Tokenizer, prompt: str, longest: int) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid UTF-8 (at character {error.start}); retype it.") from error
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty; give some text to continue.")
    if len(ids) >= longest:
        raise ValueError(f"the prompt has {len(ids)} tokens, but the model supports at most {longest}; shorten it.")
    return ids


def _ends_of(model: Checkpoint, say: Say) -> frozenset[int]:
    """The ids that end a text; `say` what the checkpoint asks for besides."""
    given = generation_config.read(model.folder, model.vocab_size)
    file = generation_config.FILE
    if given.unread:
        say(f"{file}: {some(given.unread)} not used; set --temperature and --max-tokens.")
    if given.ends is None:
        return model.ends
    if more := sorted(model.ends - given.ends):
        say(f"{file}: the text ends at {sorted(given.ends)}, and not at {more} as config.json says.")
    return given.ends


def _say_what_is_odd(cfg: DictConfig, model: Checkpoint, say: Say) -> None:
    """What of the model or its router makes the text another than the trained model would write."""
    router = option_name(cfg.router)
    for text in trained.warnings(cfg, model):
        say(text)
    if not all(layer.router.causal for layer in moe_layers(model)):
        say(
            f"router={router} is not causal: a token's experts depend on later tokens, which a text that is being "
            "written does not have; the text is not what this router gives for whole texts."
        )
    of_chunks = (passes.chunk_warning(cfg, layer.router) for layer in moe_layers(model))
    if (warning := next(filter(None, of_chunks), None)) is not None:
        say(f"--prefill-chunk {cfg.workload.prefill_chunk}: {warning}; leave it out.")


def generate(
    cfg: DictConfig,
    prompt: str,
    max_tokens: int,
    temperature: float = 0.0,
    say: Say = warn,
    prefill_chunk: int | None = None,
) -> Iterator[str]:
    """The pieces of text that follow `prompt`, at most `max_tokens` tokens, until the model ends it.

    What is left at the end of a character that did not become whole is replaced by U+FFFD. `say` gets what a person
    should know. `prefill_chunk` tokens of the prompt are one pass; None: all.

    Raises:
        ValueError: no checkpoint, an empty prompt, one that leaves no room in the model's longest sequence, a damaged
            tokenizer or generation_config.json, an override without effect, or logits that are NaN.
        UnavailableError: an implementation or a device that is not here.
    """
    if not trained.is_checkpoint(cfg.model):
        raise ValueError(
            f"model={option_name(cfg.model)}: cannot generate text, because it is not trained; use model=checkpoint."
        )
    refuse_other_keys(cfg.overrides, (*_READ, *_CALIBRATED_ON), _COMMAND)
    device = build.resolve_device(cfg)
    model = build.build_model(cfg, device)
    assert isinstance(model, Checkpoint)
    if not any(layer.router.calibrates for layer in moe_layers(model)):
        refuse_other_keys(cfg.overrides, _READ, _COMMAND)
        if temperature == 0 and (seed := next((each for each in cfg.overrides if key_of(each) == "seed"), None)):
            raise ValueError(f"{seed}: has no effect with --temperature 0, which draws nothing.")
    tokenizer = _tokenizer_of(model)
    ids = _encode(tokenizer, prompt, model.max_positions)
    cfg.workload.phase, cfg.workload.prefill_chunk = "decode", prefill_chunk
    cfg.workload.context_len = max(len(ids) - 1, 1)
    build.require_runnable(cfg, model, device)
    ends = _ends_of(model, say)
    _say_what_is_odd(cfg, model, say)
    n = min(max_tokens, model.max_positions - len(ids))
    ids_1N = torch.zeros(1, len(ids) + n, dtype=torch.int64, device=device)
    ids_1N[0, : len(ids)] = torch.tensor(ids)
    stream, without_text = Stream(tokenizer, ids), set()
    for number, token in enumerate(_tokens(cfg, model, ids_1N, len(ids), temperature), 1):
        if token in ends:
            if rest := stream.end():
                yield rest
            break
        if not tokenizer.has_text(token):
            without_text.add(token)
        yield stream.add(token) + (stream.end() if number == n else "")
    else:
        if n < max_tokens:
            say(f"--max-tokens {max_tokens}: the text ends after {n}, at the model's {model.max_positions} positions.")
    if without_text:
        say(f"the tokenizer.json has no text for ids that were chosen: {shown(sorted(without_text))}.")


def _tokens(cfg: DictConfig, model: Checkpoint, ids_1N: Tensor, n_prompt: int, temperature: float) -> Iterator[int]:
    """One chosen token after the other; each is also written into `ids_1N`.

    On CUDA a token is read while the step behind it is computed, so the GPU does not wait for the host.
    """
    cache = model.make_cache(1, ids_1N.shape[1])
    task = Decode(model, cache, n_prompt - 1, chunk=cfg.workload.prefill_chunk)
    if n_prompt > 1:
        task.fill(ids_1N)
    step = STEPS[cfg.execution.name](task, ids_1N)
    generator = torch.Generator(ids_1N.device).manual_seed(int(cfg.seed))
    on_way: deque[Callable[[], int]] = deque()
    for position in range(n_prompt, ids_1N.shape[1]):
        logits_V = step().y[0, -1]
        token = choose(logits_V, temperature, generator)
        ids_1N[0, position] = token
        task.advance()
        on_way.append(_reader(token, logits_V, position - 1))
        if len(on_way) > ids_1N.is_cuda:
            yield on_way.popleft()()
    yield from (read() for read in on_way)


def _reader(token: Tensor, logits_V: Tensor, position: int) -> Callable[[], int]:
    """Starts to copy a token to the host; what it returns waits for the token, and raises for logits that are NaN."""
    chosen = torch.stack([token.double(), logits_V.max().double()])
    on_host = chosen.to("cpu", non_blocking=True)
    copied = torch.cuda.Event() if chosen.is_cuda else None
    if copied is not None:
        copied.record()

    def read() -> int:
        if copied is not None:
            copied.synchronize()
        _require_logits(float(on_host[1]), position)
        return int(on_host[0])

    return read


def main(prompt: str, cfg: DictConfig, max_tokens: int, temperature: float, prefill_chunk: int | None = None) -> None:
    """Print the prompt and what follows it as it comes; how long it took goes to standard error."""
    if max_tokens < 1:
        raise ValueError(f"--max-tokens {max_tokens}: must be an integer >= 1.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"--temperature {temperature}: must be a number >= 0.")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"--prefill-chunk {prefill_chunk}: must be an integer >= 1.")
    stamps, later = list[float](), list[str]()
    writes = False

    def say(text: str) -> None:
        if writes:  # not into the text
            later.append(text)
        else:
            warn(text)

    with exact_products():
        pieces = generate(cfg, prompt, max_tokens, temperature, say, prefill_chunk)
        first = list(itertools.islice(pieces, 1))  # a mistake is found before anything is printed
        write_data(prompt)
        writes = True
        try:
            for piece in itertools.chain(first, pieces):
                write_data(piece)
                sys.stdout.flush()
                stamps.append(time.perf_counter())
        finally:
            print(flush=True)
            for text in later:
                warn(text)
    if not stamps:
        print("moe-lab: no token: the model ended the text at once", file=sys.stderr)
    if len(stamps) > 1:
        ms = (stamps[-1] - stamps[0]) * 1e3 / (len(stamps) - 1)
        rate = f"{ms:.3g} ms each after the first, {1e3 / ms:.3g} tokens/s"
        text = f"{len(stamps)} tokens, {rate} (execution={cfg.execution.name})"
        print(f"moe-lab: {text}", file=sys.stderr)
