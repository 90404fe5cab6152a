"""models/checkpoint_config.py, models/checkpoint_sizes.py, models/checkpoint_effect.py, models/checkpoint_plain.py.

What is read and what is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_lab.models import checkpoint_config
from moe_lab.models.checkpoint import without_weights
from moe_lab.models.checkpoint_config import read
from moe_lab.models.parameters import parameter_bytes
from tests.models.checkpoints import build, complaint
from tests.models.released import COMMON, LATENT, settings_of
from tests.routers.cases import make

RELEASED: dict[str, dict[str, Any]] = {
    "olmoe": {  # OLMoE-1B-7B-0924
        **COMMON,
        "model_type": "olmoe",
        "attention_bias": False,
        "clip_qkv": None,
        "eos_token_id": 50279,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "vocab_size": 50304,
    },
    "mixtral": {  # Mixtral-8x7B-v0.1
        **COMMON,
        "model_type": "mixtral",
        "eos_token_id": 2,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "qwen2_moe": {  # Qwen1.5-MoE-A2.7B
        **COMMON,
        "model_type": "qwen2_moe",
        "decoder_sparse_step": 1,
        "eos_token_id": 151643,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3_moe": {  # Qwen3-30B-A3B
        **COMMON,
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "eos_token_id": [151645, 151643],
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
"""config.json of released models, as transformers 4 wrote them."""

kinds = pytest.mark.parametrize("kind", [pytest.param(kind, id=kind) for kind in RELEASED])


def write(folder: Path, content: Any) -> Path:
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


settings = partial(settings_of, RELEASED | LATENT)


def refusal(folder: Path, kind: str, **keys: Any) -> str:
    """What is said of the released model with some keys changed; it names the file."""
    message = complaint(lambda: settings(folder, kind, **keys))
    assert "model.path" in message and str(folder) in message
    return message


@pytest.mark.parametrize(
    ("kind", "n_parameters"),
    [
        pytest.param("olmoe", 6_919_161_856, id="olmoe"),
        pytest.param("mixtral", 46_702_792_704, id="mixtral"),
        pytest.param("qwen2_moe", 14_315_784_192, id="qwen2_moe"),
        pytest.param("qwen3_moe", 30_532_122_624, id="qwen3_moe"),
        pytest.param("deepseek_v2_lite", 15_706_484_224, id="deepseek_v2_lite"),
        pytest.param("moonlight", 15_960_110_208, id="moonlight"),
        pytest.param("deepseek_v3", 671_026_419_200, id="deepseek_v3"),
        pytest.param("kimi_k2", 1_026_408_232_448, id="kimi_k2"),
    ],
)
def test_released_models_have_the_number_of_parameters_that_is_published(
    kind: str, n_parameters: int, tmp_path: Path
) -> None:
    """From config.json alone, without storage."""
    settings(tmp_path, kind)
    assert parameter_bytes(without_weights(tmp_path)) == 4 * n_parameters


@kinds
def test_released_models_are_read_off_their_configuration(kind: str, tmp_path: Path) -> None:
    """Sizes, RoPE, the router and the longest sequence."""
    found, content = settings(tmp_path, kind), RELEASED[kind]
    decoder = found.decoder
    assert found.model_type == kind
    assert decoder["d_model"] == content["hidden_size"] and decoder["vocab_size"] == content["vocab_size"]
    assert decoder["n_layers"] == content["num_hidden_layers"] and decoder["norm_eps"] == content["rms_norm_eps"]
    assert decoder["n_heads"] == content["num_attention_heads"]
    assert decoder["n_kv_heads"] == content["num_key_value_heads"]
    assert decoder["head_dim"] == 128
    assert decoder["mlp_hidden_dim"] == content.get("moe_intermediate_size", content["intermediate_size"])
    assert (decoder["rope_theta"], decoder["rope_scaling"]) == (content["rope_theta"], None)
    assert decoder["tie_embeddings"] is False
    assert set(decoder.get("windows", [None])) == {None}
    assert found.n_experts == content.get("num_experts", content.get("num_local_experts"))
    assert found.top_k == content["num_experts_per_tok"]
    assert found.max_positions == content["max_position_embeddings"]
    assert found.dense_layers == frozenset()
    renormalize = {"olmoe": False, "mixtral": True, "qwen2_moe": False, "qwen3_moe": True}[kind]
    target = "moe_lab.routers.softmax_topk.SoftmaxTopK"
    assert found.router == {"_target_": target, "renormalize": renormalize, "gate_bias": False}
    ends = content["eos_token_id"]
    assert found.ends == set(ends if isinstance(ends, list) else [ends])


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@kinds
@pytest.mark.parametrize(
    "rope",
    [
        pytest.param({"rope_type": "linear", "factor": 2.0}, id="linear"),
        pytest.param(
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 2048,
            },
            id="llama3",
        ),
        pytest.param(
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "mscale": 0.7}, id="yarn"
        ),
    ],
)
def test_both_ways_to_write_rope_mean_the_same(kind: str, rope: dict[str, Any], tmp_path: Path) -> None:
    """rope_theta and rope_scaling{rope_type or type}, or all in rope_parameters."""
    new = settings(tmp_path, kind, rope_theta=..., rope_scaling=..., rope_parameters={**rope, "rope_theta": 5e5})
    old = settings(tmp_path, kind, rope_theta=5e5, rope_scaling=rope)
    name, rest = rope["rope_type"], {key: value for key, value in rope.items() if key != "rope_type"}
    oldest = settings(tmp_path, kind, rope_theta=5e5, rope_scaling={"type": name, **rest})
    both = settings(tmp_path, kind, rope_theta=5e5, rope_scaling={"type": "default", **rope})
    assert new == old == oldest == both
    assert (new.decoder["rope_theta"], new.decoder["rope_scaling"]) == (5e5, rope)


@pytest.mark.parametrize(
    ("kind", "theta"),
    [pytest.param(kind, 1e6 if kind == "mixtral" else 1e4, id=kind) for kind in RELEASED],
)
def test_rope_is_plain_with_the_architectures_base_where_nothing_is_said(
    kind: str, theta: float, tmp_path: Path
) -> None:
    """As in transformers."""
    for keys in ({"rope_theta": ...}, {"rope_theta": None, "rope_parameters": {"rope_type": "default"}}):
        decoder = settings(tmp_path, kind, **{"rope_scaling": ..., **keys}).decoder
        assert (decoder["rope_theta"], decoder["rope_scaling"]) == (theta, None)


def test_yarn_takes_what_is_not_said_from_the_lengths(tmp_path: Path) -> None:
    """The factor is the ratio of the lengths; the original length may stand beside, and is else the whole one."""
    stretched = {"rope_type": "yarn", "original_max_position_embeddings": 8192, "factor": None}
    assert settings(tmp_path, "mixtral", rope_scaling=stretched).decoder["rope_scaling"]["factor"] == 4.0
    beside = settings(
        tmp_path, "mixtral", original_max_position_embeddings=4096, rope_scaling={"rope_type": "yarn", "factor": 2.0}
    )
    assert beside.decoder["rope_scaling"]["original_max_position_embeddings"] == 4096
    alone = settings(tmp_path, "mixtral", rope_scaling={"rope_type": "yarn", "factor": 2.0}).decoder["rope_scaling"]
    assert alone["original_max_position_embeddings"] == 32768 and alone["factor"] == 2.0


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts"])
@kinds
def test_the_number_of_experts_has_several_names(kind: str, name: str, tmp_path: Path) -> None:
    """The hub and versions of transformers differ."""
    keys: dict[str, Any] = {"num_experts": ..., "num_local_experts": ..., name: 17}
    assert settings(tmp_path, kind, **keys).n_experts == 17


@kinds
def test_what_is_not_said_is_as_in_transformers(kind: str, tmp_path: Path) -> None:
    """Null and no key are the same, but for the heads of keys."""
    names = "head_dim tie_word_embeddings hidden_act norm_topk_prob attention_bias clip_qkv"
    names += " sliding_window use_sliding_window mlp_only_layers decoder_sparse_step qkv_bias rope_theta eos_token_id"
    missing, null = (dict.fromkeys(names.split(), value) for value in (..., None))
    found = settings(tmp_path, kind, **missing)
    assert settings(tmp_path, kind, **null) == found
    decoder = found.decoder
    heads = settings(tmp_path, kind, num_key_value_heads=...).decoder["n_kv_heads"]
    assert heads == {"olmoe": 16, "mixtral": 8, "qwen2_moe": 16, "qwen3_moe": 4}[kind]
    assert settings(tmp_path, kind, num_key_value_heads=None).decoder["n_kv_heads"] == decoder["n_heads"]
    assert decoder["head_dim"] == decoder["d_model"] // decoder["n_heads"]
    assert decoder["tie_embeddings"] is False and decoder.get("clip_qkv") is None
    assert decoder.get("qkv_bias", False) is (kind == "qwen2_moe") and not decoder.get("o_bias", False)
    assert found.router["renormalize"] is (kind == "mixtral")
    assert found.dense_layers == found.ends == frozenset()


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    ("keys", "dense"),
    [
        pytest.param({"mlp_only_layers": [1, 4]}, {1, 4}, id="named"),
        pytest.param({"decoder_sparse_step": 2}, {0, 2, 4}, id="every_second_sparse"),
        pytest.param({"decoder_sparse_step": 3, "mlp_only_layers": [5]}, {0, 1, 3, 4, 5}, id="both"),
        pytest.param({"mlp_only_layers": [17]}, set(), id="one_that_is_not_there"),
    ],
)
def test_dense_layers_are_those_named_and_those_between(
    kind: str, keys: dict[str, Any], dense: set[int], tmp_path: Path
) -> None:
    """Layer i has experts if i + 1 is a multiple of the step."""
    assert settings(tmp_path, kind, num_hidden_layers=6, **keys).dense_layers == dense


S, A = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("kind", "keys", "windows"),
    [
        pytest.param("mixtral", {"sliding_window": 9}, [9, 9, 9, 9], id="mixtral"),
        pytest.param("qwen3_moe", {"sliding_window": 9}, [None] * 4, id="qwen3_not_used"),
        pytest.param("qwen3_moe", {"sliding_window": 9, "use_sliding_window": True}, [9] * 4, id="qwen3"),
        pytest.param("qwen2_moe", {"sliding_window": 9}, [None] * 4, id="qwen2_not_used"),
        pytest.param(
            "qwen2_moe", {"sliding_window": 9, "layer_types": [S, S, S, S]}, [None] * 4, id="qwen2_not_used_but_typed"
        ),
        pytest.param(
            "qwen2_moe", {"sliding_window": 9, "use_sliding_window": True}, [9, None, 9, None], id="qwen2_by_default"
        ),
        pytest.param(
            "qwen2_moe",
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2},
            [9, None, None, None],
            id="qwen2_below_a_layer",
        ),
        pytest.param(
            "qwen2_moe",
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2, "layer_types": [A, S, A, S]},
            [None, 9, None, 9],
            id="qwen2_typed",
        ),
    ],
)
def test_windows_are_said_layer_by_layer(
    kind: str, keys: dict[str, Any], windows: list[int | None], tmp_path: Path
) -> None:
    """None where a layer attends to all before it."""
    assert settings(tmp_path, kind, num_hidden_layers=4, **keys).decoder["windows"] == windows


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """With what it should be."""
    message = complaint(lambda: read(tmp_path / "nowhere"))
    assert f"model.path={tmp_path / 'nowhere'}" in message and "Hugging Face" in message and "safetensors" in message


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    """Such as one of texts."""
    message = complaint(lambda: read(tmp_path))
    assert f"model.path={tmp_path}" in message and "config.json" in message and "No such file" in message


def test_a_file_instead_of_a_folder_is_named(tmp_path: Path) -> None:
    """The safetensors themselves, say."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    message = complaint(lambda: read(file))
    assert f"model.path={file}" in message and "folder" in message


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="empty"),
        pytest.param('{"model_type": "olmoe", ', id="cut_short"),
        pytest.param("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", id="git_lfs_pointer"),
        pytest.param("[1, 2]", id="list"),
        pytest.param('"olmoe"', id="string"),
        pytest.param("null", id="null"),
    ],
)
def test_a_configuration_that_is_no_json_object_is_to_be_fetched_again(content: str, tmp_path: Path) -> None:
    """The message names the file."""
    message = complaint(lambda: read(write(tmp_path, content)))
    assert str(tmp_path / "config.json") in message and "JSON" in message and "download the file again" in message


def test_a_configuration_that_is_no_text_is_to_be_fetched_again(tmp_path: Path) -> None:
    """Bytes that are not UTF-8."""
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    message = complaint(lambda: read(tmp_path))
    assert str(tmp_path / "config.json") in message and "download the file again" in message


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(value, id=str(value)) for value in ("llama", "dbrx", "gpt2", "", None, ..., ["olmoe"], 3)],
)
def test_of_an_unknown_architecture_the_supported_ones_are_listed(model_type: Any, tmp_path: Path) -> None:
    """The message has the name that was found."""
    message = refusal(tmp_path, "olmoe", model_type=model_type)
    assert f"model_type={None if model_type is ... else model_type}" in message
    assert all(kind in message for kind in RELEASED)


NEEDED = "vocab_size hidden_size num_attention_heads num_hidden_layers rms_norm_eps max_position_embeddings"
NEEDED += " num_experts_per_tok intermediate_size"


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *(pytest.param(kind, key, id=f"{kind}-{key}") for kind in RELEASED for key in NEEDED.split()),
        pytest.param("olmoe", "num_experts", id="olmoe-num_experts"),
        pytest.param("mixtral", "num_local_experts", id="mixtral-num_local_experts"),
        pytest.param("qwen2_moe", "num_experts", id="qwen2_moe-num_experts"),
        pytest.param("qwen2_moe", "moe_intermediate_size", id="qwen2_moe-moe_intermediate_size"),
        pytest.param("qwen2_moe", "shared_expert_intermediate_size", id="qwen2_moe-shared_expert_intermediate_size"),
        pytest.param("qwen3_moe", "num_experts", id="qwen3_moe-num_experts"),
        pytest.param("qwen3_moe", "moe_intermediate_size", id="qwen3_moe-moe_intermediate_size"),
    ],
)
@pytest.mark.parametrize("value", [pytest.param(..., id="missing"), pytest.param(None, id="null")])
def test_a_key_that_is_needed_and_missing_is_named(kind: str, key: str, value: Any, tmp_path: Path) -> None:
    """Null is as good as missing."""
    message = refusal(tmp_path, kind, **{key: value})
    assert key in message and "config.json" in message and kind in message


def test_all_names_of_the_number_of_experts_are_said_when_there_is_none(tmp_path: Path) -> None:
    """Such as the configuration of a dense model under the name of one with experts."""
    message = refusal(tmp_path, "olmoe", num_experts=...)
    assert "num_experts or num_local_experts" in message


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        pytest.param("olmoe", "clip_qkv", "8", id="clip_as_text"),
        pytest.param("olmoe", "clip_qkv", -8.0, id="clip_below_0"),
        pytest.param("olmoe", "norm_topk_prob", "false", id="flag_as_text"),
        pytest.param("olmoe", "attention_bias", 1, id="flag_as_number"),
        pytest.param("mixtral", "sliding_window", 0, id="window_of_0"),
        pytest.param("mixtral", "sliding_window", "4096", id="window_as_text"),
        pytest.param("qwen2_moe", "qkv_bias", "yes", id="bias_as_text"),
        pytest.param("qwen3_moe", "use_sliding_window", "no", id="sliding_as_text"),
    ],
)
def test_a_setting_of_another_type_is_named(kind: str, key: str, value: Any, tmp_path: Path) -> None:
    """And not taken for true, or for whatever arithmetic makes of it."""
    assert f"{key}={value}" in refusal(tmp_path, kind, **{key: value})


@pytest.mark.parametrize("value", [pytest.param(v, id=str(v)) for v in (0, -1, 2.5, "many", [1], True)])
@pytest.mark.parametrize(
    "key",
    [
        *(key for key in NEEDED.split() if key != "rms_norm_eps"),
        "num_experts",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "num_key_value_heads",
        "head_dim",
        "decoder_sparse_step",
    ],
)
def test_a_size_is_a_whole_number(key: str, value: Any, tmp_path: Path) -> None:
    """Key and value are named."""
    assert f"{key}={value}" in refusal(tmp_path, "qwen2_moe", **{key: value}).replace(
        "num_experts or num_local_experts or n_routed_experts=", "num_experts="
    )


@kinds
def test_more_experts_per_token_than_there_are_is_refused(kind: str, tmp_path: Path) -> None:
    """Both numbers are named."""
    message = refusal(tmp_path, kind, num_experts_per_tok=1000)
    assert "num_experts_per_tok=1000" in message
    assert f"{RELEASED[kind].get('num_experts', 8)} experts" in message


REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("activation", {"hidden_act": "gelu"}, ["hidden_act=gelu", "silu"]),
    ("dynamic", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type=dynamic", "linear, llama3, yarn"]),
    (
        "longrope",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        ["rope_type=longrope", "linear, llama3, yarn"],
    ),
    ("mrope", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, ["rope_type=mrope"]),
    (
        "partial",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        ["partial_rotary_factor"],
    ),
    ("partial_beside", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ("fp8", {"quantization_config": {"quant_method": "fp8"}}, ["quantised", "bf16"]),
    ("gptq", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantised", "bf16"]),
    ("linear_without_factor", {"rope_scaling": {"type": "linear"}}, ["rope_type=linear", "factor"]),
    ("llama3_half", {"rope_scaling": {"type": "llama3", "factor": 2.0}}, ["rope_type=llama3", "low_freq_factor"]),
    ("factor_of_text", {"rope_scaling": {"type": "yarn", "factor": "4"}}, ["rope_type=yarn", "factor"]),
    ("factor_of_0", {"rope_scaling": {"type": "linear", "factor": 0}}, ["rope_type=linear", "factor"]),
    (
        "original_of_0",
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
        ["rope_scaling", "original_max_position_embeddings"],
    ),
    ("beta", {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": -1}}, ["rope_type=yarn", "beta_fast=-1"]),
    (
        "attention_factor",
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": "high"}},
        ["rope_type=yarn", "attention_factor=high"],
    ),
    ("rope_of_text", {"rope_scaling": "yarn"}, ["rope_scaling=yarn", "JSON"]),
    ("theta", {"rope_theta": "1e6"}, ["rope_theta=1e6"]),
    ("eps_of_text", {"rms_norm_eps": "1e-6"}, ["rms_norm_eps=1e-6"]),
    ("eps_below_0", {"rms_norm_eps": -1e-6}, ["rms_norm_eps=-1e-06"]),
    ("end_of_text", {"eos_token_id": "</s>"}, ["eos_token_id=</s>"]),
    ("end_as_object", {"eos_token_id": {"id": 2}}, ["eos_token_id="]),
    ("tied_as_text", {"tie_word_embeddings": "false"}, ["tie_word_embeddings=false"]),
]


@pytest.mark.parametrize(("keys", "said"), [pytest.param(keys, said, id=name) for name, keys, said in REFUSED])
@kinds
def test_what_is_not_supported_is_refused_by_name(
    kind: str, keys: dict[str, Any], said: list[str], tmp_path: Path
) -> None:
    """Nothing that would change the mathematics is passed over."""
    message = refusal(tmp_path, kind, **keys)
    assert all(part in message for part in said)


MISTAKES: list[tuple[str, str, dict[str, Any], str]] = [
    ("odd_head", "qwen3_moe", {"head_dim": 7}, "head_dim=7: must be even, because rotary embeddings rotate pairs"),
    ("odd_head_1", "mixtral", {"head_dim": 1}, "head_dim=1: must be even"),
    ("odd_head_by_division", "olmoe", {"hidden_size": 48}, "head_dim=3: must be even"),
    ("heads", "olmoe", {"num_attention_heads": 24}, "num_attention_heads=24: must divide hidden_size=2048"),
    ("more_heads_than_width", "olmoe", {"num_attention_heads": 4096}, "num_attention_heads=4096: must divide"),
    (
        "heads_of_keys",
        "mixtral",
        {"num_key_value_heads": 5},
        "num_key_value_heads=5: must divide num_attention_heads=32",
    ),
    ("more_heads_of_keys", "mixtral", {"num_key_value_heads": 64}, "num_key_value_heads=64: must divide"),
    ("heads_of_keys_by_default", "mixtral", {"num_attention_heads": 2, "num_key_value_heads": ...}, "heads=8: must"),
    ("width_of_10**12", "olmoe", {"hidden_size": 10**12}, "hidden_size=1000000000000 must be an integer <="),
    ("width_of_10**400", "olmoe", {"hidden_size": 10**400}, "hidden_size=1000"),
    ("vocabulary_of_10**12", "mixtral", {"vocab_size": 10**12}, "vocab_size=1000000000000 must be"),
    ("layers_of_10**6", "mixtral", {"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 must be"),
    ("experts_of_10**12", "mixtral", {"num_local_experts": 10**12}, "=1000000000000 must be"),
    ("experts_by_two_names", "olmoe", {"num_local_experts": 63}, "num_experts=64 and num_local_experts=63 contradict"),
    ("context_true", "olmoe", {"max_position_embeddings": True}, "max_position_embeddings=True must be"),
    ("eps_true", "olmoe", {"rms_norm_eps": True}, "rms_norm_eps=True must be"),
    ("eps_0", "olmoe", {"rms_norm_eps": 0}, "rms_norm_eps=0 must be"),
    ("eps_of_10**400", "olmoe", {"rms_norm_eps": 10**400}, "rms_norm_eps=1000"),
    ("eps_of_1e-300", "olmoe", {"rms_norm_eps": 1e-300}, "rms_norm_eps=1e-300 must be a number > 1e-20"),
    ("eps_of_5", "olmoe", {"rms_norm_eps": 5}, "rms_norm_eps=5 must be a number <= 1"),
    ("clip_true", "olmoe", {"clip_qkv": True}, "clip_qkv=True must be"),
    ("clip_of_0", "olmoe", {"clip_qkv": 0}, "clip_qkv=0 must be"),
    ("renormalise_0", "qwen3_moe", {"norm_topk_prob": 0}, "norm_topk_prob=0 must be true or false"),
    ("tied_1", "mixtral", {"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
    ("window_of_10**12", "mixtral", {"sliding_window": 10**12}, "sliding_window=1000000000000 must be"),
    ("window_true", "mixtral", {"sliding_window": True}, "sliding_window=True must be"),
    ("windows_below_text", "qwen2_moe", {"max_window_layers": "7"}, "max_window_layers=7 must be"),
    ("windows_below_true", "qwen2_moe", {"max_window_layers": True}, "max_window_layers=True must be"),
    ("dense_layers_true", "qwen3_moe", {"mlp_only_layers": [True]}, "mlp_only_layers=[True] must be"),
    ("dense_layers_negative", "qwen3_moe", {"mlp_only_layers": [-1]}, "mlp_only_layers=[-1] must be"),
    ("dense_layers_text", "qwen2_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers=['0'] must be"),
    ("step_true", "qwen2_moe", {"decoder_sparse_step": True}, "decoder_sparse_step=True must be"),
    ("end_true", "olmoe", {"eos_token_id": True}, "eos_token_id=True must be"),
    ("end_negative", "olmoe", {"eos_token_id": [-1]}, "eos_token_id=[-1] must be"),
    ("end_not_an_id", "olmoe", {"eos_token_id": [1, 50304]}, "eos_token_id=50304: the model has 50304 ids"),
    ("end_of_10**400", "olmoe", {"eos_token_id": 10**400}, "eos_token_id=1000"),
    ("per_layer", "olmoe", {"per_layer_config": {"0": {"num_experts": 2}}}, "per_layer_config is not supported"),
    ("compressed", "olmoe", {"compression_config": {"format": "int4"}}, "compression_config: quantised"),
    ("activation_object", "olmoe", {"hidden_act": {}}, "hidden_act={} is not supported"),
    ("yarn_beside_another", "olmoe", {"rope_parameters": YARN, "rope_scaling": {"type": "default"}}, "contradict"),
]


@pytest.mark.parametrize(
    ("kind", "keys", "said"), [pytest.param(kind, keys, said, id=name) for name, kind, keys, said in MISTAKES]
)
def test_a_planted_mistake_is_refused_by_its_key(kind: str, keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    """In one line, with the value and what it must be."""
    message = refusal(tmp_path, kind, **keys)
    assert said in message and len(message) - len(str(tmp_path)) < 250


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad) for bad in ("NaN", "Infinity", "-Infinity", "1e999")])
@pytest.mark.parametrize("key", [pytest.param(key, id=key) for key in ("rms_norm_eps", "rope_theta", "use_cache", "x")])
def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(key: str, bad: str, tmp_path: Path) -> None:
    """JSON has no such numbers; Python would read them."""
    text = json.dumps({**RELEASED["olmoe"], key: "HERE"}).replace('"HERE"', bad)
    assert f"({bad} is not a finite number)" in complaint(lambda: read(write(tmp_path, text)))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """The last one would be taken."""
    text = json.dumps(RELEASED["olmoe"]).replace("{", '{"hidden_size": 1024, ', 1)
    assert "(the key hidden_size stands twice)" in complaint(lambda: read(write(tmp_path, text)))


# Keys that nobody reads


@kinds
def test_of_a_released_model_every_key_is_read_or_known_to_have_no_effect(kind: str, tmp_path: Path) -> None:
    """So nothing is said; as transformers 5 writes it, neither."""
    more = {"architectures": ["A"], "bos_token_id": 1, "router_aux_loss_coef": 0.01, "transformers_version": "4.40.0"}
    assert settings(tmp_path, kind, **more).unread == ()
    pytest.importorskip("transformers")
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert read(tmp_path).unread == ()


@kinds
def test_every_other_key_is_named(kind: str, tmp_path: Path) -> None:
    """Sorted, inside RoPE's too; null is none; escape codes are written out."""
    keys = {"logit_scale": 0.5, "final_logit_softcapping": 30.0, "alibi": None, "z\x1b[2J": 1}
    rope = {"rope_type": "linear", "factor": 2.0, "base_scale": 3}
    found = settings(tmp_path, kind, **keys, rope_scaling=rope)
    assert found.unread == ("final_logit_softcapping", "logit_scale", "z\\x1b[2J", "rope_scaling.base_scale")


@pytest.mark.parametrize(
    ("kind", "keys", "unread"),
    [
        pytest.param("olmoe", {"sliding_window": 8}, ("sliding_window",), id="olmoe_window"),
        pytest.param("olmoe", {"head_dim": 64}, (), id="olmoe_head_dim"),
        pytest.param("mixtral", {"norm_topk_prob": False}, ("norm_topk_prob",), id="mixtral_renormalises"),
        pytest.param("mixtral", {"clip_qkv": 8.0}, ("clip_qkv",), id="mixtral_clip"),
        pytest.param("qwen3_moe", {"layer_types": [S] * 48}, ("layer_types",), id="qwen3_layer_types"),
        pytest.param("qwen3_moe", {"max_window_layers": 3}, (), id="qwen3_no_windows"),
        pytest.param("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, (), id="qwen3_windows"),
        pytest.param("qwen3_moe", {"use_qk_norm": True, "qkv_bias": False}, (), id="as_it_is"),
        pytest.param("mixtral", {"use_qk_norm": True, "qkv_bias": True}, ("qkv_bias", "use_qk_norm"), id="not"),
        pytest.param("mixtral", {"attention_bias": False, "rope_type": "default"}, (), id="without"),
        pytest.param("mixtral", {"rope_type": "yarn"}, ("rope_type",), id="rope_type_outside"),
        pytest.param("olmoe", {"is_decoder": True, "num_beams": 4, "top_k": 50, "max_length": 20}, (), id="generation"),
        pytest.param(
            "qwen3_moe", {"shared_expert_intermediate_size": 8}, ("shared_expert_intermediate_size",), id="own"
        ),
    ],
)
def test_a_key_of_another_architecture_is_named(
    kind: str, keys: dict[str, Any], unread: tuple[str, ...], tmp_path: Path
) -> None:
    """Transformers passes over it too."""
    assert settings(tmp_path, kind, **keys).unread == unread


@kinds
def test_a_window_that_is_switched_on_and_not_said_is_as_in_transformers(kind: str, tmp_path: Path) -> None:
    """4096 in the Qwen models; null is none."""
    if not kind.startswith("qwen"):
        assert set(settings(tmp_path, kind, sliding_window=...).decoder.get("windows", [None])) == {None}
        return
    on = partial(settings, tmp_path, kind, use_sliding_window=True)
    assert 4096 in on(sliding_window=...).decoder["windows"]
    assert set(on(sliding_window=None).decoder["windows"]) == {None}


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"layer_types": [A]}, id="layer_types_of_too_few_layers"),
        pytest.param({"layer_types": ["linear_attention"] * 24}, id="layer_types_unknown"),
        pytest.param({"layer_types": S}, id="layer_types_of_text"),
        pytest.param({"mlp_only_layers": 3}, id="mlp_only_layers_of_one_number"),
    ],
)
def test_lists_of_layers_are_looked_at(keys: dict[str, Any], tmp_path: Path) -> None:
    """The key is named."""
    (key,) = keys
    assert f"{key}=" in refusal(tmp_path, "qwen2_moe", **keys)


@pytest.mark.parametrize("value", [pytest.param(None, id="null"), pytest.param({}, id="empty")])
def test_no_quantization_is_none(value: Any, tmp_path: Path) -> None:
    """Some tools write the key for plain weights too."""
    assert settings(tmp_path, "olmoe", quantization_config=value) == settings(tmp_path, "olmoe")


@kinds
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda keys: keys | {"hidden_act": "relu"}, id="activation"),
        pytest.param(lambda keys: keys | {"model_type": "llama"}, id="model_type"),
    ],
)
def test_a_model_refuses_as_the_reading_does(
    kind: str, change: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    """Before it looks for weights."""
    write(tmp_path, change(RELEASED[kind]))
    told = complaint(lambda: checkpoint_config.read(tmp_path))
    assert complaint(lambda: build(tmp_path, make_router=partial(make, "mixtral"))) == told
