"""The config.json of a Hugging Face checkpoint, as the settings of our decoder.

An architecture is a function from the file's keys to settings; what most share stands in `_decoder` and `_moe`. Files
written by transformers 4 and 5 differ in some names (`rope_theta` and `rope_scaling` against `rope_parameters`,
`num_experts` against `num_local_experts`), and both are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_lab.config.checks import MOST_LAYERS, head_mistake
from moe_lab.models import checkpoint_router as routers
from moe_lab.models.checkpoint_forms import Fp8Blocks, Mxfp4, read_quantization
from moe_lab.models.checkpoint_keys import Keys, is_integer, is_number, read_object, shown
from moe_lab.models.checkpoint_latent import read_latent
from moe_lab.models.checkpoint_rope import read_rope

CONFIG = "config.json"
_NO_EFFECT = {
    *("architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version", "unsloth_version"),
    *("_name_or_path", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset"),
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "id2label", "label2id", "problem_type"),
    *("chunk_size_feed_forward", "output_attentions", "output_hidden_states", "pretraining_tp", "return_dict"),
    *("use_cache", "attention_dropout", "initializer_range", "output_router_logits", "router_aux_loss_coef"),
    *("router_jitter_noise", "router_z_loss_coef", "aux_loss_alpha", "seq_aux", "ep_size"),
    "initial_context_length",  # of gpt_oss: original_max_position_embeddings under another name
    # Of every model in files of transformers 4, for `generate` and for other kinds of models.
    *("add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size"),
    *("diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id"),
    *("is_decoder", "is_encoder_decoder", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size"),
    *("num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix", "pruned_heads"),
    *("remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id", "suppress_tokens"),
    *("task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k"),
    *("top_p", "torchscript", "typical_p", "use_bfloat16"),
}
"""Keys of a config.json that change no logits: names, data types, ids for padding, and what only training reads."""

_WITHOUT = {
    "attention_bias": False,
    "attn_logit_softcapping": 0,
    "clip_qkv": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "mlp_bias": False,
    "n_group": 1,
    "n_shared_experts": 0,
    "qkv_bias": False,
    "rope_interleaved": False,
    "rope_type": "default",
    "rotary_pct": 1,
    "routed_scaling_factor": 1,
    "scoring_func": "softmax",
    "shared_expert_intermediate_size": 0,
    "topk_group": 1,
    "use_qk_norm": False,
}
"""Keys of other architectures, each with the value that means that a model does not have what it is about."""

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_PLAIN = {"qk_norm": "none", "shared_expert_hidden_dim": 0, "shared_expert_gate": False, "dense_hidden_dim": None}
_MOST_EXPERTS = 100_000


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says of itself.

    decoder: arguments of `DecoderMoE`, but for the router, the experts, the implementation and n_dense_layers.
    dense_layers: those without experts.
    router: the node of the router that it was trained with, without `name` and `impl`.
    max_positions: the longest sequence that it is made for.
    ends: the ids that end a text.
    interleaved: whether the files have the two dimensions that RoPE turns together side by side.
    extra_layers: how many layers the files have after the last, which predict further tokens and are not loaded.
    form: how the files' matrices are quantised.
    unread: the keys that nobody reads and that may have an effect.
    """

    model_type: str
    decoder: dict[str, Any]
    router: dict[str, Any]
    max_positions: int
    dense_layers: frozenset[int] = field(default_factory=frozenset)
    ends: frozenset[int] = field(default_factory=frozenset)
    interleaved: bool = False
    extra_layers: int = 0
    form: Fp8Blocks | Mxfp4 | None = None
    unread: tuple[str, ...] = ()

    @property
    def layout(self) -> str:
        """What tells the names of the files' tensors."""
        return f"{self.model_type} mxfp4" if isinstance(self.form, Mxfp4) else self.model_type

    @property
    def blocks(self) -> Fp8Blocks | None:
        """The form of matrices in fp8."""
        return self.form if isinstance(self.form, Fp8Blocks) else None

    @property
    def n_experts(self) -> int:
        return int(self.decoder["n_experts"])

    @property
    def top_k(self) -> int:
        return int(self.decoder["top_k"])


def read(folder: str | Path) -> Settings:
    """The settings of the checkpoint in `folder`.

    Raises:
        ValueError: one line for what is missing, unreadable or not supported.
    """
    path = Path(folder) / CONFIG
    try:
        content = read_object(path)
    except OSError as error:
        raise ValueError(
            f"model.path={folder}: {path} cannot be read ({error.strerror}); give the folder of a Hugging Face "
            "checkpoint, with config.json and safetensors."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"model.path={folder}: {path} is not valid JSON ({error}); download the file again."
        ) from error
    model_type = shown(content.get("model_type"))
    if model_type not in _ARCHITECTURES:
        raise ValueError(
            f"model.path={folder}: model_type={model_type} is not supported; supported: {', '.join(_ARCHITECTURES)}."
        )
    config = Keys(path, content)
    if (activation := config.get("hidden_act", default="silu")) not in ("silu", "swish"):
        raise config.refuse(f"hidden_act={shown(activation)} is not supported; experts are SwiGLU (silu).")
    form = read_quantization(config)
    if config.get("per_layer_config"):
        raise config.refuse("per_layer_config is not supported: all layers must have the same settings.")
    settings = _ARCHITECTURES[model_type](config)
    ends = ids_of(config, settings.decoder["vocab_size"])
    without = {**_WITHOUT, "use_qk_norm": settings.decoder["qk_norm"] != "none"}
    unread = [key for key in config.unread(_NO_EFFECT) if key not in without or content[key] != without[key]]
    return replace(settings, ends=ends, form=form, unread=tuple(map(shown, unread)))


def ids_of(keys: Keys, vocab_size: int) -> frozenset[int]:
    """The ids that end a text: `eos_token_id`, an id or a list of ids of the vocabulary."""
    ends = frozenset(keys.integers("eos_token_id"))
    if ends and max(ends) >= vocab_size:
        raise keys.refuse(f"eos_token_id={shown(max(ends))}: the model has {vocab_size} ids; download the file again.")
    return ends


def _trunk(config: Keys, rope_theta: float) -> dict[str, Any]:
    """What every decoder has, whatever its attention; `rope_theta` is the architecture's default."""
    theta, scaling = read_rope(config, rope_theta)
    return {
        "vocab_size": config.size("vocab_size"),
        "d_model": config.size("hidden_size"),
        "n_heads": config.size("num_attention_heads"),
        "n_layers": config.size("num_hidden_layers", most=MOST_LAYERS),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": config.number("rms_norm_eps", least=1e-20, most=1) or config.need("rms_norm_eps"),
        "tie_embeddings": config.flag("tie_word_embeddings", default=False),
    }


def _decoder(config: Keys, *, rope_theta: float, n_kv_heads: int | None) -> dict[str, Any]:
    """A decoder with grouped-query attention; `rope_theta` and `n_kv_heads` are the architecture's defaults."""
    trunk = _trunk(config, rope_theta)
    d_model, n_heads = trunk["d_model"], trunk["n_heads"]
    if n_kv_heads is None or "num_key_value_heads" in config.content:  # null: as many as there are heads
        n_kv_heads = n_heads
    head_dim = None if config.get("head_dim") is None else config.size("head_dim")
    n_kv_heads = config.size("num_key_value_heads", default=n_kv_heads)
    names = {"d_model": "hidden_size", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads"}
    if mistake := head_mistake(d_model, n_heads, n_kv_heads, head_dim, lambda key: names.get(key, key)):
        raise config.refuse(mistake)
    return {**trunk, "n_kv_heads": n_kv_heads, "head_dim": head_dim or d_model // n_heads}


def _moe(config: Keys, hidden_dim: int, top_k: int | None = None) -> dict[str, Any]:
    """The routed experts, of which each is `hidden_dim` wide; what only some architectures have is `_PLAIN`."""
    n_experts = config.size(
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", most=_MOST_EXPERTS
    )
    top_k = top_k or config.size("num_experts_per_tok", "moe_k")
    if top_k > n_experts:
        raise config.refuse(
            f"num_experts_per_tok={top_k} is more than the {n_experts} experts; download the file again."
        )
    return {"mlp_hidden_dim": hidden_dim, "n_experts": n_experts, "top_k": top_k, **_PLAIN}


def _softmax_topk(renormalize: bool) -> dict[str, Any]:
    return {"_target_": "moe_lab.routers.softmax_topk.SoftmaxTopK", "renormalize": renormalize, "gate_bias": False}


def _dense_layers(config: Keys, n_layers: int) -> frozenset[int]:
    """Of the Qwen models: those named, and those between every `decoder_sparse_step`-th."""
    if not isinstance(named := config.get("mlp_only_layers", default=[]), list):
        raise config.refuse(f"mlp_only_layers={shown(named)} must be a list of layers; download the file again.")
    named, step = config.integers("mlp_only_layers"), config.size("decoder_sparse_step", default=1)
    return frozenset(layer for layer in range(n_layers) if layer in named or (layer + 1) % step)


def _window(config: Keys, default: int | None = None) -> int | None:
    """How many tokens a token of a sliding layer sees; None: all before it."""
    if "sliding_window" not in config.content:
        return default
    return None if config.get("sliding_window") is None else config.size("sliding_window")


def _switched_window(config: Keys) -> int | None:
    """Of the Qwen models: as `_window`, if `use_sliding_window`."""
    config.get("max_window_layers")  # of Qwen3 it changes nothing
    if config.flag("use_sliding_window", default=False):
        return _window(config, default=4096)
    config.get("sliding_window")  # how it would be
    return None


def _windows(config: Keys, n_layers: int, window: int | None, below: int | None = None) -> list[int | None]:
    """Layer by layer, as `layer_types` says; without it of every other layer, the first one included, `below` one."""
    kinds = config.get("layer_types")
    if kinds is None:
        slides = [i % 2 == 0 and (below is None or i < below) for i in range(n_layers)]
        kinds = ["sliding_attention" if each else "full_attention" for each in slides]
    if not isinstance(kinds, list) or len(kinds) != n_layers or not {*map(str, kinds)} <= _LAYER_TYPES:
        raise config.refuse(
            f"layer_types={shown(kinds)} must have one of {sorted(_LAYER_TYPES)} per layer ({n_layers})."
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _mixtral(config: Keys) -> Settings:
    decoder, window = _decoder(config, rope_theta=1e6, n_kv_heads=8), _window(config)
    return Settings(
        "mixtral",
        {**decoder, **_moe(config, config.size("intermediate_size")), "windows": [window] * decoder["n_layers"]},
        _softmax_topk(renormalize=True),
        config.size("max_position_embeddings"),
    )


def _olmoe(config: Keys) -> Settings:
    bias = config.flag("attention_bias", default=False)
    return Settings(
        "olmoe",
        {
            **_decoder(config, rope_theta=1e4, n_kv_heads=None),
            **_moe(config, config.size("intermediate_size")),
            "qk_norm": "full",
            "clip_qkv": config.number("clip_qkv"),
            "qkv_bias": bias,
            "o_bias": bias,
        },
        _softmax_topk(config.flag("norm_topk_prob", default=False)),
        config.size("max_position_embeddings"),
    )


def _qwen3_moe(config: Keys) -> Settings:
    decoder = _decoder(config, rope_theta=1e4, n_kv_heads=4)
    bias = config.flag("attention_bias", default=False)
    window = _switched_window(config)
    return Settings(
        "qwen3_moe",
        {
            **decoder,
            **_moe(config, config.size("moe_intermediate_size")),
            "dense_hidden_dim": config.size("intermediate_size"),
            "qk_norm": "head",
            "qkv_bias": bias,
            "o_bias": bias,
            "windows": [window] * decoder["n_layers"],
        },
        _softmax_topk(config.flag("norm_topk_prob", default=False)),
        config.size("max_position_embeddings"),
        _dense_layers(config, decoder["n_layers"]),
    )


def _qwen2_moe(config: Keys) -> Settings:
    decoder = _decoder(config, rope_theta=1e4, n_kv_heads=16)
    n_layers, window = decoder["n_layers"], _switched_window(config)
    widest = config.size("max_window_layers", default=28, least=0)
    return Settings(
        "qwen2_moe",
        {
            **decoder,
            **_moe(config, config.size("moe_intermediate_size")),
            "dense_hidden_dim": config.size("intermediate_size"),
            "shared_expert_hidden_dim": config.size("shared_expert_intermediate_size"),
            "shared_expert_gate": True,
            "qkv_bias": config.flag("qkv_bias", default=True),
            "windows": _windows(config, n_layers, window, below=widest),
        },
        _softmax_topk(config.flag("norm_topk_prob", default=False)),
        config.size("max_position_embeddings"),
        _dense_layers(config, n_layers),
    )


def _granitemoe(config: Keys) -> Settings:
    decoder = _decoder(config, rope_theta=1e4, n_kv_heads=None)
    bias = config.flag("attention_bias", default=False)
    return Settings(
        "granitemoe",
        {
            **decoder,
            **_moe(config, config.size("intermediate_size")),
            "qkv_bias": bias,
            "o_bias": bias,
            "embedding_scale": _multiplier(config, "embedding_multiplier"),
            "residual_scale": _multiplier(config, "residual_multiplier"),
            "logits_scale": 1 / _multiplier(config, "logits_scaling"),
            "scale": _multiplier(config, "attention_multiplier"),
        },
        _softmax_topk(renormalize=True),
        config.size("max_position_embeddings"),
    )


def _gpt_oss(config: Keys) -> Settings:
    config.need("head_dim")
    if not config.get("rope_scaling"):
        config.need("rope_parameters")  # without them transformers makes up a YaRN
    decoder = _decoder(config, rope_theta=150_000, n_kv_heads=8)
    moe, bias = _moe(config, config.size("intermediate_size")), config.flag("attention_bias", default=True)
    if (named := config.get("experts_per_token", default=moe["top_k"])) != moe["top_k"]:
        raise config.refuse(
            f"num_experts_per_tok={moe['top_k']} and experts_per_token={shown(named)} contradict each other; remove "
            "one of the two."
        )
    activation = (config.number("swiglu_alpha") or 1.702, config.number("swiglu_limit") or 7.0)
    return Settings(
        "gpt_oss",
        {
            **decoder,
            **moe,
            "qkv_bias": bias,
            "o_bias": bias,
            "sinks": True,
            "windows": _windows(config, decoder["n_layers"], _window(config, default=128)),
            "expert_settings": {"bias": True, "activation": activation, "gate_bias": True},
        },
        _softmax_topk(renormalize=True),
        config.size("max_position_embeddings"),
    )


def _phimoe(config: Keys) -> Settings:
    decoder, bias = _decoder(config, rope_theta=1e6, n_kv_heads=8), config.flag("attention_bias", default=False)
    moe, window = _moe(config, config.size("intermediate_size")), _window(config)
    routers.require(config, "num_experts_per_tok", 2)
    rivals = config.get("router_jitter_noise", default=0.01)
    if not is_number(rivals) or not 0 <= rivals <= 1:
        raise config.refuse(
            f"router_jitter_noise={shown(rivals)} must be a number from 0 to 1; download the file again."
        )
    config.get("input_jitter_noise")  # of training
    longest, scaling = config.size("max_position_embeddings"), decoder["rope_scaling"]
    if scaling is not None and scaling["rope_type"] == "longrope":
        if len(scaling["short_factor"]) != decoder["head_dim"] // 2:
            raise config.refuse(
                f"short_factor has {len(scaling['short_factor'])} numbers instead of {decoder['head_dim'] // 2}, one "
                "per pair of dimensions of a head; download the file again."
            )
        longest = min(longest, scaling["original_max_position_embeddings"])
    return Settings(
        "phimoe",
        {
            **decoder,
            **moe,
            "qkv_bias": bias,
            "o_bias": bias,
            "norm": "layer",
            "head_bias": config.flag("lm_head_bias", default=False),
            "windows": [window] * decoder["n_layers"],
        },
        {"_target_": "moe_lab.routers.sparse_mixer.SparseMixer", "jitter_eps": float(rivals)},
        longest,
    )


def _ernie4_5_moe(config: Keys) -> Settings:
    decoder, width = _decoder(config, rope_theta=5e5, n_kv_heads=4), config.size("moe_intermediate_size")
    for key, value in (("use_bias", False), ("moe_gate", "topk"), ("moe_use_aux_free", True)):
        routers.require(config, key, value)
    config.get("moe_capacity")  # of training: no token is dropped
    if (least := config.number("moe_norm_min") or 1e-12) > 1e-9:
        raise config.refuse(
            f"moe_norm_min={least:g} is not supported; weights are divided by their sum, whatever it is."
        )
    first, interval = (config.size(f"moe_layer_{key}", default=1, least=0) for key in ("start_index", "interval"))
    last = config.get("moe_layer_end_index", default=-1)
    if not is_integer(last) or last < -1 or interval < 1:
        raise config.refuse(
            f"moe_layer_end_index={shown(last)} must be the number of a layer or -1, and moe_layer_interval={interval} "
            "at least 1; download the file again."
        )
    layers = range(decoder["n_layers"])
    sparse = {i for i in layers if (i + 1) % interval == 0 and i >= first and (last == -1 or i <= last)}
    return Settings(
        "ernie4_5_moe",
        {
            **decoder,
            **_moe(config, width),
            "tie_embeddings": config.flag("tie_word_embeddings", default=True),
            "dense_hidden_dim": config.size("intermediate_size"),
            "shared_expert_hidden_dim": config.size("moe_num_shared_experts", default=2, least=0) * width,
        },
        routers.scored(score="softmax", bias=True, renormalize=True),
        config.size("max_position_embeddings"),
        frozenset(layers) - sparse,
        interleaved=True,
        extra_layers=config.size("num_nextn_predict_layers", default=0, least=0, most=MOST_LAYERS),
    )


def _hunyuan_v1_moe(config: Keys) -> Settings:
    decoder, width = _decoder(config, rope_theta=1e4, n_kv_heads=None), config.size("intermediate_size")
    bias = config.flag("attention_bias", default=False)
    # What may be said layer by layer has to be the same in all; the widths that transformers does not read agree.
    top_k = _of_all_layers(config, "moe_topk", "num_experts_per_tok")
    for key, value in (("moe_intermediate_size", width), ("num_shared_expert", 1)):
        if config.get(key) is not None and _of_all_layers(config, key) != value:
            raise config.refuse(f"{key} is not supported with another value than {value}.")
    for key, value in (("use_qk_norm", True), ("use_cla", False), ("moe_layer_num_skipped", 0), ("norm_type", "rms")):
        routers.require(config, key, value)
    return Settings(
        "hunyuan_v1_moe",
        {
            **decoder,
            **_moe(config, width, top_k),
            "shared_expert_hidden_dim": width,
            "qk_norm": "head",
            "turn_first": True,
            "qkv_bias": bias,
            "o_bias": bias,
        },
        _softmax_topk(renormalize=True),
        config.size("max_position_embeddings"),
    )


def _of_all_layers(config: Keys, *names: str) -> int:
    """A size, once or once for each layer, which must be the same."""
    value = config.need(*names)
    sizes = set(value) if isinstance(value, list) and all(map(is_integer, value)) else {value}
    if len(sizes) != 1 or not is_integer(only := sizes.pop()) or only < 1:
        raise config.refuse(f"{names[0]}={shown(value)} must be one integer >= 1, the same in all layers.")
    return int(only)


def _multiplier(config: Keys, key: str) -> float:
    """A factor, 1 if the file does not have it."""
    return float(config.number(key) or 1)


def _deepseek(config: Keys, model_type: str, router: Callable[[Keys, int, int], dict[str, Any]]) -> Settings:
    """Latent attention, first dense layers, then experts beside shared ones without a gate."""
    trunk, width = _trunk(config, 1e4), config.size("moe_intermediate_size")
    latent, moe = read_latent(config, trunk["n_heads"]), _moe(config, width)
    config.need("first_k_dense_replace")
    first = config.size("first_k_dense_replace", default=0, least=0)
    routers.require(config, "moe_layer_freq", 1)
    return Settings(
        model_type,
        {
            **trunk,
            **latent,
            **moe,
            "dense_hidden_dim": config.size("intermediate_size"),
            "shared_expert_hidden_dim": config.size("n_shared_experts") * width,
        },
        router(config, moe["n_experts"], moe["top_k"]),
        config.size("max_position_embeddings"),
        frozenset(range(min(first, trunk["n_layers"]))),
        interleaved=config.flag("rope_interleave", default=True),
        extra_layers=config.size("num_nextn_predict_layers", "num_mtp_layers", default=0, least=0, most=MOST_LAYERS),
    )


def _deepseek_v2(config: Keys) -> Settings:
    routers.require(config, "mlp_bias", False)
    routers.require(config, "rope_interleave", True)
    return _deepseek(config, "deepseek_v2", routers.softmax_in_groups)


def _deepseek_v3(config: Keys) -> Settings:
    return _deepseek(config, "deepseek_v3", routers.sigmoid_with_bias)


_ARCHITECTURES: dict[str, Callable[[Keys], Settings]] = {
    "olmoe": _olmoe,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
    "granitemoe": _granitemoe,
    "gpt_oss": _gpt_oss,
    "phimoe": _phimoe,
    "ernie4_5_moe": _ernie4_5_moe,
    "hunyuan_v1_moe": _hunyuan_v1_moe,
}
