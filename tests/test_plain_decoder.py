"""The plain decoder computes what our model and transformers do, in each of its ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.plain_decoder import PlainDecoder, Way
from moe_lab.models.checkpoint import Checkpoint
from tests import tiny
from tests.models import checkpoints

SUMS, SDPA = Way("sums", "torch", "gathered"), Way("sdpa", "torch", "gathered")
WAYS = [each._replace(experts=experts) for each in (SUMS, SDPA) for experts in ("gathered", "grouped")]
BATCH, PROMPT, STEPS = 3, 7, 5
MIXTRAL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "max_position_embeddings": 64,
}


OLMOE = tiny.ROOT / "assets" / "tiny-olmoe"


@pytest.fixture(params=["olmoe", "qwen3-moe", "mixtral"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param != "mixtral":
        return tiny.ROOT / "assets" / f"tiny-{request.param}"
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    from benchmarks import random_checkpoint

    random_checkpoint.write(random_checkpoint.SHAPES["mixtral_8x7b"] | MIXTRAL, tmp_path, 2, "cpu")
    return tmp_path


def plain(model: Checkpoint, batch: int = BATCH, *, compiled: bool = False) -> PlainDecoder:
    return PlainDecoder(model, model.make_cache(batch, PROMPT + STEPS), compiled=compiled)


def peer(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_same(y: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(y.argmax(-1), want.argmax(-1))


@torch.inference_mode()
@pytest.mark.parametrize("way", [pytest.param(way, id=str(way)) for way in WAYS])
def test_it_writes_the_same_text(folder: Path, way: Way) -> None:
    """Greedily in fp32, several sequences: the logits of each position too."""
    model, theirs = checkpoints.load(folder), peer(folder)
    decoder, cache = plain(model), model.make_cache(BATCH, PROMPT + STEPS)
    ids = checkpoints.ids(BATCH, PROMPT)
    logits = decoder(ids, torch.arange(PROMPT), way)
    assert_same(logits, model(ids, cache=cache, last=1).y)
    for at in range(PROMPT, PROMPT + STEPS):
        token, position = logits.argmax(-1), torch.tensor([at])
        ids = torch.cat([ids, token], dim=1)
        logits = decoder(token, position, way)
        assert_same(logits, model(token, cache=cache, position_S=position).y)
        assert_same(logits, theirs(ids).logits[:, -1:])


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_it_computes_the_same() -> None:
    """A token behind a prompt, by one graph for all layers, and one each for what is before and behind them."""
    torch.compiler.reset()
    counters["stats"].clear()
    model = checkpoints.load(OLMOE)
    decoder, cache = plain(model, 1, compiled=True), model.make_cache(1, PROMPT + STEPS)
    ids, position = checkpoints.ids(1, PROMPT + 1), torch.tensor([PROMPT])
    for kept, mine in zip(decoder.layers, cache.layers, strict=True):
        mine.k_BHNd, mine.v_BHNd = kept.k_BJNd, kept.v_BJNd
    model(ids[:, :PROMPT], cache=cache, last=1)
    way = SUMS._replace(products="sums")
    assert decoder.ways(1, 1) == [way, SUMS]
    logits = decoder(ids[:, PROMPT:], position, way)
    assert counters["stats"]["unique_graphs"] == 3
    assert_same(logits, model(ids[:, PROMPT:], cache=cache, position_S=position).y)


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_in_bf16_rows_are_grouped() -> None:
    """The prompts of several sequences, beside the same in fp32."""
    torch.compiler.reset()
    model, wide = checkpoints.load(OLMOE, torch.bfloat16), checkpoints.load(OLMOE)
    ids = checkpoints.ids(BATCH, PROMPT)
    decoder = plain(model, compiled=True)
    (way,) = decoder.ways(BATCH, PROMPT)
    y, want = (decoder(ids, torch.arange(PROMPT), way).float(), wide(ids).y[:, -1:])
    assert way.experts == "grouped" and (y - want).norm() < 0.05 * want.norm()


def test_nothing_is_copied(folder: Path) -> None:
    """Neither weights nor the cache."""
    model = checkpoints.load(folder)
    cache = model.make_cache(BATCH, PROMPT)
    decoder = PlainDecoder(model, cache, compiled=False)
    mine = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *cache.buffers())}
    layers = [tensor for layer in decoder.layers for tensor in layer if tensor is not None]
    used = (*layers, decoder.embed_VD, decoder.head_VD, decoder.norm_D)
    assert {each.untyped_storage().data_ptr() for each in used} == mine


@torch.inference_mode()
def test_products_of_a_row_may_be_sums(folder: Path) -> None:
    """So it is compiled; here it is not."""
    model = checkpoints.load(folder)
    decoder, token, position = plain(model, 1), torch.tensor([[5]]), torch.tensor([0])
    assert_same(decoder(token, position, SDPA._replace(products="sums")), model(token).y)


@pytest.mark.parametrize(
    ("batch", "length", "compiled", "ways"),
    [
        pytest.param(1, 1, False, {SUMS, SDPA}, id="a_token"),
        pytest.param(1, 1, True, {SUMS, SUMS._replace(products="sums")}, id="a_token_compiled"),
        pytest.param(8, 1, False, {*WAYS}, id="as_many_slots_as_experts"),
        pytest.param(9, 1, False, {way for way in WAYS if way.experts == "grouped"}, id="more"),
        pytest.param(9, 1, True, {SUMS, SDPA}, id="fp32_cannot_be_grouped_compiled"),
        pytest.param(1, 9, False, {SDPA._replace(experts="grouped")}, id="a_prompt"),
    ],
)
def test_ways_that_are_tried(batch: int, length: int, compiled: bool, ways: set[Way]) -> None:
    """Of 16 experts, 2 for each token."""
    decoder = plain(checkpoints.load(OLMOE), compiled=compiled)
    assert {*decoder.ways(batch, length)} == ways


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("mixtral", {"sliding_window": 4}, id="window"),
        pytest.param("olmoe", {"clip_qkv": 0.5}, id="clamped"),
        pytest.param(
            "olmoe", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}, id="rope"
        ),
        pytest.param("qwen3_moe", {"attention_bias": True}, id="biases"),
        pytest.param("qwen3_moe", {"mlp_only_layers": [1]}, id="dense_layer"),
        pytest.param("qwen2_moe", {}, id="shared_expert"),
        pytest.param("granitemoe", {}, id="multipliers"),
        pytest.param("gpt_oss", {}, id="gpt_oss"),
        pytest.param("minimax_m2", {}, id="sigmoid_router"),
        pytest.param("deepseek_v2", {}, id="latents"),
        pytest.param("lfm2_moe", {}, id="convolutions"),
    ],
)
def test_other_models_are_refused(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """It would compute something else."""
    model = checkpoints.build(checkpoints.checkpoint(kind, tmp_path, **settings))
    assert "leave it out of --peers" in checkpoints.complaint(lambda: plain(model))
