"""generate.py: what a checkpoint writes is what its whole pass would choose, token by token."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

import moe_lab
from moe_lab.cli.generate import choose, generate
from moe_lab.errors import UnavailableError
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.runs import build
from tests import quick
from tests.conftest import needs_cxx
from tests.models import checkpoints
from tests.workloads.test_text import byte_level, word_level

PROMPT = ".SH NAMÉ\n"


def composed(*more: str, path: Path = quick.TINY_OLMOE) -> DictConfig:
    """As the command composes it."""
    return moe_lab.compose(["model=checkpoint", "router=native", f"model.path={path}", "device=cpu", *more])


def by_whole_passes(cfg: DictConfig, ids: list[int], n: int) -> list[int]:
    """The likeliest next token n times, each from a pass over all before it."""
    model = build.build_model(cfg)
    for _ in range(n):
        ids = [*ids, int(model(torch.tensor([ids])).y[0, -1].argmax())]
    return ids[-n:]


def copied(folder: Path, **keys: object) -> Path:
    """The checkpoint of the repository with other keys in its configuration."""
    shutil.copytree(quick.TINY_OLMOE, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **keys}))
    return folder


@pytest.mark.parametrize("router", [pytest.param(name, id=name) for name in ("native", "switch")])
def test_the_text_is_what_whole_passes_choose(router: str) -> None:
    """With a router that sees each token alone; one piece a token, bytes put together to characters."""
    cfg = composed(f"router={router}")
    pieces = list(generate(cfg, PROMPT, 20))
    wanted = by_whole_passes(cfg, list(PROMPT.encode()), 20)
    assert len(pieces) == 20
    assert "".join(pieces) == bytes(wanted).decode(errors="replace")


def test_a_prompt_of_one_token_will_do() -> None:
    """Nothing is in the cache before it."""
    assert "".join(generate(composed(), "d", 8)) == bytes(by_whole_passes(composed(), [ord("d")], 8)).decode()


@needs_cxx
@pytest.mark.slow
def test_a_compiled_step_writes_the_same() -> None:
    """The execution changes the time, not the text."""
    assert list(generate(composed("execution=compile"), PROMPT, 9)) == list(generate(composed(), PROMPT, 9))


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [pytest.param(t, id=f"temperature{t}") for t in (0.0, 0.9)])
def test_a_captured_step_writes_the_same(temperature: float) -> None:
    """The position is read on the device, so the replayed graph goes on from token to token."""
    eager, captured = (
        list(generate(composed("device=cuda", f"execution={name}"), PROMPT, 60, temperature))
        for name in ("eager", "cuda_graph")
    )
    assert eager == captured


def test_the_text_stops_at_the_models_longest_sequence(tmp_path: Path) -> None:
    """Nine positions, of which the prompt takes six."""
    path = copied(tmp_path / "short", max_position_embeddings=9)
    assert len(list(generate(composed(path=path), "import", 100))) == 3
    with pytest.raises(ValueError, match="the prompt has 9 tokens, but the model supports at most 9; shorten it"):
        next(generate(composed(path=path), "import os", 100))


@pytest.mark.parametrize("listed", [pytest.param(False, id="number"), pytest.param(True, id="list")])
def test_the_text_ends_where_the_model_ends_it(listed: bool, tmp_path: Path) -> None:
    """Before the token that says so; that token may be the first."""
    written = by_whole_passes(composed(), list(PROMPT.encode()), 12)
    end = next(token for token in written if token != written[0])
    path = copied(tmp_path / "ending", eos_token_id=[7, end] if listed else end)
    pieces = list(generate(composed(path=path), PROMPT, 12))
    assert "".join(pieces).encode() == bytes(itertools.takewhile(lambda token: token != end, written))
    at_once = copied(tmp_path / "at_once", eos_token_id=written[0])
    assert list(generate(composed(path=at_once), PROMPT, 12)) == []


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in ("bytes", "words")])
def test_a_tokenizer_json_reads_the_prompt_and_writes_the_text(kind: str, tmp_path: Path) -> None:
    """Pieces add up to what it makes of all ids at once; that it was told to cut and to fill up is for training."""
    from tokenizers import Tokenizer

    path = checkpoints.checkpoint("mixtral", tmp_path / "m", vocab_size=300)
    file = path / "tokenizer.json"
    if kind == "bytes":
        byte_level(file)
    else:
        word_level(file, [f"w{number}" for number in range(298)])
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    cfg, prompt = composed(path=path), "w3 w5 w7"
    text = "".join(generate(cfg, prompt, 6))
    wanted = tokenizer.decode(by_whole_passes(cfg, tokenizer.encode(prompt).ids, 6))
    assert text.split() == wanted.split() != []


def test_without_a_tokenizer_other_ids_than_bytes_are_a_mistake(tmp_path: Path) -> None:
    """97 ids and no tokenizer.json."""
    path = checkpoints.checkpoint("mixtral", tmp_path / "m")
    with pytest.raises(ValueError, match=r"no tokenizer\.json found, and the 97 ids are not bytes; add"):
        next(generate(composed(path=path), "abc", 3))


def test_what_cannot_decode_is_unavailable() -> None:
    """Soft MoE needs whole sequences."""
    with pytest.raises(UnavailableError, match="router=soft"):
        next(generate(composed("router=soft"), "abc", 3))


def test_the_repositorys_model_is_the_one_that_is_read() -> None:
    """And it is bytes that it reads."""
    model = build.build_model(composed())
    assert isinstance(model, Checkpoint) and model.tokenizer_file is None and model.vocab_size == 256


# Choosing


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")])
def test_draws_are_as_frequent_as_the_softmax_says(dtype: torch.dtype) -> None:
    """Of 4000 draws each token's share is within five standard deviations; a masked token is never drawn."""
    logits_V, n = torch.tensor([1.0, 0.0, -1.0, -torch.inf, 2.0], dtype=dtype), 4000
    for temperature in (0.5, 1.0, 2.0):
        source = generator()
        drawn = torch.stack([choose(logits_V, temperature, source) for _ in range(n)])
        shares = drawn.bincount(minlength=5) / n
        wanted = (logits_V.double() / temperature).softmax(-1)
        assert ((shares - wanted).abs() <= 5 * (wanted * (1 - wanted) / n).sqrt()).all()


def test_a_low_temperature_and_none_choose_the_likeliest() -> None:
    """In the limit the draw is no draw."""
    logits_V: Tensor = torch.randn(97, generator=generator(1))
    likeliest = int(logits_V.argmax())
    assert int(choose(logits_V, 0.0, generator())) == likeliest
    assert {int(choose(logits_V, 1e-4, generator(seed))) for seed in range(20)} == {likeliest}
