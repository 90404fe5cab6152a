"""A single mistake of the loader, planted: the logits are then not those of transformers, so a test sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lab.models import checkpoint_config, checkpoint_names, transformer_decoder
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.checkpoint_config import Settings
from moe_lab.models.checkpoint_forms import AS_IT_IS
from moe_lab.models.checkpoint_names import Naming, Source
from moe_lab.models.rope import Rope
from tests.models.checkpoints import ids, load, save, trained
from tests.models.test_checkpoint import ATOL, computed

Plant = Callable[[pytest.MonkeyPatch], None]


def reads(change: Callable[[Settings], dict[str, Any]]) -> Plant:
    """The configuration is read with other settings."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        read = checkpoint_config.read
        patch.setattr(checkpoint_config, "read", lambda folder: replace(s := read(folder), **change(s)))

    return plant


def said(**keys: Any) -> Plant:
    """The configuration is taken to say something else."""
    return reads(lambda settings: keys)


def setting(**keys: Any) -> Plant:
    """The decoder has another setting."""
    return reads(lambda settings: {"decoder": {**settings.decoder, **keys}})


def expert_setting(**keys: Any) -> Plant:
    """The experts have another setting."""
    return reads(
        lambda settings: {
            "decoder": {**settings.decoder, "expert_settings": {**settings.decoder["expert_settings"], **keys}}
        }
    )


def growing(beta: float, length: int) -> Plant:
    """Queries grow in another way with their position."""
    return reads(lambda s: {"decoder": {**s.decoder, "latent": {**s.decoder["latent"], "growth": (beta, length)}}})


def router(**keys: Any) -> Plant:
    """The native router has another setting."""
    return reads(lambda settings: {"router": {**settings.router, **keys}})


def mapped(change: Callable[[str, list[Source]], list[Source]]) -> Plant:
    """The tensors of each parameter are changed."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        sources = checkpoint_names.sources

        def changed(name: str, shape: Sequence[int], naming: Naming) -> list[list[Source]]:
            return [change(name, layout) for layout in sources(name, shape, naming)]

        patch.setattr(checkpoint_names, "sources", changed)

    return plant


def exchanged(one: str, other: str) -> Plant:
    """Two parameters of each layer have each other's tensors."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        sources = checkpoint_names.sources

        def changed(name: str, shape: Sequence[int], naming: Naming) -> list[list[Source]]:
            swapped = name.replace(one, "\0").replace(other, one).replace("\0", other)
            return sources(swapped, shape, naming)

        patch.setattr(checkpoint_names, "sources", changed)

    return plant


def form(parameter: str, **keys: Any) -> Plant:
    """One parameter is read in another form."""

    def change(name: str, layout: list[Source]) -> list[Source]:
        if not name.endswith(parameter):
            return layout
        return [source._replace(form=replace(source.form, **keys)) for source in layout]  # type: ignore[type-var]

    return mapped(change)


def loaded(parameter: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Plant:
    """One parameter of every layer is changed once it is loaded and in our order."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        load_parameters = Checkpoint.load_parameters

        def changed(model: Checkpoint, parameters: Any) -> None:
            load_parameters(model, parameters)
            found = [tensor for name, tensor in parameters.items() if name.endswith(parameter)]
            assert found
            for tensor in found:
                tensor.data.copy_(change(tensor.data.clone()))

        patch.setattr(Checkpoint, "load_parameters", changed)

    return plant


def zeroed(parameter: str) -> Plant:
    """One parameter of every layer is dropped."""
    return loaded(parameter, torch.zeros_like)


def without_softmax_scale(patch: pytest.MonkeyPatch) -> None:
    """mscale_all_dim is forgotten."""
    patch.setattr(transformer_decoder, "softmax_scale", lambda scaling: 1.0)


def turned_side_by_side(patch: pytest.MonkeyPatch) -> None:
    """Tables for dimensions that are turned with their neighbours."""
    forward = Rope.forward

    def tables(rope: Rope, length: int, device: torch.device) -> Any:
        half = rope.head_dim // 2
        return tuple(table[:, :half].repeat_interleave(2, 1) for table in forward(rope, length, device))

    patch.setattr(Rope, "forward", tables)


_ANYWHERE = [
    ("gate_and_up_exchanged", loaded("w_gate_up_E2FD", lambda w: torch.cat([*reversed(w.chunk(2, 1))], 1))),
    ("norms_exchanged", exchanged("attention_norm", "mlp_norm")),
]
_OF_ALL = [
    *_ANYWHERE,
    ("keys_and_values_exchanged", exchanged("attention.k.", "attention.v.")),
    ("rotation_order", turned_side_by_side),
    ("weights_not_renormalised", router(renormalize=False)),
]
_ALL_SPARSE = said(dense_layers=frozenset())
_OF_LATENT = [
    *_ANYWHERE,
    ("rotation_order", said(interleaved=False)),
    ("no_growth_of_the_softmax", without_softmax_scale),
    ("plain_rope", setting(rope_scaling=None)),
    ("query_norm_dropped", loaded("q_down_norm.weight", torch.ones_like)),
    ("latent_norm_dropped", loaded("kv_down_norm.weight", torch.ones_like)),
    ("key_before_the_latent", loaded("kv_down.weight", lambda w: w.roll(8, 0))),
    ("values_before_keys", loaded("kv_up.weight", lambda w: w.unflatten(0, (4, 16)).roll(6, 1).flatten(0, 1))),
    ("heads_turned_first", loaded("q_up.weight", lambda w: w.unflatten(0, (4, 14)).roll(8, 1).flatten(0, 1))),
    ("latent_bias_dropped", zeroed("kv_down.bias")),
    ("output_bias_dropped", zeroed("attention.o.bias")),
    ("shared_experts_dropped", zeroed("shared.mlp.down.weight")),
    ("shared_gate_and_up_exchanged", loaded("shared.mlp.gate_up.weight", lambda w: w.roll(len(w) // 2, 0))),
    ("all_layers_sparse", _ALL_SPARSE),
    ("no_groups", router(n_groups=1, top_groups=1)),
    ("weights_not_scaled", router(scale=1.0)),
]
_OF_GLM = [
    *_ANYWHERE,
    ("shared_experts_dropped", zeroed("shared.mlp.down.weight")),
    ("router_bias_dropped", zeroed("router.bias_E")),
    ("best_of_a_group", router(group_score="max")),
    ("weights_not_scaled", router(scale=1.0)),
    ("weights_not_renormalised", router(renormalize=False)),
]
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}


def not_regrouped(part: str) -> Plant:
    """The rows of a matrix are taken as they are in the file."""

    def change(name: str, layout: list[Source]) -> list[Source]:
        return (
            [source._replace(form=AS_IT_IS) for source in layout]
            if name.endswith(f"attention.{part}.weight")
            else layout
        )

    return mapped(change)


def not_centred(patch: pytest.MonkeyPatch) -> None:
    """The weights of zero-centred norms are taken for those of usual ones."""
    patch.setattr(checkpoint_names, "_ZERO_CENTRED", frozenset())


_KEYS, _VALUES = 2 * 6, 4 * 10


def _values_by_the_other_order(w: torch.Tensor) -> torch.Tensor:
    """A query's heads of values are not neighbours."""
    values = w[2 * _KEYS : 2 * _KEYS + _VALUES].unflatten(0, (2, 2, 10)).transpose(0, 1).flatten(0, 2)
    return torch.cat([w[: 2 * _KEYS], values, w[2 * _KEYS + _VALUES :]])


_OF_GATED = [
    *_ANYWHERE,
    ("rotation_order", said(interleaved=True)),
    ("usual_norms", not_centred),
    ("all_turned", setting(rotary_dim=16)),
    ("no_norm_of_heads", setting(qk_norm="none")),
    ("queries_and_gate_not_by_heads", not_regrouped("q")),
    ("queries_and_gate_exchanged", loaded("attention.q.weight", lambda w: w.roll(len(w) // 2, 0))),
    ("keys_and_values_exchanged", exchanged("attention.k.", "attention.v.")),
    (
        "queries_and_keys_of_the_net_exchanged",
        loaded("qkvz.weight", lambda w: torch.cat([w[_KEYS : 2 * _KEYS], w[:_KEYS], w[2 * _KEYS :]])),
    ),
    (
        "values_and_gate_of_the_net_exchanged",
        loaded("qkvz.weight", lambda w: torch.cat([w[: 2 * _KEYS], w[2 * _KEYS :].roll(_VALUES, 0)])),
    ),
    ("beta_and_decay_exchanged", loaded("ba.weight", lambda w: w.roll(len(w) // 2, 0))),
    ("convolution_backwards", loaded("conv.weight", lambda w: w.flip(2))),
    ("decay_dropped", zeroed("a_log_H")),
    ("decay_bias_dropped", zeroed("dt_bias_H")),
    ("norm_of_the_net_dropped", loaded("attention.norm.weight", torch.ones_like)),
    ("shared_expert_without_its_gate", setting(shared_expert_gate=False)),
    ("shared_expert_dropped", setting(shared_expert_hidden_dim=0)),
    ("weights_not_renormalised", router(renormalize=False)),
]


def of_layers(**keys: Any) -> Plant:
    """Every layer's attention has other settings."""
    return reads(lambda s: {"decoder": {**s.decoder, "by_layer": [each | keys for each in s.decoder["by_layer"]]}})


# Weights that are not renormalised are no mistake there: the norm of what the experts give takes their sum out.
_OF_GEMMA = [
    *_ANYWHERE[:1],
    ("rotation_order", turned_side_by_side),
    ("norms_around_attention_exchanged", exchanged("attention_norm", "norm_after_attention")),
    ("norms_around_the_mlp_exchanged", exchanged("mlp.shared.norm_before", "norm_after_mlp")),
    ("norms_of_mlp_and_experts_exchanged", exchanged("shared.norm_after", "norms.norm_after")),
    ("inputs_of_mlp_and_experts_exchanged", exchanged("shared.norm_before", "norms.norm_before")),
    ("gate_without_its_scale", loaded("gate_norm.weight", lambda w: torch.full_like(w, len(w) ** -0.5))),
    ("gate_scale_not_divided", form("gate_norm.weight", factor=1.0)),
    ("experts_not_scaled", loaded("weights.scale_E", torch.ones_like)),
    ("layers_not_scaled", loaded("scale_1", torch.ones_like)),
    ("embedding_not_scaled", setting(embedding_scale=1.0)),
    ("usual_attention_scale", setting(scale=None)),
    ("values_not_normed", setting(value_norm=False)),
    ("query_norm_dropped", loaded("q_norm.weight", torch.ones_like)),
    ("no_windows", setting(windows=None)),
    ("one_theta", of_layers(rope_theta=100.0)),
    ("usual_rope", of_layers(rope_scaling=None)),
    ("silu_in_experts", expert_setting(activation=None)),
    ("silu_in_the_mlp", setting(activation=None)),
    ("mlp_dropped", zeroed("shared.mlp.down.weight")),
    ("logits_not_capped", setting(logits_cap=None)),
]
_OF_DEEPSEEK = {
    "attention_bias": True,
    "n_routed_experts": 6,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "rope_parameters": {**_YARN, "mscale": 0.8, "mscale_all_dim": 0.8},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_OF_DEEPSEEK, "topk_method": "group_limited_greedy", "topk_group": 1},
    "deepseek_v3": _OF_DEEPSEEK,
    "glm4_moe": {"use_qk_norm": True, "attention_bias": True},
    "mistral4": {"attention_bias": True},
    "dots1": {"attention_bias": True, "sliding_window": 4, "max_window_layers": 1},
    "solar_open": {"attention_bias": True},
    "minimax_m2": {"rotary_dim": 8},
    "lfm2_moe": {"conv_bias": True, "routed_scaling_factor": 2.5},
    "qwen3_next": {"attention_bias": True},
}
"""With which a mistake has an effect, where that is not the plain model."""
MISTAKES: dict[str, list[tuple[str, Plant]]] = {
    "gemma4": _OF_GEMMA,
    "gemma4_text": _OF_GEMMA,
    "qwen3_next": [
        *_OF_GATED,
        ("rows_of_the_net_not_by_heads", not_regrouped("qkvz")),
        ("beta_and_decay_not_by_heads", not_regrouped("ba")),
        ("heads_of_values_in_the_other_order", loaded("qkvz.weight", _values_by_the_other_order)),
        ("query_bias_dropped", zeroed("attention.q.bias")),
        ("output_bias_dropped", zeroed("attention.o.bias")),
    ],
    "qwen3_5_moe": _OF_GATED,
    "qwen3_5_moe_text": _OF_GATED,
    "deepseek_v2": [
        *_OF_LATENT,
        ("weights_renormalised", router(renormalize=True)),
        ("two_best_of_a_group", router(group_score="top2")),
    ],
    "deepseek_v3": [
        *_OF_LATENT,
        ("weights_not_renormalised", router(renormalize=False)),
        ("best_of_a_group", router(group_score="max")),
        ("weights_by_a_softmax", router(score="softmax")),
        ("router_bias_dropped", zeroed("router.bias_E")),
        ("router_bias_negated", loaded("router.bias_E", torch.neg)),
    ],
    "mistral4": [
        *(each for each in _OF_LATENT if each[0] != "plain_rope"),
        ("queries_do_not_grow", growing(0.0, 8)),
        ("queries_grow_in_longer_steps", growing(0.7, 12)),
        ("weights_not_renormalised", router(renormalize=False)),
        ("best_of_a_group", router(group_score="max")),
        ("weights_by_a_sigmoid", router(score="sigmoid")),
    ],
    "glm4_moe": [
        *_OF_GLM,
        ("all_turned", setting(rotary_dim=12)),
        ("turned_side_by_side_in_the_files", said(interleaved=True)),
        ("query_norm_dropped", loaded("q_norm.weight", torch.ones_like)),
        ("query_bias_dropped", zeroed("attention.q.bias")),
        ("key_norm_in_the_files_order", loaded("k_norm.weight", lambda w: w.roll(3))),
    ],
    "glm4_moe_lite": [*_OF_GLM, ("rotation_order", said(interleaved=False)), ("all_layers_sparse", _ALL_SPARSE)],
    "dots1": [
        *_OF_GLM,
        ("no_windows", setting(windows=None)),
        ("windows_on_other_layers", setting(windows=[4, None, None])),
        ("norm_of_all_heads", setting(qk_norm="full")),
        ("output_bias_dropped", zeroed("attention.o.bias")),
    ],
    "solar_open": [
        *_OF_GLM,
        ("rotation_order", said(interleaved=True)),
        ("value_bias_dropped", zeroed("attention.v.bias")),
    ],
    "minimax_m2": [
        *_OF_ALL,
        ("all_turned", setting(rotary_dim=12)),
        ("norm_of_each_head", setting(qk_norm="head")),
        ("no_norm", setting(qk_norm="none")),
        ("router_bias_dropped", zeroed("router.bias_E")),
        ("weights_by_a_softmax", router(score="softmax")),
    ],
    "granitemoe": [
        *_OF_ALL,
        ("no_embedding_multiplier", setting(embedding_scale=1.0)),
        ("no_residual_multiplier", setting(residual_scale=1.0)),
        ("logits_multiplied", setting(logits_scale=1.6)),
        ("usual_attention_scale", setting(scale=None)),
    ],
    "ernie4_5_moe": [
        *_OF_ALL,
        ("selection_bias_dropped", zeroed("router.bias_E")),
        ("sigmoid_scores", router(score="sigmoid")),
        ("no_shared_experts", setting(shared_expert_hidden_dim=0)),
        ("rotation_of_halves", said(interleaved=False)),
    ],
    "lfm2_moe": [
        *_OF_ALL,
        ("convolution_backwards", loaded("attention.conv.weight", lambda w: w.flip(2))),
        ("gates_of_the_convolution_exchanged", loaded("attention.into.weight", lambda w: w.roll(32, 0))),
        ("convolution_bias_dropped", zeroed("attention.conv.bias")),
        ("bias_into_the_convolution_dropped", zeroed("attention.into.bias")),
        ("selection_bias_dropped", zeroed("router.bias_E")),
        ("softmax_scores", router(score="softmax")),
        ("weights_not_scaled", router(scale=1.0)),
        ("key_norm_dropped", loaded("k_norm.weight", torch.ones_like)),
        ("one_dense_layer_more", said(dense_layers=frozenset({0, 1}))),
    ],
    "hunyuan_v1_moe": [
        *_OF_ALL,
        ("norms_before_the_rotation", setting(turn_first=False)),
        ("no_shared_expert", setting(shared_expert_hidden_dim=0)),
        ("query_norm_dropped", zeroed("q_norm.weight")),
    ],
    "phimoe": [
        *_OF_ALL[:-1],
        ("root_mean_square_norm", setting(norm="rms")),
        ("norm_bias_dropped", zeroed("mlp_norm.bias")),
        ("last_norm_bias_dropped", zeroed("norm.bias")),
        ("head_bias_dropped", zeroed("head.bias")),
        ("no_scaling_of_rope", setting(rope_scaling=None)),
        ("other_rivals", router(jitter_eps=0.01)),
    ],
    "gpt_oss": [
        *_OF_ALL,
        ("no_sinks", setting(sinks=False)),
        ("sinks_of_zero", zeroed("sinks_H")),
        ("no_windows", setting(windows=None)),
        ("windows_the_other_way_round", setting(windows=[None, 4, None])),
        ("plain_activation", expert_setting(activation=None)),
        ("usual_limit", expert_setting(activation=(1.702, 7.0))),
        ("usual_slope", expert_setting(activation=(1.0, 1.5))),
        ("up_bias_dropped", zeroed("up_bias_E2F")),
        ("down_bias_dropped", zeroed("down_bias_ED")),
        ("gate_bias_dropped", zeroed("gate_bias_E")),
        ("output_bias_dropped", zeroed("attention.o.bias")),
        ("query_bias_dropped", zeroed("attention.q.bias")),
        ("rows_of_gate_and_up_as_halves", form("w_gate_up_E2FD", interleaved=False)),
        ("biases_of_gate_and_up_as_halves", form("up_bias_E2F", interleaved=False)),
    ],
}


def _cases() -> Iterator[Any]:
    """What any architecture may get wrong is looked at for one of them, and for the others by the slow tests."""
    of_all = {plant for _, plant in _OF_ALL}
    for kind, planted in MISTAKES.items():
        for name, plant in planted:
            slow = [pytest.mark.slow] if plant in of_all and kind != next(iter(MISTAKES)) else []
            yield pytest.param(kind, plant, id=f"{kind}-{name}", marks=slow)


@pytest.fixture(scope="module")
def without_a_mistake(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, torch.Tensor]]:
    """Of an architecture a checkpoint and its logits by transformers, which ours are."""

    @cache
    def made(kind: str) -> tuple[Path, torch.Tensor]:
        peer, ids_BS = trained(kind, **SETTINGS.get(kind, {})), ids(2, 14)
        folder, want = save(peer, tmp_path_factory.mktemp(kind)), computed(peer, ids_BS).logits
        torch.testing.assert_close(load(folder)(ids_BS).y, want, rtol=0, atol=ATOL)
        return folder, want

    return made


@pytest.mark.parametrize(("kind", "plant"), list(_cases()))
def test_one_mistake_is_seen(
    kind: str,
    plant: Plant,
    without_a_mistake: Callable[[str], tuple[Path, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused by a key that does not fit, or in the logits by far more than the tolerance."""
    (folder, want), ids_BS = without_a_mistake(kind), ids(2, 14)
    plant(monkeypatch)
    got = outcome(folder, ids_BS)
    assert isinstance(got, str) or float((got - want).abs().max()) > 20 * ATOL
    if isinstance(got, str):
        assert "the tensors do not match config.json" in got


def outcome(folder: Path, ids_BS: torch.Tensor) -> torch.Tensor | str:
    """The logits, or why the checkpoint is refused."""
    try:
        y: torch.Tensor = load(folder)(ids_BS).y
        return y
    except ValueError as error:
        return str(error)
