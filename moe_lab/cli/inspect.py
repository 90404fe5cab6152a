"""`moe-lab inspect DIR`: what a checkpoint is and what of it is supported. Reads headers, and no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.cli.arguments import Parser
from moe_lab.cli.json_output import print_json
from moe_lab.models import architectures, checkpoint_config
from moe_lab.models.checkpoint_config import Settings
from moe_lab.models.checkpoint_keys import read_object, shown, some
from moe_lab.terminal import Console

if TYPE_CHECKING:
    from moe_lab.models.checkpoint import Checkpoint

OK, UNSUPPORTED = 0, 1
_GB = 1e9
_USUAL = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
)
"""Numbers that most configurations have."""


def main(arguments: list[str]) -> int:
    """Print what is there. Returns 1 for a checkpoint that cannot be run."""
    parser = Parser(prog="moe-lab inspect", description="Show what a checkpoint is; no weights are read.")
    parser.add_argument("folder", metavar="DIR", help="the folder of a Hugging Face checkpoint")
    parser.add_argument("--json", action="store_true", help="print one JSON document (docs/results-format.md)")
    given = parser.parse_args(arguments)
    facts = facts_of(Path(given.folder))
    if given.json:
        print_json(facts)
    else:
        console, width = Console(soft_wrap=True, highlight=False), max(map(len, facts))
        for name, value in facts.items():
            if value is not None:
                console.print(f"{name.replace('_', ' '):{width}}  {value}", markup=False)
    return OK if facts["supported"] == "yes" else UNSUPPORTED


def facts_of(folder: Path) -> dict[str, Any]:
    """By name, in the order of the lines.

    Raises:
        ValueError: the folder has no config.json that can be read.
    """
    try:
        settings = checkpoint_config.read(folder)
    except ValueError as error:
        return {**_of_another(folder, error), **_on_disk(folder)}
    from moe_lab.models.checkpoint import without_weights  # here: torch is imported once there is a model to make

    model = without_weights(folder)
    architecture = architectures.of_type(settings.model_type)
    assert architecture is not None, settings.model_type
    return {
        "family": f"{settings.model_type} ({architecture.models})",
        "layers": _layers(settings),
        "attention": _attention(settings.decoder),
        "experts": _experts(settings.decoder),
        "router": _router(settings.router),
        "positions": f"{settings.max_positions:,}{_scaling(settings.decoder)}",
        "unusual": architecture.unusual,
        "weights": f"{settings.form}; dequantised as they are loaded" if settings.form is not None else None,
        "not_loaded": _not_loaded(settings),
        **_on_disk(folder),
        **_in_memory(model),
        "keys_not_used": some(settings.unread) if settings.unread else None,
        "supported": _supported(folder, model),
        "tested": architecture.tested,
    }


def _of_another(folder: Path, error: ValueError) -> dict[str, Any]:
    """Of a checkpoint that is refused: the numbers that most have, under their names in config.json."""
    try:
        content = read_object(folder / checkpoint_config.CONFIG)
    except (OSError, ValueError):
        raise error from None
    numbers = {key: shown(content[key]) for key in _USUAL if key in content}
    return {
        "family": shown(content.get("model_type")),
        "config": ", ".join(f"{key}={value}" for key, value in numbers.items()) or None,
        "supported": f"no: {error}",
    }


def _supported(folder: Path, model: Checkpoint) -> str:
    """Whether every tensor has its place."""
    from moe_lab.models import checkpoint_weights

    try:
        tensors = checkpoint_weights.headers(checkpoint_weights.files(folder))
        model.plan(dict(model.named_parameters()), tensors)
    except ValueError as error:
        return f"no: {error}"
    return "yes"


def _layers(settings: Settings) -> str:
    decoder, dense = settings.decoder, sorted(settings.dense_layers)
    text = f"{decoder['n_layers']} of width {decoder['d_model']}"
    if dense:
        text += f", {len(dense)} of them dense (width {decoder['dense_hidden_dim']}): {some(list(map(str, dense)), 8)}"
    return text


def _attention(decoder: Mapping[str, Any]) -> str:
    if latent := decoder.get("latent"):
        queries = "" if latent["q_rank"] is None else f", queries of rank {latent['q_rank']}"
        return (
            f"latent of rank {latent['kv_rank']} with {latent['rope_dim']} turned{queries}; {decoder['n_heads']} heads "
            f"of {latent['nope_dim']} + {latent['rope_dim']}, values of {latent['v_dim']}"
        )
    text = f"{decoder['n_heads']} heads of {decoder['head_dim']}, {decoder['n_kv_heads']} of keys and values"
    if decoder.get("rotary_dim") not in (None, decoder["head_dim"]):
        text += f", {decoder['rotary_dim']} of a head turned"
    if decoder["qk_norm"] != "none":
        text += f", norm of {'each head' if decoder['qk_norm'] == 'head' else 'all heads'}"
    if decoder.get("output_gate"):
        text += ", a gate of its output"
    windows = [window for window in decoder.get("windows") or () if window is not None]
    text += f", a window of {windows[0]} in {_layers_in_words(len(windows))}" if windows else ""
    text += "".join(_other_heads(decoder))
    nets = [mixer for mixer in decoder.get("mixers") or () if mixer is not None]
    return f"{text}; in {_layers_in_words(len(nets))} {_mixer(**nets[0])} take its place" if nets else text


def _layers_in_words(n: int) -> str:
    return f"{n} layer{'' if n == 1 else 's'}"


def _other_heads(decoder: Mapping[str, Any]) -> list[str]:
    """Of layers that have other heads than the most, or values that are the keys."""
    layers = decoder.get("by_layer") or ()
    kinds = Counter((each["head_dim"], each["n_kv_heads"], each["values_are_keys"]) for each in layers)
    kinds.pop((decoder["head_dim"], decoder["n_kv_heads"], False), None)
    return [
        f"; in {_layers_in_words(n)} heads of {head_dim}, {n_kv_heads} of keys "
        f"{'that are values too' if shared else 'and values'}"
        for (head_dim, n_kv_heads, shared), n in kinds.items()
    ]


def _mixer(*, kind: str, **sizes: Any) -> str:
    """What a layer has in place of attention."""
    if kind == "short_conv":
        return f"short convolutions of {sizes['width']} tokens"
    assert kind == "delta_net", kind
    return (
        f"gated delta nets ({sizes['n_value_heads']} states of {sizes['head_dim']} x {sizes['value_dim']}, "
        f"{sizes['n_heads']} heads of keys, a convolution of {sizes['conv_width']} tokens)"
    )


def _experts(decoder: Mapping[str, Any]) -> str:
    text = f"{decoder['n_experts']} of width {decoder['mlp_hidden_dim']}, {decoder['top_k']} for each token"
    if decoder["shared_expert_hidden_dim"]:
        gate = "with" if decoder["shared_expert_gate"] else "without"
        text += f"; a shared one of width {decoder['shared_expert_hidden_dim']} {gate} a gate"
    if decoder.get("own_norms"):
        text += "; gate, experts and the shared one with norms of their own"
    return text


def _router(router: Mapping[str, Any]) -> str:
    """The class and its keys."""
    keys = ", ".join(f"{key}={value}" for key, value in router.items() if key != "_target_")
    return f"{str(router['_target_']).rpartition('.')[2]} ({keys})"


def _scaling(decoder: Mapping[str, Any]) -> str:
    scaling = decoder["rope_scaling"]
    return "" if scaling is None else f", RoPE stretched by {scaling['rope_type']}"


def _not_loaded(settings: Settings) -> str | None:
    n, parts = settings.extra_layers, list(settings.others.values())
    if n:
        parts = [f"{_layers_in_words(n)} that predict further tokens", *parts]
    return f"{' and '.join(dict.fromkeys(parts))}, if the files have them" if parts else None


def _on_disk(folder: Path) -> dict[str, Any]:
    """Of the safetensors files that are there; a missing one is part of what is not supported."""
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file()]
    return {"on_disk": f"{sum(sizes) / _GB:.3g} GB in {len(sizes)} file{'' if len(sizes) == 1 else 's'}"}


def _in_memory(model: Checkpoint) -> dict[str, Any]:
    n = sum(parameter.numel() for parameter in model.parameters())
    cache = model.bfloat16().make_cache(1, 1)
    state = f", and {cache.state_bytes:,} for each sequence" if cache.state_bytes else ""
    return {
        "parameters": f"{n / 1e9:.4g} billion",
        "in_memory": f"{2 * n / _GB:.3g} GB in bf16, {4 * n / _GB:.3g} GB in fp32",
        "cache": f"{cache.bytes_per_position:,} bytes for each token in bf16{state}",
    }
