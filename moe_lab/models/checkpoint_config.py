"""The config.json of a Hugging Face checkpoint, as the settings of our decoder.

An architecture is a function from the file's keys to settings; what most share stands in `_decoder` and `_moe`. Files
written by transformers 4 and 5 differ in some names (`rope_theta` and `rope_scaling` against `rope_parameters`,
`num_experts` against `num_local_experts`), and both are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_lab.records import files

CONFIG = "config.json"
_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""The kinds of RoPE in `rope`, and the keys that each cannot do without."""
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_PLAIN = {"qk_norm": "none", "shared_expert_hidden_dim": 0, "shared_expert_gate": False, "dense_hidden_dim": None}
_OPTIONAL_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says of itself.

    decoder: arguments of `DecoderMoE`, but for the router, the experts, the implementation and n_dense_layers.
    dense_layers: those without experts.
    router: the node of the router that it was trained with, without `name` and `impl`.
    max_positions: the longest sequence that it is made for.
    ends: the ids that end a text.
    """

    model_type: str
    decoder: dict[str, Any]
    router: dict[str, Any]
    max_positions: int
    dense_layers: frozenset[int] = field(default_factory=frozenset)
    ends: frozenset[int] = field(default_factory=frozenset)

    @property
    def n_experts(self) -> int:
        return int(self.decoder["n_experts"])

    @property
    def top_k(self) -> int:
        return int(self.decoder["top_k"])


class _Config:
    """The keys of one file. A missing required key is an error that names the key."""

    def __init__(self, path: Path, content: Mapping[str, Any]):
        self.path, self.content = path, content

    def need(self, *names: str) -> Any:
        """The first of several names that the file has."""
        value = self.get(*names)
        if value is None:
            raise ValueError(
                f"model.path: {self.path} has no {' or '.join(names)}; the configuration of a "
                f"{self.content.get('model_type')} checkpoint is incomplete. Download the file again."
            )
        return value

    def get(self, *names: str, default: Any = None) -> Any:
        """As `need`, with a default; null counts as missing."""
        return next((self.content[name] for name in names if self.content.get(name) is not None), default)

    def size(self, *names: str, default: int | None = None) -> int:
        """As `need`, or with a default as `get`: an integer >= 1."""
        value = self.need(*names) if default is None else self.get(*names, default=default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refuse(f"{' or '.join(names)}={value} must be an integer >= 1; download the file again.")
        return value

    def number(self, *names: str) -> float | None:
        """As `get`: a number > 0, or None."""
        value = self.get(*names)
        if value is not None and (not _is_number(value) or value <= 0):
            raise self.refuse(f"{' or '.join(names)}={value} must be a number > 0; download the file again.")
        return value  # type: ignore[no-any-return]

    def flag(self, name: str, default: bool) -> bool:
        """As `get`: true or false."""
        value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise self.refuse(f"{name}={value} must be true or false; download the file again.")
        return value

    def window(self) -> int | None:
        """How many tokens a token of a sliding layer sees; None: all before it."""
        return None if self.get("sliding_window") is None else self.size("sliding_window")

    def refuse(self, what: str) -> ValueError:
        return ValueError(f"model.path: {self.path}: {what}")


def read(folder: str | Path) -> Settings:
    """The settings of the checkpoint in `folder`.

    Raises:
        ValueError: one line for what is missing, unreadable or not supported.
    """
    path = Path(folder) / CONFIG
    try:
        content = files.read_json(path)
    except OSError as error:
        raise ValueError(
            f"model.path={folder}: {path} cannot be read ({error.strerror}); give the folder of a Hugging Face "
            "checkpoint, with config.json and safetensors."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"model.path={folder}: {path} is not valid JSON ({error}); download the file again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"model.path={folder}: {path} must be a JSON object; download the file again.")
    model_type = str(content.get("model_type"))
    if model_type not in _ARCHITECTURES:
        raise ValueError(
            f"model.path={folder}: model_type={model_type} is not supported; supported: {', '.join(_ARCHITECTURES)}."
        )
    config = _Config(path, content)
    if (activation := config.get("hidden_act", default="silu")) != "silu":
        raise config.refuse(f"hidden_act={activation} is not supported; experts are SwiGLU (silu).")
    if content.get("quantization_config"):
        raise config.refuse("quantised checkpoints are not supported; use the bf16 weights.")
    end = config.get("eos_token_id", default=[])
    ends = end if isinstance(end, list) else [end]
    if not all(isinstance(token_id, int) for token_id in ends):
        raise config.refuse(f"eos_token_id={end} must be an id or a list of ids; download the file again.")
    return replace(_ARCHITECTURES[model_type](config), ends=frozenset(ends))


def _decoder(config: _Config, *, rope_theta: float) -> dict[str, Any]:
    """What every decoder has; `rope_theta` is the architecture's default."""
    theta, scaling = _rope(config, rope_theta)
    d_model, n_heads = config.size("hidden_size"), config.size("num_attention_heads")
    return {
        "vocab_size": config.size("vocab_size"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": config.size("num_key_value_heads", default=n_heads),
        "head_dim": config.size("head_dim", default=d_model // n_heads),
        "n_layers": config.size("num_hidden_layers"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": config.number("rms_norm_eps") or config.need("rms_norm_eps"),
        "tie_embeddings": config.flag("tie_word_embeddings", default=False),
    }


def _rope(config: _Config, default_theta: float) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling or None)."""
    given = config.get("rope_parameters", "rope_scaling", default={})
    if not isinstance(given, dict):
        raise config.refuse(f"rope_parameters or rope_scaling={given} must be a JSON object; download the file again.")
    scaling = dict(given)
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta", default=default_theta)
    if not _is_number(theta) or theta <= 1:
        raise config.refuse(f"rope_theta={theta} must be a number > 1; download the file again.")
    old_name = scaling.pop("type", None)
    kind = scaling["rope_type"] = str(scaling.get("rope_type") or old_name or "default")
    if kind not in _SCALINGS:
        raise config.refuse(f"rope_type={kind} is not supported; supported: {', '.join(_SCALINGS)}.")
    if (scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor", default=1.0)) != 1.0:
        raise config.refuse("partial_rotary_factor is not supported: RoPE must rotate all dimensions of a head.")
    longest = config.size("max_position_embeddings")
    if kind in ("yarn", "llama3"):
        original = scaling.setdefault(
            "original_max_position_embeddings", config.get("original_max_position_embeddings", default=longest)
        )
        if scaling.get("factor") is None and _is_number(original) and original > 0:
            scaling["factor"] = longest / original
    for key in _SCALINGS[kind]:
        if not _is_number(scaling.get(key)) or scaling[key] <= 0:
            raise config.refuse(f"rope_type={kind}: {key}={scaling.get(key)} must be a number > 0.")
    for key in _OPTIONAL_NUMBERS:
        if scaling.get(key) is not None and (not _is_number(scaling[key]) or scaling[key] < 0):
            raise config.refuse(f"rope_type={kind}: {key}={scaling[key]} must be a number >= 0.")
    return float(theta), None if kind == "default" else scaling


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _moe(config: _Config, hidden_dim: int) -> dict[str, Any]:
    """The routed experts, of which each is `hidden_dim` wide; what only some architectures have is `_PLAIN`."""
    n_experts = config.size("num_experts", "num_local_experts", "n_routed_experts")
    top_k = config.size("num_experts_per_tok")
    if top_k > n_experts:
        raise config.refuse(
            f"num_experts_per_tok={top_k} is more than the {n_experts} experts; download the file again."
        )
    return {"mlp_hidden_dim": hidden_dim, "n_experts": n_experts, "top_k": top_k, **_PLAIN}


def _softmax_topk(renormalize: bool) -> dict[str, Any]:
    return {"_target_": "moe_lab.routers.softmax_topk.SoftmaxTopK", "renormalize": renormalize, "gate_bias": False}


def _dense_layers(config: _Config, n_layers: int) -> frozenset[int]:
    """Of the Qwen models: those named, and those between every `decoder_sparse_step`-th."""
    named, step = config.get("mlp_only_layers", default=[]), config.size("decoder_sparse_step", default=1)
    if not isinstance(named, list):
        raise config.refuse(f"mlp_only_layers={named} must be a list of layers; download the file again.")
    return frozenset(layer for layer in range(n_layers) if layer in named or (layer + 1) % step)


def _mixtral(config: _Config) -> Settings:
    decoder, window = _decoder(config, rope_theta=1e6), config.window()
    return Settings(
        "mixtral",
        {**decoder, **_moe(config, config.size("intermediate_size")), "windows": [window] * decoder["n_layers"]},
        _softmax_topk(renormalize=True),
        config.size("max_position_embeddings"),
    )


def _olmoe(config: _Config) -> Settings:
    bias = config.flag("attention_bias", default=False)
    return Settings(
        "olmoe",
        {
            **_decoder(config, rope_theta=1e4),
            **_moe(config, config.size("intermediate_size")),
            "qk_norm": "full",
            "clip_qkv": config.number("clip_qkv"),
            "qkv_bias": bias,
            "o_bias": bias,
        },
        _softmax_topk(config.flag("norm_topk_prob", default=False)),
        config.size("max_position_embeddings"),
    )


def _qwen3_moe(config: _Config) -> Settings:
    decoder = _decoder(config, rope_theta=1e4)
    bias = config.flag("attention_bias", default=False)
    window = config.window() if config.flag("use_sliding_window", default=False) else None
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


def _qwen2_moe(config: _Config) -> Settings:
    decoder = _decoder(config, rope_theta=1e4)
    n_layers = decoder["n_layers"]
    slides = config.flag("use_sliding_window", default=False)
    kinds = config.get("layer_types")
    if kinds is None:  # as transformers reads it: every other layer, below max_window_layers
        widest = config.get("max_window_layers", default=28)
        kinds = ["sliding_attention" if i % 2 == 0 and i < widest else "full_attention" for i in range(n_layers)]
    if not isinstance(kinds, list) or len(kinds) != n_layers or not {*map(str, kinds)} <= _LAYER_TYPES:
        raise config.refuse(f"layer_types={kinds} must have one of {sorted(_LAYER_TYPES)} per layer ({n_layers}).")
    window = config.window() if slides else None
    return Settings(
        "qwen2_moe",
        {
            **decoder,
            **_moe(config, config.size("moe_intermediate_size")),
            "dense_hidden_dim": config.size("intermediate_size"),
            "shared_expert_hidden_dim": config.size("shared_expert_intermediate_size"),
            "shared_expert_gate": True,
            "qkv_bias": config.flag("qkv_bias", default=True),
            "windows": [window if kind == "sliding_attention" else None for kind in kinds],
        },
        _softmax_topk(config.flag("norm_topk_prob", default=False)),
        config.size("max_position_embeddings"),
        _dense_layers(config, n_layers),
    )


_ARCHITECTURES: dict[str, Callable[[_Config], Settings]] = {
    "olmoe": _olmoe,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
}
