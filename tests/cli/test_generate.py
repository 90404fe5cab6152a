"""generate.py: what a checkpoint writes is what its whole pass would choose, token by token."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from tokenizers import Tokenizer
from torch import Tensor

import moe_lab
from moe_lab.cli import generate as generate_module
from moe_lab.cli.commands import COMMANDS
from moe_lab.cli.generate import choose, generate
from moe_lab.config.compose import compose
from moe_lab.errors import UnavailableError
from moe_lab.models.attention_backend import Call
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.layers import Linear
from moe_lab.runs import build, passes
from tests import quick
from tests.conftest import needs_cxx
from tests.models import checkpoints, tokenizers
from tests.workloads.test_text import byte_level, word_level

PROMPT = ".SH NAMÉ\n"


def composed(*more: str, path: Path = quick.TINY_OLMOE) -> DictConfig:
    """As the command composes it."""
    return compose(["model=checkpoint", "router=native", f"model.path={path}", "device=cpu", *more])


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


@pytest.mark.parametrize(
    "chunk", [pytest.param(c, id=f"chunk{c}", marks=() if c == 4 else pytest.mark.slow) for c in (1, 4, 8, 99)]
)
def test_a_prompt_in_chunks_gives_the_same_text(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no pass over it has more tokens."""
    wanted, lengths = list(generate(composed(), PROMPT, 9)), []
    forward = Checkpoint.forward

    def noted(self: Checkpoint, ids_BS: Tensor, *arguments: object, **options: object) -> object:
        lengths.append(ids_BS.shape[1])
        return forward(self, ids_BS, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "forward", noted)
    assert list(generate(composed(), PROMPT, 9, prefill_chunk=chunk)) == wanted
    n = len(PROMPT.encode()) - 1
    assert lengths == [*([chunk] * (n // chunk)), *([n % chunk] if n % chunk else []), *[1] * 9]


def test_what_is_asked_of_torch_is_what_the_prompt_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not what a context of the usual length would: the prompt is one chunk."""
    checked, backend_of = [], passes.backend_of

    def noted(asked: str, call: Call) -> str:
        checked.append(call.kind)
        return backend_of(asked, call)

    monkeypatch.setattr(passes, "backend_of", noted)
    next(generate(composed(), PROMPT, 1, prefill_chunk=len(PROMPT.encode())))
    assert checked == ["causal"]


@pytest.mark.parametrize(
    ("router", "chunk", "said"),
    [
        pytest.param("native", 4, False, id="native"),
        pytest.param("capacity", 4, True, id="chunks"),
        pytest.param("capacity", len(PROMPT.encode()) - 1, False, id="one chunk"),
    ],
)
def test_a_router_that_sees_other_tokens_is_said_to_see_a_chunk(router: str, chunk: int, said: bool) -> None:
    """As a run says it."""
    lines: list[str] = []
    next(generate(composed(f"router={router}"), PROMPT, 1, say=lines.append, prefill_chunk=chunk))
    wanted = f"--prefill-chunk {chunk}: router={router} looks at the other tokens of a pass"
    assert [line for line in lines if line.startswith(wanted)] == [line for line in lines if "chunk" in line]
    assert any("chunk" in line for line in lines) == said


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


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [pytest.param(t, id=f"temperature{t}") for t in (0.0, 0.9)])
def test_the_host_waits_for_no_step(temperature: float) -> None:
    """But for the events of tokens that are being read; a wait of torch's own would be an error."""
    pieces = generate(composed("device=cuda", "execution=cuda_graph"), PROMPT, 20, temperature)
    first = next(pieces)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rest = list(pieces)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [first, *rest] == list(generate(composed("device=cuda"), PROMPT, 20, temperature))


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


# What a checkpoint says of itself

LETTERS = {97: 98, 98: 99, 99: 7, 7: 100, 100: 97}
"""a, b, c, the control character 7, d, and again."""


def written(path: Path, *more: str, prompt: str = "a", n: int = 8, temperature: float = 0.0) -> tuple[str, list[str]]:
    """The text, and what was said besides."""
    said: list[str] = []
    text = "".join(generate(composed(*more, path=path), prompt, n, temperature, said.append))
    return text, said


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in tokenizers.MAKERS.items()])
def test_no_space_is_lost_after_the_prompt(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Prompt and text together are what the tokenizer makes of all ids."""
    library = Tokenizer.from_file(str(make(tmp_path / "tokenizer.json")))
    ids = [library.encode(word).ids[-1] for word in tokenizers.WORDS]
    path = checkpoints.writes(tmp_path / "m", dict(itertools.pairwise([*ids, ids[0]])), 300)
    make(path / "tokenizer.json")
    text, _ = written(path, prompt="the", n=6)
    assert text == " sun is up the sun is"


@pytest.mark.parametrize(
    ("config", "generation", "text", "note"),
    [
        pytest.param(0, {"eos_token_id": [0, 7]}, "bc", None, id="more_ends"),
        pytest.param(..., {"eos_token_id": 7}, "bc", None, id="only_there"),
        pytest.param([0, 7], None, "bc", None, id="no_file"),
        pytest.param(7, {}, "bc", None, id="not_said_there"),
        pytest.param(7, {"eos_token_id": None}, "bc", None, id="null_there"),
        pytest.param(..., {"temperature": 1.0}, "bc\x07dabc\x07", None, id="nowhere"),
        pytest.param(99, {"eos_token_id": 7}, "bc", "ends at [7], and not at [99] as config.json says", id="conflict"),
        pytest.param(7, {"eos_token_id": 98}, "", "ends at [98], and not at [7]", id="at_once"),
        pytest.param(7, {"top_k": 5}, "bc", "top_k=5 not used; set --temperature", id="sampling"),
    ],
)
def test_the_text_ends_where_generation_config_says(
    config: object, generation: dict[str, object] | None, text: str, note: str | None, tmp_path: Path
) -> None:
    """It counts before config.json, and where they differ that is said."""
    path = checkpoints.writes(tmp_path / "m", LETTERS, eos_token_id=config)
    (path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    got, said = written(path)
    assert got == text
    assert said == [] if note is None else (len(said) == 1 and note in said[0])


@pytest.mark.parametrize("content", [pytest.param(c, id=c[:9] or "empty") for c in ("", "{", '{"eos_token_id": -1}')])
def test_a_damaged_generation_config_is_one_line(content: str, tmp_path: Path) -> None:
    """Before anything is written."""
    path = checkpoints.writes(tmp_path / "m", LETTERS)
    (path / "generation_config.json").write_text(content)
    assert "generation_config.json" in checkpoints.complaint(lambda: written(path))


def test_a_text_that_is_cut_says_so(tmp_path: Path) -> None:
    """By the model's longest sequence; not if it ends by itself before, or is as long as was asked for."""
    path = checkpoints.writes(tmp_path / "m", LETTERS, max_position_embeddings=4)
    text, said = written(path, n=8)
    assert text == "bc\x07" and said == ["--max-tokens 8: the text ends after 3, at the model's 4 positions."]
    assert written(path, n=3) == ("bc\x07", [])
    checkpoints.edit_config(path, eos_token_id=7)
    assert written(path, n=8) == ("bc", [])


@pytest.mark.parametrize("router", [pytest.param(name, id=name) for name in ("sinkhorn", "expert_choice", "native")])
def test_a_router_that_is_not_causal_is_named(router: str, tmp_path: Path) -> None:
    """The text is not what it gives for whole texts."""
    path = checkpoints.writes(tmp_path / "m", LETTERS)
    _, said = written(path, f"router={router}")
    assert [f"router={router} is not causal" in line for line in said] == ([] if router == "native" else [True])


def test_what_a_router_lacks_and_keys_that_nobody_reads_are_named(tmp_path: Path) -> None:
    """As a run records them."""
    path = checkpoints.writes(tmp_path / "m", LETTERS, logit_bias=0.5)
    _, said = written(path, "router=deepseek_v3", "router.n_groups=1", "router.top_groups=1", "router.scale=1")
    assert len(said) == 2 and "config.json has keys that moe-lab does not use: logit_bias;" in said[0]
    assert "the checkpoint has no bias_E for this router" in said[1]


@pytest.mark.parametrize(
    "override",
    [pytest.param(o, id=o) for o in ("batch=2", "measure.max_time_s=1", "seq_len=9", "workload=random", "export=none")],
)
def test_an_override_without_effect_is_refused(override: str, tmp_path: Path) -> None:
    """By its name; a router that is fitted reads some."""
    path = checkpoints.writes(tmp_path / "m", LETTERS)
    complaint = checkpoints.complaint(lambda: written(path, override))
    assert complaint.startswith(f"{override}: has no effect; moe-lab generate only uses model.*, router.*, ")


def test_what_a_router_is_fitted_on_may_be_set(tmp_path: Path) -> None:
    """Calibration reads windows of the workload."""
    path = checkpoints.writes(tmp_path / "m", LETTERS)
    assert written(path, "router=quantile", "router.calibration_tokens=64", "seq_len=16")[0]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        pytest.param("", "the prompt is empty", id="empty"),
        pytest.param("a" * 128, "the prompt has 128 tokens, but the model supports at most 128", id="as_long_as_all"),
        pytest.param("a" * 999, "the prompt has 999 tokens, but the model supports at most 128", id="longer"),
        pytest.param("a\udc80", "the prompt is not valid UTF-8 (at character 1)", id="no_utf8"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_a_mistake(prompt: str, said: str, tmp_path: Path) -> None:
    """In one line."""
    path = checkpoints.writes(tmp_path / "m", LETTERS)
    assert said in checkpoints.complaint(lambda: written(path, prompt=prompt))


def test_a_prompt_of_special_tokens_begins_a_text(tmp_path: Path) -> None:
    """Empty, where the tokenizer puts one in front; the first word has no space."""
    path = checkpoints.writes(tmp_path / "m", {1: 4, 4: 5, 5: 6}, 300)
    tokenizers.pieces(path / "tokenizer.json")
    assert written(path, prompt="", n=3)[0] == written(path, prompt="<s>", n=3)[0] == "sun is up"


def test_ids_without_text_are_named(tmp_path: Path) -> None:
    """Of a vocabulary that is filled up to a round number."""
    path = checkpoints.writes(tmp_path / "m", {1: 290, 290: 2, 2: 291, 291: 3, 3: 1}, 300)
    tokenizers.words(path / "tokenizer.json")
    text, said = written(path, prompt="the", n=7)
    assert text.split() == ["sun", "is", "the", "sun"]
    assert said == ["the tokenizer.json has no text for ids that were chosen: [290, 291]."]


def test_half_a_character_at_the_end_is_replaced(tmp_path: Path) -> None:
    """At the last token and at the end of the text; one that is whole is not."""
    path = checkpoints.writes(tmp_path / "m", {97: 0xC3, 0xC3: 0xA9, 0xA9: 0xE4, 0xE4: 0xB8, 0xB8: 7}, eos_token_id=7)
    texts = [written(path, n=n)[0] for n in range(1, 8)]
    assert texts == ["\ufffd", "é", "é\ufffd", "é\ufffd", *["é\ufffd"] * 3]


@pytest.mark.parametrize("bad", [pytest.param(bad, id=str(bad)) for bad in (torch.nan, torch.inf, -torch.inf)])
@pytest.mark.parametrize("temperature", [pytest.param(t, id=f"temperature{t}") for t in (0.0, 0.7)])
def test_logits_that_are_not_numbers_are_a_mistake(
    bad: float, temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite weights may overflow; -inf for some tokens is a mask, and for all a mistake."""
    path = checkpoints.writes(tmp_path / "m", LETTERS)
    finite = Linear.forward

    def forward(self: Linear, x: Tensor) -> Tensor:
        y = finite(self, x)
        return torch.full_like(y, bad) if y.shape[-1] == 256 else y

    monkeypatch.setattr(Linear, "forward", forward)
    message = checkpoints.complaint(lambda: written(path, temperature=temperature))
    assert message.startswith("the logits of position 0 are NaN, +inf or all -inf") and "dtype=" in message


def test_the_command_prints_the_text_as_it_is_and_notes_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard output has the text, standard error the warnings."""
    path = checkpoints.writes(tmp_path / "m", LETTERS, max_position_embeddings=4)
    capsys.readouterr()
    cfg = moe_lab.compose(["model=checkpoint", "router=native", f"model.path={path}", "device=cpu"])
    generate_module.main("a", cfg, 8, 0.0)
    out, err = capsys.readouterr()
    assert out == "abc\x07\n"
    assert err.startswith("warning: --max-tokens 8: the text ends after 3") and "moe-lab: 3 tokens" in err


def test_a_note_does_not_stand_in_the_text(tmp_path: Path) -> None:
    """On a terminal both are on one screen: the text's line ends first."""
    path = checkpoints.writes(tmp_path / "m", LETTERS, max_position_embeddings=4)
    command = [sys.executable, "-m", "moe_lab", "generate", "a", f"model.path={path}", "--max-tokens=8", "device=cpu"]
    both = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True).stdout
    assert b"abc\x07\nwarning: --max-tokens 8" in both


def test_no_token_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model may end the text at once."""
    (first,) = generate(composed(), PROMPT, 1)
    path = copied(tmp_path / "at_once", eos_token_id=ord(first))
    generate_module.main(PROMPT, composed(path=path), 8, 0.0)
    out, err = capsys.readouterr()
    assert out == f"{PROMPT}\n" and err == "moe-lab: no token: the model ended the text at once\n"


def test_a_seed_that_nothing_is_drawn_with_is_refused(tmp_path: Path) -> None:
    """With a temperature it chooses the draws."""
    path = checkpoints.writes(tmp_path / "m", LETTERS)
    complaint = checkpoints.complaint(lambda: written(path, "seed=1"))
    assert complaint == "seed=1: has no effect with --temperature 0, which draws nothing."
    assert written(path, "seed=1", temperature=1.0)[0]


def test_the_key_of_a_run_is_not_that_of_the_command() -> None:
    """It is told which option to give."""
    with pytest.raises(ValueError, match=r"^workload\.prefill_chunk=4: give --prefill-chunk 4 instead"):
        COMMANDS["generate"](["a", "model.path=x", "workload.prefill_chunk=4"])


@pytest.mark.parametrize("value", [pytest.param(v, id=str(v)) for v in (float("nan"), float("inf"), -0.1)])
def test_a_temperature_is_a_number(value: float) -> None:
    """0 and more."""
    message = checkpoints.complaint(lambda: generate_module.main("a", DictConfig({}), 8, value))
    assert message.startswith(f"--temperature {value}: must be a number >= 0")


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
    for temperature in (1e-4, 1e-40, 1e-320):
        assert {int(choose(logits_V, temperature, generator(seed))) for seed in range(20)} == {likeliest}
    assert len({int(choose(logits_V, 1e300, generator(seed))) for seed in range(20)}) > 5


def test_a_key_that_is_given_twice_is_a_mistake() -> None:
    """The last of both would hold, and the first be ignored; the command's own router may be replaced."""
    with pytest.raises(ValueError, match=r"^dtype=bf16: dtype is given twice \(dtype=fp32\); remove one\.$"):
        COMMANDS["generate"](["x", f"model.path={quick.TINY_OLMOE}", "dtype=fp32", "dtype=bf16"])
