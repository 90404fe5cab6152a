"""The config.json of a Hugging Face checkpoint, as the settings of our decoder.

An architecture is a function from the file's keys to settings; what most share stands in `checkpoint_sizes`. Files
written by transformers 4 and 5 differ in some names (`rope_theta` and `rope_scaling` against `rope_parameters`,
`num_experts` against `num_local_experts`), and both are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_lab.models import checkpoint_deepseek as deepseek
from moe_lab.models import checkpoint_delta_net as delta_net
from moe_lab.models import checkpoint_gemma as gemma
from moe_lab.models import checkpoint_plain as plain
from moe_lab.models import checkpoint_sizes as sizes
from moe_lab.models import checkpoint_variants as variants
from moe_lab.models.checkpoint_effect import NO_EFFECT, WITHOUT
from moe_lab.models.checkpoint_forms import Fp8Blocks, Mxfp4, read_quantization
from moe_lab.models.checkpoint_keys import Keys, read_object, shown
from moe_lab.models.checkpoint_latent import read_latent, read_turned
from moe_lab.models.checkpoint_names import Naming
from moe_lab.models.checkpoint_text_part import HAVE_TEXT_PART, text_part

CONFIG = "config.json"

_Part = dict[str, Any]
_Read = Callable[[Keys, _Part, _Part], _Part]
"""What an architecture has of its own, beside what the file says of the attention and of the routed experts."""


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
    others: parts that are not loaded: what their tensors' keys begin with, and what each is.
    prefix, groups: see `Naming`.
    only_text: whether the model reads images too, and only its text part is loaded.
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
    others: Mapping[str, str] = field(default_factory=dict)
    prefix: str = "model"
    only_text: bool = False
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    form: Fp8Blocks | Mxfp4 | None = None
    unread: tuple[str, ...] = ()

    @property
    def naming(self) -> Naming:
        """What tells the names of the files' tensors."""
        model = f"{self.model_type} mxfp4" if isinstance(self.form, Mxfp4) else self.model_type
        return Naming(model, self.prefix, self.groups)

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
    whole = config = Keys(path, content)
    form = read_quantization(config)
    if model_type in HAVE_TEXT_PART:
        config = text_part(whole)
    if (activation := config.get("hidden_act", default="silu")) not in ("silu", "swish"):
        raise config.refuse(f"hidden_act={shown(activation)} is not supported; experts are SwiGLU (silu).")
    if model_type not in _BY_LAYER and config.get("per_layer_config"):
        raise config.refuse("per_layer_config is not supported: all layers must have the same settings.")
    settings = _ARCHITECTURES[model_type](config)
    ends = ids_of(config, settings.decoder["vocab_size"])
    without = {**WITHOUT, "use_qk_norm": settings.decoder["qk_norm"] != "none"}
    unread = whole.unread(NO_EFFECT, without)
    return replace(settings, ends=ends, form=form, unread=tuple(map(shown, unread)))


def ids_of(keys: Keys, vocab_size: int) -> frozenset[int]:
    """The ids that end a text: `eos_token_id`, an id or a list of ids of the vocabulary."""
    ends = frozenset(keys.integers("eos_token_id"))
    if ends and max(ends) >= vocab_size:
        raise keys.refuse(f"eos_token_id={shown(max(ends))}: the model has {vocab_size} ids; download the file again.")
    return ends


def _grouped(
    model_type: str,
    read_rest: _Read,
    *,
    rope_theta: float,
    n_kv_heads: int | None,
    width: str = "intermediate_size",
    share: float | None = None,
    top_k: Callable[[Keys], int] | None = None,
    needs: tuple[str, ...] = (),
    eps: str = "rms_norm_eps",
) -> Callable[[Keys], Settings]:
    """An architecture with grouped-query attention, of which `read_rest` reads what is its own.

    Args:
        rope_theta, n_kv_heads: its defaults.
        width: the key of an expert's width.
        share: how much of a head RoPE turns by default; None: all, and no file may say anything else.
        needs: keys that it cannot do without.
        eps: the key of the norms' epsilon, where RoPE turns all of a head.
    """

    def settings(config: Keys) -> Settings:
        for key in needs:
            config.need(key)
        if share is None:
            decoder = sizes.decoder_of(config, rope_theta=rope_theta, n_kv_heads=n_kv_heads, eps=eps)
        else:
            decoder = sizes.partial_decoder(config, rope_theta=rope_theta, n_kv_heads=n_kv_heads, share=share)
        moe = sizes.experts_of(config, config.size(width), top_k(config) if top_k else None)
        return _settings(model_type, config, read_rest(config, decoder, moe))

    return settings


def _latent(model_type: str, read_rest: _Read, *, whole_head: bool = False) -> Callable[[Keys], Settings]:
    """An architecture with latent attention, of which `read_rest` reads what is its own; `whole_head`: see there."""

    def settings(config: Keys) -> Settings:
        trunk = sizes.trunk(config, *read_turned(config, whole_head=whole_head))
        decoder = {**trunk, **read_latent(config, trunk["n_heads"], whole_head=whole_head)}
        moe = sizes.experts_of(config, config.size("moe_intermediate_size"))
        return _settings(model_type, config, read_rest(config, decoder, moe))

    return settings


def _settings(model_type: str, config: Keys, parts: _Part) -> Settings:
    return Settings(model_type, **{"max_positions": config.size("max_position_embeddings"), **parts})


def _minimax_m2(config: Keys) -> Settings:
    share = config.size("rotary_dim") / config.size("head_dim") if config.get("rotary_dim") is not None else 1.0
    architecture = _grouped(
        "minimax_m2", deepseek.minimax_m2, rope_theta=5e6, n_kv_heads=8, share=share, needs=("head_dim",)
    )
    return architecture(config)


def _gated(model_type: str, read_rest: _Read, *, n_kv_heads: int = 2) -> Callable[[Keys], Settings]:
    """One of Qwen's with gated delta nets."""
    needs = ("head_dim",)
    return _grouped(
        model_type, read_rest, rope_theta=1e4, n_kv_heads=n_kv_heads, width=_MOE_WIDTH, share=0.25, needs=needs
    )


_MOE_WIDTH = "moe_intermediate_size"
_BY_LAYER = {"gemma4", "gemma4_text"}
"""Models whose layers may differ in more than their kind."""
_ARCHITECTURES: dict[str, Callable[[Keys], Settings]] = {
    "olmoe": _grouped("olmoe", plain.olmoe, rope_theta=1e4, n_kv_heads=None),
    "mixtral": _grouped("mixtral", plain.mixtral, rope_theta=1e6, n_kv_heads=8),
    "qwen3_moe": _grouped("qwen3_moe", plain.qwen3_moe, rope_theta=1e4, n_kv_heads=4, width=_MOE_WIDTH),
    "qwen2_moe": _grouped("qwen2_moe", plain.qwen2_moe, rope_theta=1e4, n_kv_heads=16, width=_MOE_WIDTH),
    "qwen3_next": _gated("qwen3_next", delta_net.qwen3_next),
    "qwen3_5_moe": _gated("qwen3_5_moe", delta_net.qwen3_5_moe),
    "qwen3_5_moe_text": _gated("qwen3_5_moe_text", delta_net.qwen3_5_moe_text),
    "deepseek_v2": _latent("deepseek_v2", deepseek.deepseek_v2),
    "deepseek_v3": _latent("deepseek_v3", deepseek.deepseek_v3),
    "kimi_k2": _latent("kimi_k2", deepseek.deepseek_v3),
    "mistral4": _latent("mistral4", deepseek.mistral4, whole_head=True),
    "glm4_moe_lite": _latent("glm4_moe_lite", deepseek.glm4_moe_lite),
    "glm4_moe": _grouped("glm4_moe", deepseek.glm4_moe, rope_theta=1e4, n_kv_heads=8, width=_MOE_WIDTH, share=0.5),
    "solar_open": _grouped(
        "solar_open", deepseek.solar_open, rope_theta=1e6, n_kv_heads=8, width=_MOE_WIDTH, needs=("head_dim",)
    ),
    "dots1": _grouped("dots1", deepseek.dots1, rope_theta=1e4, n_kv_heads=32, width=_MOE_WIDTH),
    "minimax_m2": _minimax_m2,
    "granitemoe": _grouped("granitemoe", variants.granitemoe, rope_theta=1e4, n_kv_heads=None),
    "gpt_oss": _grouped("gpt_oss", variants.gpt_oss, rope_theta=150_000, n_kv_heads=8, needs=("head_dim",)),
    "phimoe": _grouped("phimoe", variants.phimoe, rope_theta=1e6, n_kv_heads=8),
    "ernie4_5_moe": _grouped(
        "ernie4_5_moe",
        variants.ernie4_5_moe,
        rope_theta=5e5,
        n_kv_heads=4,
        width=_MOE_WIDTH,
        top_k=variants.ernie_top_k,
    ),
    "lfm2_moe": _grouped("lfm2_moe", variants.lfm2_moe, rope_theta=1e6, n_kv_heads=8, width=_MOE_WIDTH, eps="norm_eps"),
    "gemma4": lambda config: _settings("gemma4", config, gemma.gemma4(config)),
    "gemma4_text": lambda config: _settings("gemma4_text", config, gemma.gemma4_text(config)),
    "hunyuan_v1_moe": _grouped(
        "hunyuan_v1_moe", variants.hunyuan_v1_moe, rope_theta=1e4, n_kv_heads=None, top_k=variants.hunyuan_top_k
    ),
}
