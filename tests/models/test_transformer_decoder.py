"""models/transformer_decoder.py: shapes, causality, tied heads, and Llama and Qwen3 with the same weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_lab
from moe_lab import marks
from moe_lab.models.transformer_decoder import TransformerDecoder
from tests import tiny
from tests.models.peers import copy_decoder, decoder_settings, peer_model
from tests.tiny import LAYERS, VOCAB

SOURCES = sorted((tiny.ROOT / "moe_lab/models").glob("*.py"))


def decoder(*overrides: str) -> TransformerDecoder:
    model = moe_lab.build_model(tiny.transformer_decoder(*overrides))
    assert isinstance(model, TransformerDecoder)
    return model


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("batch", "length"),
    [pytest.param(1, 1, id="b1_s1"), pytest.param(1, 9, id="b1_s9"), pytest.param(3, 7, id="b3_s7")],
)
def test_logits_are_batch_by_sequence_by_vocabulary(batch: int, length: int) -> None:
    """And a dense decoder routes nothing."""
    model = decoder()
    output = model(ids(batch, length))
    assert output.y.shape == (batch, length, VOCAB)
    assert output.routings == ()
    assert model.input_shape(batch, length) == (batch, length) and model.vocab_size == VOCAB


@pytest.mark.parametrize("at", [pytest.param(t, id=f"t{t}") for t in (0, 3, 6)])
def test_a_token_changes_no_earlier_logits(at: int) -> None:
    """Causality of the whole decoder."""
    model, one_BS = decoder(), ids(2, 7)
    other_BS = one_BS.clone()
    other_BS[:, at] = (other_BS[:, at] + 1) % VOCAB
    one, other = model(one_BS).y, model(other_BS).y
    assert torch.equal(one[:, :at], other[:, :at])
    assert (one[:, at:] != other[:, at:]).any(-1).all()


def test_what_mixes_tokens_is_timed_as_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever it is: the block marks the phase, once, behind the norm."""
    told: list[str] = []

    class Mixer(nn.Module):
        def forward(self, x_BSD: Tensor, *_: Any) -> Tensor:
            told.append("computed")
            return x_BSD

    model = decoder()
    for block in model.layers:
        block.attention = Mixer()
        block.attention_norm.register_forward_hook(lambda *_: told.append("normed"))
    monkeypatch.setattr(marks, "_listener", SimpleNamespace(start=told.append, stop=lambda name: told.append("end")))
    model(ids(2, 3))
    assert told == ["normed", "attention", "computed", "end"] * LAYERS


def test_sequences_do_not_see_each_other() -> None:
    """A row of the batch is as if it were alone."""
    model, ids_BS = decoder(), ids(3, 7)
    alone = torch.cat([model(row[None]).y for row in ids_BS])
    torch.testing.assert_close(model(ids_BS).y, alone, rtol=1e-4, atol=1e-5)


def test_a_prefix_has_the_logits_of_the_whole() -> None:
    """Length changes nothing for the tokens that are there."""
    model, ids_BS = decoder(), ids(2, 7)
    torch.testing.assert_close(model(ids_BS[:, :4]).y, model(ids_BS).y[:, :4], rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_the_embedding() -> None:
    """Logits are products of the last hidden state with the embedding's rows."""
    tied, untied = decoder("model.tie_embeddings=true"), decoder("model.tie_embeddings=false")
    assert tied.head.weight is tied.embed.weight
    untied.head.weight.copy_(untied.embed.weight)
    assert torch.equal(tied(ids(2, 5)).y, untied(ids(2, 5)).y)


def test_key_heads_default_to_all_heads() -> None:
    """n_kv_heads: null is no grouping, written out the same model."""
    assert torch.equal(decoder()(ids(1, 5)).y, decoder("model.n_kv_heads=4")(ids(1, 5)).y)


@pytest.mark.parametrize(
    ("overrides", "shapes"),
    [
        pytest.param(["model.n_kv_heads=2"], {"k": (16, 32), "v": (16, 32), "q": (32, 32)}, id="grouped"),
        pytest.param(["model.head_dim=6"], {"q": (24, 32), "o": (32, 24)}, id="head_dim"),
    ],
)
def test_projections_have_the_widths_of_their_heads(overrides: list[str], shapes: dict[str, tuple[int, int]]) -> None:
    """n_heads and n_kv_heads times head_dim."""
    attention = decoder(*overrides).layers[0].attention
    assert {name: tuple(getattr(attention, name).weight.shape) for name in shapes} == shapes


@pytest.mark.parametrize(
    ("kind", "width"),
    [pytest.param("none", None, id="none"), pytest.param("head", 8, id="head"), pytest.param("full", 32, id="full")],
)
def test_query_norms_have_the_width_of_their_kind(kind: str, width: int | None) -> None:
    """One weight for every head, or one over the whole projection."""
    model = decoder(f"model.qk_norm={kind}")
    norm = model.layers[0].attention.q_norm
    assert (None if norm is None else norm.weight.numel()) == width
    assert model(ids(1, 3)).y.isfinite().all()


def test_every_layer_takes_part() -> None:
    """Changing any one layer's MLP changes the logits."""
    model, ids_BS = decoder(), ids(1, 5)
    before = model(ids_BS).y.clone()
    for block in model.layers:
        weight = block.mlp.down.weight
        kept = weight.clone()
        weight.zero_()
        assert not torch.allclose(model(ids_BS).y, before)
        weight.copy_(kept)
    assert len(model.layers) == LAYERS
    assert torch.equal(model(ids_BS).y, before)


@pytest.mark.parametrize(
    ("peer", "overrides"),
    [
        pytest.param("llama", [], id="llama"),
        pytest.param("llama", ["model.n_kv_heads=2", "model.rope_theta=500"], id="llama_grouped_other_base"),
        pytest.param("llama", ["model.tie_embeddings=true"], id="llama_tied"),
        pytest.param("qwen3", ["model.qk_norm=head", "model.n_kv_heads=2", "model.head_dim=6"], id="qwen3"),
    ],
)
def test_logits_are_those_of_transformers_with_the_same_weights(peer: str, overrides: list[str]) -> None:
    """An independent implementation of the same architecture."""
    model = decoder(*overrides)
    other = peer_model(peer, **decoder_settings(model))
    copy_decoder(model, other)
    ids_BS = ids(2, 7)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids_BS).y, other(ids_BS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", [pytest.param(path, id=path.name) for path in SOURCES])
def test_a_models_source_can_be_read_in_one_sitting(source: Path) -> None:
    """Each file of models/ stays under 300 lines."""
    assert len(source.read_text().splitlines()) < 300
