"""models/checkpoint_gemma.py: config.json of Gemma 4, what of it is refused, and what its layers have of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lab.errors import UnavailableError
from moe_lab.models.checkpoint import without_weights
from moe_lab.models.checkpoint_config import Settings, read
from moe_lab.models.moe_layer import MoELayer
from moe_lab.runs.run import run
from tests import tiny
from tests.models.checkpoints import E, checkpoint, complaint, ids, load, save, tensors, trained, write_tensors
from tests.models.test_checkpoint import assert_logits, computed
from tests.routers.cases import make

_SLIDING, _FULL = "sliding_attention", "full_attention"
TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": True,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "enable_moe_block": True,
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2816,
    "hidden_size_per_layer_input": 0,
    "initializer_range": 0.02,
    "intermediate_size": 2112,
    "layer_types": ([_SLIDING] * 5 + [_FULL]) * 5,
    "max_position_embeddings": 262144,
    "model_type": "gemma4_text",
    "moe_intermediate_size": 704,
    "num_attention_heads": 16,
    "num_experts": 128,
    "num_global_key_value_heads": 2,
    "num_hidden_layers": 30,
    "num_key_value_heads": 8,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        _FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        _SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 1024,
    "tie_word_embeddings": True,
    "top_k_experts": 8,
    "use_bidirectional_attention": "vision",
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
}
WHOLE: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": None,
    "audio_token_id": 258881,
    "boa_token_id": 256000,
    "boi_token_id": 255999,
    "dtype": "bfloat16",
    "eoa_token_id": 258883,
    "eoi_token_id": 258882,
    "image_token_id": 258880,
    "initializer_range": 0.02,
    "model_type": "gemma4",
    "text_config": TEXT,
    "tie_word_embeddings": True,
    "transformers_version": "5.5.0",
    "video_token_id": 258884,
    "vision_config": {"model_type": "gemma4_vision", "hidden_size": 1152},
    "vision_soft_tokens_per_image": 280,
}
"""Of the 26B-A4B, as far as is known: the values that matter here."""


def settings(folder: Path, **keys: Any) -> Settings:
    """Of the model above with some keys of its text part changed; ... removes one."""
    text = {key: value for key, value in {**TEXT, **keys}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps({**WHOLE, "text_config": text}))
    return read(folder)


def test_the_released_configuration_is_read(tmp_path: Path) -> None:
    """25 billion parameters, and the cache of both kinds of layers."""
    found = settings(tmp_path)
    assert found.unread == () and found.only_text and found.dense_layers == frozenset()
    assert (found.n_experts, found.top_k, found.max_positions, found.ends) == (128, 8, 262144, {1})
    sliding, full = found.decoder["by_layer"][0], found.decoder["by_layer"][5]
    assert (sliding["head_dim"], sliding["n_kv_heads"], sliding["values_are_keys"]) == (256, 8, False)
    assert (full["head_dim"], full["n_kv_heads"], full["values_are_keys"]) == (512, 2, True)
    assert (sliding["rope_theta"], sliding["rotary_dim"], sliding["rope_scaling"]) == (1e4, 256, None)
    assert (full["rope_theta"], full["rotary_dim"]) == (1e6, 128)
    assert found.decoder["windows"] == ([1024] * 5 + [None]) * 5
    model = without_weights(tmp_path)
    assert 25.2e9 < sum(parameter.numel() for parameter in model.parameters()) < 25.3e9
    cache = model.bfloat16().make_cache(1, 1)
    assert cache.bytes_per_position == 25 * 2 * 8 * 256 * 2 + 5 * 2 * 2 * 512 * 2


def test_layers_as_either_version_of_transformers_writes_them_are_the_same(tmp_path: Path) -> None:
    """By `global_head_dim` and its like, or each layer's by itself."""
    before = settings(tmp_path)
    gone = {"global_head_dim": ..., "num_global_key_value_heads": ...}
    own = {str(layer): {"head_dim": 512, "num_key_value_heads": 2} for layer in range(5, 30, 6)}
    assert settings(tmp_path, **gone, per_layer_config=own) == before == settings(tmp_path, per_layer_config=own)
    by_itself = settings(tmp_path, **gone, per_layer_config={**own, "5": {"head_dim": 128}})
    assert by_itself.decoder["by_layer"][5]["n_kv_heads"] == 8
    assert by_itself.decoder["by_layer"][11] == before.decoder["by_layer"][11]


def test_without_layer_types_five_of_six_layers_slide_and_the_last_does_not(tmp_path: Path) -> None:
    """As transformers has it."""
    for n_layers in (6, 8):
        windows = settings(tmp_path, layer_types=..., num_hidden_layers=n_layers).decoder["windows"]
        assert windows == [1024] * 5 + [None] + [1024] * (n_layers - 7) + [None] * (n_layers > 6)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        pytest.param({"enable_moe_block": False}, "enable_moe_block is false: the model has no experts", id="dense"),
        pytest.param({"hidden_size_per_layer_input": ...}, "hidden_size_per_layer_input=256", id="layer_inputs"),
        pytest.param({"num_kv_shared_layers": 10}, "num_kv_shared_layers=10", id="shared_keys"),
        pytest.param({"hidden_activation": "silu"}, "hidden_activation=silu is not supported", id="activation"),
        pytest.param({"use_bidirectional_attention": "all"}, "use_bidirectional_attention=all", id="both_ways"),
        pytest.param({"layer_types": [_SLIDING] * 30}, "the last layer must be full_attention", id="last_layer"),
        pytest.param({"layer_types": ["conv"] * 30}, "layer_types=", id="layer_types"),
        pytest.param({"rope_parameters": ...}, "rope_parameters", id="no_rope"),
        pytest.param(
            {"rope_parameters": {_FULL: {"rope_theta": 5}}},
            f"rope_parameters.{_SLIDING};",
            id="rope_of_one_kind",
        ),
        pytest.param({"top_k_experts": 200}, "top_k_experts=200 is more than the 128 experts", id="top_k"),
        pytest.param({"top_k_experts": ...}, "top_k_experts", id="no_top_k"),
        pytest.param({"num_experts": ...}, "num_experts", id="no_experts"),
        pytest.param({"num_global_key_value_heads": 3}, "must divide num_attention_heads", id="key_heads"),
        pytest.param({"global_head_dim": 7}, "must be even", id="odd_heads"),
        pytest.param({"per_layer_config": {"5": {"head_dim": 8}}}, "contradict each other", id="both_ways_of_heads"),
        pytest.param(
            {"global_head_dim": ..., "num_global_key_value_heads": ..., "per_layer_config": {"5": {"num_experts": 3}}},
            "per_layer_config.5.num_experts is not supported",
            id="layers_that_differ_in_more",
        ),
        pytest.param({"final_logit_softcapping": -1}, "final_logit_softcapping=-1", id="cap"),
    ],
)
def test_what_is_not_supported_is_refused(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    """By the key, in one line that names the file."""
    message = complaint(lambda: settings(tmp_path, **keys))
    assert said in message and str(tmp_path / "config.json") in message


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        pytest.param({"rope_type": "yarn", "factor": 4.0}, "full_attention.rope_type=yarn is not supported", id="kind"),
        pytest.param({"rope_type": "default", "partial_rotary_factor": 0.5}, "does not use", id="not_partial"),
        pytest.param({"rope_type": "proportional", "partial_rotary_factor": 0.001}, "turn at least 2", id="too_few"),
        pytest.param({"rope_type": "proportional", "partial_rotary_factor": 2}, "partial_rotary_factor=2", id="share"),
        pytest.param({"rope_type": "proportional", "factor": 0}, "factor=0", id="factor"),
        pytest.param({"rope_type": "proportional", "low_freq_factor": 1.0}, "does not use", id="other_kinds_key"),
        pytest.param({"rope_theta": None}, "rope_theta", id="theta"),
    ],
)
def test_rope_that_is_not_supported_is_refused(rope: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Of the full layers."""
    full = {"rope_theta": 1e6, **rope}
    ropes = {_SLIDING: TEXT["rope_parameters"][_SLIDING], _FULL: full}
    assert said in complaint(lambda: settings(tmp_path, rope_parameters=ropes))


def test_the_written_configuration_is_that_of_transformers(tmp_path: Path) -> None:
    """Every key that it writes is read or known."""
    for kind in ("gemma4_text", "gemma4"):
        assert read(checkpoint(kind, tmp_path / kind)).unread == ()


def test_a_swapped_router_ranks_the_trained_logits_and_experts_keep_their_scale(tmp_path: Path) -> None:
    """The gate's norm and the scale of each expert are not the router's: the same choice gives the same output."""
    folder = checkpoint("gemma4_text", tmp_path)
    native = load(folder)(ids(2, 9))
    same = load(folder, make_router=lambda e, k: make("mixtral", e, k))(ids(2, 9))
    assert torch.equal(native.y, same.y)
    other = load(folder, make_router=lambda e, k: make("sinkhorn", e, k))
    assert other.untrained() == []
    assert torch.equal(other(ids(2, 9), forced_routing=native.routings).y, native.y)


def test_a_router_whose_weights_multiply_inputs_is_refused(tmp_path: Path) -> None:
    """A scale of outputs has no place there: the row says so."""
    folder = checkpoint("gemma4_text", tmp_path / "c", vocab_size=256)
    keys = [f"model.path={folder}", "router=llama4", "workload=random", "seq_len=5"]
    with pytest.raises(UnavailableError, match=r"^router=llama4 multiplies .* a scale of their outputs; use"):
        run(tiny.compose("checkpoint", *keys), tmp_path / "run")


@pytest.mark.parametrize(
    "router", ["soft", *(pytest.param(n, marks=pytest.mark.slow) for n in ("expert_choice", "top_p", "hash"))]
)
def test_other_routers_are_verified(router: str, tmp_path: Path) -> None:
    """Soft MoE has a layer of its own."""
    folder = checkpoint("gemma4_text", tmp_path / "c", vocab_size=256)
    keys = [f"model.path={folder}", f"router={router}", "workload=random", "seq_len=7"]
    record = run(tiny.compose("checkpoint", *keys), tmp_path / "run")
    assert record.status == "ok" and record.check is not None and record.check.passed, record.reason


def test_a_factor_of_all_weights_changes_nothing_and_nobody_is_warned_of_it(tmp_path: Path) -> None:
    """The norm behind the experts takes it out."""
    folder = checkpoint("gemma4_text", tmp_path / "c", vocab_size=256)
    once, twice = (
        load(folder, make_router=lambda e, k, scale=scale: make("deepseek_v4", e, k, scale=scale))(ids(2, 9)).y
        for scale in (1.0, 2.0)
    )
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-4)
    keys = [f"model.path={folder}", "router=deepseek_v4", "router.scale=2", "workload=random", "seq_len=5"]
    record = run(tiny.compose("checkpoint", *keys), tmp_path / "run")
    assert record.status == "ok" and not [text for text in record.warnings if "changes the predictions" in text]


@pytest.mark.parametrize("execution", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_run_decodes_and_says_what_it_keeps(execution: str, tmp_path: Path) -> None:
    """Of two kinds of layers."""
    folder = checkpoint("gemma4_text", tmp_path / "c", vocab_size=256)
    keys = [f"model.path={folder}", "workload=random", "workload.phase=decode", "workload.context_len=9", "seq_len=3"]
    record = run(tiny.compose("checkpoint", *keys, f"execution={execution}"), tmp_path / "run")
    assert record.status == "ok" and record.memory is not None, record.reason
    assert record.memory["cache_bytes_per_token"] == 4 * 2 * (2 * 8 + 2 * 1 * 12)


@pytest.mark.gpu
@pytest.mark.parametrize("phase", [pytest.param(phase, id=phase) for phase in ("prefill", "decode")])
@pytest.mark.parametrize("execution", [pytest.param(name, id=name) for name in ("cuda_graph", "compile")])
@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=dtype) for dtype in ("fp32", "bf16")])
def test_a_gpu_computes_it(dtype: str, execution: str, phase: str, tmp_path: Path) -> None:
    """Captured or compiled, with heads as wide as the released ones and two sequences; verified against fp32."""
    folder = checkpoint("gemma4_text", tmp_path / "c", vocab_size=256, head_dim=256, global_head_dim=512)
    for layer in range(3):  # the softmax is not scaled, so logits of wide heads would be large
        scale_norms(folder, f"model.layers.{layer}.self_attn.k_norm.weight")
    keys = [f"model.path={folder}", "router=native", "workload=random", f"workload.phase={phase}", "device=cuda"]
    keys += ["workload.context_len=110"] if phase == "decode" else []
    record = run(
        tiny.compose("checkpoint", *keys, "seq_len=8", f"dtype={dtype}", f"execution={execution}"), tmp_path / "run"
    )
    assert record.status == "ok" and record.check is not None and record.check.passed, record.reason
    assert record.implementation["experts"].startswith("grouped")


def scale_norms(folder: Path, key: str) -> None:
    """Divide a norm's weight by the root of its width."""
    content = tensors(folder)
    write_tensors(folder, {**content, key: content[key] * len(content[key]) ** -0.5})


def test_what_is_missing_or_has_another_shape_is_named(tmp_path: Path) -> None:
    """A key projection of a full layer, the scale of a layer, a value projection that must not be there."""
    folder = checkpoint("gemma4", tmp_path)
    content = tensors(folder)
    prefix = "model.language_model.layers.1."
    changes: list[tuple[str, Any, str]] = [
        (f"{prefix}layer_scalar", None, "1 missing"),
        (f"{prefix}router.per_expert_scale", torch.ones(E + 1), "wrong shape"),
        (f"{prefix}router.scale", None, "1 missing"),
        (f"{prefix}self_attn.v_proj.weight", torch.ones(12, 32), "1 unexpected"),
        (f"{prefix}self_attn.k_proj.weight", torch.ones(16, 32), "wrong shape"),
    ]
    for key, tensor, said in changes:
        changed = {name: each for name, each in content.items() if name != key}
        write_tensors(folder, changed if tensor is None else {**changed, key: tensor})
        message = complaint(lambda: load(folder))
        assert said in message and key in message


def test_long_sequences_are_those_of_transformers(tmp_path: Path) -> None:
    """Beyond the window, where every dimension that turns has turned."""
    peer = trained("gemma4_text", 3)
    model, ids_BS = load(save(peer, tmp_path)), ids(1, 100, 3)
    assert_logits(model(ids_BS).y, computed(peer, ids_BS).logits)


def test_each_layer_has_norms_of_its_own(tmp_path: Path) -> None:
    """What the gate reads is not what the experts read."""
    layer = load(checkpoint("gemma4_text", tmp_path)).layers[0].mlp
    assert isinstance(layer, MoELayer) and layer.norms is not None
    x_TD = torch.randn(3, 32)
    rms = x_TD / (x_TD.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    scale = tensors(tmp_path)["model.layers.0.router.scale"]
    want = (rms * scale * 32**-0.5) @ tensors(tmp_path)["model.layers.0.router.proj.weight"].T
    torch.testing.assert_close(layer.logits(x_TD), want)
    torch.testing.assert_close(layer.experts_input(x_TD), rms * layer.norms.norm_before.weight)
