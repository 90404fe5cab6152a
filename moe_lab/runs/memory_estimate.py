"""The memory that a run of a configuration needs at least, by arithmetic alone: nothing is built or allocated.

Each part is a lower bound of what is in memory at the same time while a run is verified: its own output beside the pass
of the fp32 reference. So what does not fit cannot run, and what fits may still not: an implementation may need more.
A user's own model is not known, and not estimated. The names of sizes are those of conf/model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_lab.errors import UnavailableError
from moe_lab.measure import memory
from moe_lab.models import checkpoint_config
from moe_lab.records import inputs

if TYPE_CHECKING:
    import torch

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_ID, _FP32 = 8, 4
_LAYER_OBJECTS = 40_000  # bytes of the host: the modules of a layer and of its twin, without their tensors
_TIGHT = 0.8  # of what is there: above it, a run is warned of

_SIZES = ("hidden", "n_layers", "n_experts", "vocab_size", "d_model", "mlp_hidden_dim")
_KEYS = {
    "modules": "model.n_layers",
    "input": "batch or seq_len",
    "cache": "batch, seq_len or workload.context_len",
    "output": "batch or seq_len",
    "activations": "batch or seq_len",
    "calibration": "router.calibration_tokens",
    "text": "the size of the texts (workload.path)",
}
"""What to lower for each part but the parameters."""

TOKENS_AT_ONCE = 1 << 14
"""Of whole sequences, in one pass of the reference over decoded ones."""

Config = Mapping[Any, Any]


class Host(NamedTuple):
    """Stands for `torch.device("cpu")`: `moe-lab plan` asks for its memory without torch."""

    type: str = "cpu"


Parts = dict[str, int]
"""Bytes by part. `modules` and `text` are on the host, the others on the device."""


def estimate(config: Config) -> Parts | None:
    """Bytes at least, of a checked configuration, composed or of a record; None for a model that is not the package's.

    Raises:
        ValueError: the config.json of a checkpoint or a text cannot be read.
    """
    kinds = {"minimal": _minimal, "layer_only": _moe_layer, "router_only": _router}
    kinds |= {"decoder_moe": _decoder, "transformer_decoder": _decoder, "checkpoint": _decoder}
    package, _, rest = str(config["model"]["_target_"]).partition(".models.")
    kind = kinds.get(rest.partition(".")[0])
    if package != "moe_lab" or kind is None:
        return None
    return kind(config, _BYTES[config["dtype"]["name"]])


def refusal(config: Config, device: torch.device | Host) -> str | None:
    """Why a run cannot have the memory that it needs on `device`; None if it may, or if the system does not tell."""
    for place, parts in _by_place(config, device):
        needed, there = sum(parts.values()), memory.available_bytes(place)
        if there is not None and needed > there + (memory.swap_bytes() if place.type == "cpu" else 0):
            most = max(parts, key=lambda part: parts[part])
            keys = _sizes_of(config["model"]) if most == "parameters" else _KEYS[most]
            return (
                f"memory: needs at least {_amount(needed)} ({most}: {_amount(parts[most])}), but this {place.type} has "
                f"{_amount(there)}; lower {keys}"
            )
    return None


def _sizes_of(model: Config) -> str:
    """The keys that decide how many parameters there are."""
    prefix, node = ("model.shape", model["shape"]) if "shape" in model else ("model", model)
    keys = [f"{prefix}.{key}" for key in _SIZES if key in node]
    return " or ".join([", ".join(keys[:-1]), keys[-1]] if len(keys) > 1 else keys or ["dtype"])


def _by_place(config: Config, device: torch.device | Host) -> Iterator[tuple[torch.device | Host, Parts]]:
    parts = estimate(config) or {}
    host = parts if device.type == "cpu" else {part: parts.pop(part, 0) for part in ("modules", "text")}
    if device.type != "cpu":
        yield device, parts
    yield Host(), host


def require_memory(config: Config, device: torch.device | Host) -> None:
    """Raise `UnavailableError` for a run that cannot have the memory that it needs."""
    if (reason := refusal(config, device)) is not None:
        raise UnavailableError(reason)


def warning(config: Config, device: torch.device | Host) -> str | None:
    """A warning for a run that needs most of the memory; None for the others."""
    for place, parts in _by_place(config, device):
        needed, there = sum(parts.values()), memory.available_bytes(place)
        if there is not None and needed > _TIGHT * there:
            return (
                f"memory: needs at least {_amount(needed)}, and this {place.type} has {_amount(there)}; the run may be "
                "ended by the system."
            )
    return None


def _amount(n: int) -> str:
    return f"{n / 1e9:,.0f} GB" if n >= 1e11 else f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"


def _minimal(config: Config, size: int) -> Parts:
    n, hidden = config["batch"], config["model"]["hidden"]
    return {
        "parameters": hidden * hidden * size,
        "input": n * hidden * size,
        "output": n * hidden * size,
        "activations": 3 * n * hidden * _FP32,  # the product, its sum with the input, the norm of that
    }


def _moe_layer(config: Config, size: int) -> Parts:
    shape, n = config["model"]["shape"], config["batch"] * config["seq_len"]
    E, D, F = shape["n_experts"], shape["d_model"], shape["mlp_hidden_dim"]
    return {
        "parameters": E * (D + 3 * D * F) * size,
        "input": n * D * size,
        "output": n * D * size,
        # The output or the logits, and the input in fp32.
        "activations": n * max(D, E) * _FP32 + (n * D * _FP32 if size != _FP32 else 0),
        "calibration": _calibration_tokens(config["router"]) * (D * size + E * _FP32),
    }


def _router(config: Config, size: int) -> Parts:
    shape, n = config["model"]["shape"], config["batch"] * config["seq_len"]
    E, D = shape["n_experts"], shape["d_model"] if config["model"]["gate"] else 0
    return {
        "parameters": E * D * size,
        "input": n * (D or E) * size,
        "activations": n * E * _FP32,  # the scores
        "calibration": _calibration_tokens(config["router"]) * (D or E) * size,
    }


def _decoder(config: Config, size: int) -> Parts:
    model, dense = _sizes(config["model"])
    V, D, L, F = (model[key] for key in ("vocab_size", "d_model", "n_layers", "mlp_hidden_dim"))
    E, shared = model.get("n_experts", 0), model.get("shared_expert_hidden_dim", 0)
    H = model["n_heads"]
    dense_F = model.get("dense_hidden_dim") or F
    mixers = [_mixer(D, size, **mixer) for mixer in model.get("mixers") or () if mixer is not None]
    attentions = [_attention(model, own) for own in model.get("by_layer") or [{}] * (L - len(mixers))]
    mlp, moe = 3 * D * dense_F, E * (D + 3 * D * F) + 3 * D * shared
    parameters = V * D * (1 if model["tie_embeddings"] else 2) + dense * mlp + (L - dense) * moe
    parameters += sum(attention.parameters for attention in attentions)
    cached = sum(attention.cached for attention in attentions)
    B, S, phase = config["batch"], config["seq_len"], config["workload"].get("phase", "forward")
    N = S + (config["workload"]["context_len"] if phase == "decode" else 0)
    # The reference passes over whole sequences: all at once, or while decoding as many as make a pass.
    rows = min(B, max(1, TOKENS_AT_ONCE // N)) if phase == "decode" else B
    T, last = rows * N, 1 if phase == "prefill" else S
    head = rows * last * (3 * D + V) + (V * D if size != _FP32 else 0)  # the weight is cast
    parameters += sum(mixer.parameters for mixer in mixers)
    attend = max((T * (2 * D + attention.values) for attention in attentions), default=0)
    mix = max((T * (2 * D + mixer.values) for mixer in mixers), default=0)
    feed = T * (2 * D + max(4 * dense_F if dense else 0, E))
    return {
        "parameters": parameters * size,
        "modules": L * _LAYER_OBJECTS,
        "input": B * N * _ID + 2 * N * (model.get("head_dim") or D // H) * _FP32,  # and tables of the rotation
        "cache": 0 if phase == "forward" else B * (N * cached * size + sum(mixer.state for mixer in mixers)),
        "output": B * last * V * size * (2 if phase == "decode" else 1),  # of each step, and of all together
        "activations": max(head, attend, mix, feed) * _FP32,
        "calibration": _calibration_tokens(config["router"]) * (_ID + E * _FP32) if E else 0,
        "text": _text_bytes(config),
    }


class _Attention(NamedTuple):
    """Of a layer: parameters, values cached of a token, values of a token before and after the rotation."""

    parameters: int
    cached: int
    values: int


def _attention(model: Config, own: Config) -> _Attention:
    """`own`: what is a layer's own."""
    D, H = model["d_model"], model["n_heads"]
    if latent := model.get("latent"):
        return _latent_attention(D, H, **latent)
    kv, d = (own.get(key) or model.get(key) or usual for key, usual in (("n_kv_heads", H), ("head_dim", D // H)))
    projections = 2 * H + (1 if own.get("values_are_keys") else 2) * kv + (H if model.get("output_gate") else 0)
    return _Attention(D * d * projections, 2 * kv * d, (2 * (H + kv) + kv) * d)


def _latent_attention(
    D: int, H: int, *, nope_dim: int, rope_dim: int, v_dim: int, kv_rank: int, q_rank: int | None, **_: Any
) -> _Attention:
    d, latent = nope_dim + rope_dim, kv_rank + rope_dim
    queries = D * H * d if q_rank is None else D * q_rank + q_rank * H * d
    keys = D * latent + kv_rank * H * (nope_dim + v_dim)
    return _Attention(queries + keys + H * v_dim * D, latent, (3 * H + 2) * rope_dim)


class _Mixer(NamedTuple):
    """Of a layer with something else in place of attention: bytes of state of a sequence, values of a token."""

    parameters: int
    state: int
    values: int


def _mixer(D: int, size: int, *, kind: str, **sizes: Any) -> _Mixer:
    return (_delta_net if kind == "delta_net" else _short_conv)(D, size, **sizes)


def _short_conv(D: int, size: int, *, width: int, bias: bool) -> _Mixer:
    """Three places of the state, and before the convolution three values of each channel."""
    return _Mixer(D * (4 * D + width + 5 * bias), 3 * D * (width - 1) * size, 5 * D)


def _delta_net(
    D: int, size: int, *, n_heads: int, head_dim: int, n_value_heads: int, value_dim: int, conv_width: int
) -> _Mixer:
    """Each state has three places (`kv_cache.StateCache`); the recurrent one is fp32."""
    keys, values = n_heads * head_dim, n_value_heads * value_dim
    mixed = 2 * keys + values
    return _Mixer(
        D * (mixed + 2 * values + 2 * n_value_heads) + mixed * conv_width,
        3 * (mixed * (conv_width - 1) * size + n_value_heads * head_dim * value_dim * _FP32),
        2 * mixed + values,  # before and after the convolution, and the gate
    )


def _calibration_tokens(router: Config) -> int:
    """How many tokens the router, or the one in it, is fitted on."""
    if router.get("threshold") is not None:
        return 0
    return int(router.get("calibration_tokens") or (_calibration_tokens(router["inner"]) if router.get("inner") else 0))


def _text_bytes(config: Config) -> int:
    """Of the texts of `workload.path`: of a tokenizer it is not known how many tokens they have, so only themselves."""
    path = config["workload"].get("path")
    if not path:
        return 0
    each = 1 if "path" in config["model"] else 2 * _ID  # of bytes: the ids, and where they end
    return each * sum(file.stat().st_size for file in inputs.text_files(path))


def _sizes(model: Config) -> tuple[Config, int]:
    """(the keys of decoder_moe, how many layers are dense)."""
    if "path" in model:
        settings = checkpoint_config.read(model["path"])
        return settings.decoder, len(settings.dense_layers)
    return model, model["n_dense_layers"] if "n_experts" in model else model["n_layers"]
