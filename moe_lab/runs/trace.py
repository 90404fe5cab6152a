"""Recording a trace (records/trace.py): from the passes of a run, or of a model over texts (`moe-lab trace`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from moe_lab.measure.route_flips import boundary_margin
from moe_lab.measure.tolerances import exact_products
from moe_lab.models import Output
from moe_lab.models.moe_layer import MoELayer, hooked, indexed_moe_layers, moe_layers
from moe_lab.models.serving import Decode
from moe_lab.models.transformer_decoder import TransformerDecoder
from moe_lab.records import inputs
from moe_lab.records.identity import content, model_content, model_name, option_name, weight_changes
from moe_lab.records.trace import GUESSES, Layer, Tokens, TraceWriter, tokens_of
from moe_lab.routers.base import Routing
from moe_lab.runs import build, passes
from moe_lab.runs.counterfactual import log_probabilities, require_own_routes
from moe_lab.runs.guesses import Guesses
from moe_lab.workloads import text

_OF_NO_CONTEXT = "predicted: of the contexts' tokens; only the steps after them predict a token"


def layers_of(model: nn.Module) -> list[Layer]:
    """The MoE layers of a model as a trace describes them; any width may come of a router without a fixed k."""
    return [
        Layer(index, E, layer.router.top_k if layer.router.static_k else E, int(layer.weights.bytes_per_expert))
        for index, layer in indexed_moe_layers(model)
        for E in (layer.weights.n_experts,)
    ]


def source_of(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """Where a trace of this configuration comes from: names, and hashes of what was read."""
    tokenizer = getattr(model, "tokenizer_file", None)
    return {
        "written_by": f"moe-lab {version('moe-lab')}",
        "model": model_name(cfg.model),
        "model_content": model_content(cfg),
        "weight_changes": weight_changes(cfg),
        "router": option_name(cfg.router),
        "tokenizer": inputs.file_id(tokenizer) if tokenizer is not None else None,
        "texts": content(cfg)["workload"].get("path"),
        "dtype": cfg.dtype.name,
        "batch": int(cfg.batch),
        "seed": int(cfg.seed),
    }


@dataclass
class RunTrace:
    """The routes of a run's passes, kept until its folder is written.

    Attributes:
        passes: of each its tokens, and layer by layer ids [T, K] and weights [T, K]; K may differ between passes.
    """

    layers: list[Layer]
    source: dict[str, Any]
    passes: list[tuple[Tokens, list[Routing]]] = field(default_factory=list)

    def add(self, tokens: Tokens, routings: Sequence[Routing]) -> None:
        """Keep a copy of what one pass chose."""
        kept = [Routing(routing.expert_ids_TK.cpu().clone(), routing.weights_TK.cpu().clone()) for routing in routings]
        self.passes.append((tokens, kept))

    def write(self, path: Path) -> None:
        """Write the trace; a layer is as wide as the widest of its passes."""
        widths = [max(of_pass[i].expert_ids_TK.shape[1] for _, of_pass in self.passes) for i in range(len(self.layers))]
        layers = [
            Layer(layer.layer, layer.n_experts, K, layer.bytes_per_expert)
            for layer, K in zip(self.layers, widths, strict=True)
        ]
        missing = ["domain: the texts of a run's input are not recorded; moe-lab trace records them"]
        with TraceWriter(path, layers, ("weights",), source=self.source, missing=missing) as writer:
            for tokens, routings in self.passes:
                arrays = [_arrays(routing, layer.top_k) for routing, layer in zip(routings, layers, strict=True)]
                writer.add(tokens, [ids for ids, _ in arrays], weights=[weights for _, weights in arrays])


def pass_tokens(x: Tensor, phase: str, first: int = 0, positions: np.ndarray | None = None) -> Tokens:
    """The tokens of one pass over x [B, S] ids or [B, S, D] hidden states, sequence by sequence.

    `positions`: of a decoding step, those of all that it takes. `first`: the number of the first sequence.
    """
    B, S = x.shape[:2]
    ids_BS = x.cpu().numpy() if x.dtype == torch.int64 else np.full((B, S), -1)
    position_S = np.arange(S)
    if positions is not None:
        ids_BS, position_S = ids_BS[:, positions], positions
    sequence = first + np.arange(B).repeat(len(position_S))
    return tokens_of(sequence, np.tile(position_S, B), phase, ids_BS.reshape(-1))


def _arrays(routing: Routing, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, weights) [T, width]; slots beyond those of the routing are unused."""
    pad = (0, width - routing.expert_ids_TK.shape[1])
    ids_TK = nn.functional.pad(routing.expert_ids_TK, pad, value=-1)
    weights_TK = nn.functional.pad(routing.weights_TK, pad)
    return ids_TK.cpu().numpy(), weights_TK.float().cpu().numpy()


@contextmanager
def router_logits(layers: Sequence[MoELayer]) -> Iterator[Callable[[], list[Tensor]]]:
    """Inside, every pass adds its logits; the function that is given gives those since it was last called."""
    kept: dict[MoELayer, list[Tensor]] = {layer: [] for layer in layers}

    def look(layer: Any, arguments: tuple[Any, ...], _: Any) -> None:
        kept[layer].append(layer.logits(arguments[0]))

    def take() -> list[Tensor]:
        found = [torch.cat(pieces) for pieces in kept.values()]
        for pieces in kept.values():
            pieces.clear()
        return found

    with hooked(layers, look):
        yield take


@torch.inference_mode()
def record(
    cfg: DictConfig,
    path: Path,
    n_tokens: int | None = None,
    *,
    logits: bool = False,
    guesses: bool = False,
    routes: int = 0,
    predicted: bool = False,
    progress: Callable[[range], Any] = iter,
) -> list[str]:
    """Write the trace of a model over the texts of `cfg.workload.path`.

    Windows of `seq_len` tokens are computed `batch` at a time, all tokens of a window at once: phase prefill. With
    `workload.phase=decode` the first `context_len` tokens of a window are prefill and each of the `seq_len` after them
    is a step of the decode path, given the text's own token.

    Args:
        n_tokens: about so many; the windows are spread evenly over the texts. None: all that they have.
        logits, predicted: record the router's logits, the likeliest next token too.
        guesses: record what each router would choose before its input is there (`Guesses`), too.
        routes: how many other routes of each token to try (counterfactual.py).
        progress: is given the first window of each batch.

    Returns: a sentence for everything that the trace does not have.

    Raises:
        ValueError: no MoE layers, no texts or too short ones, or `routes` of a model or a phase that has none.
        UnavailableError: the device or an implementation is not here.
    """
    require_text(cfg)
    with exact_products():
        device, model = text_model(cfg)
        context_len = int(cfg.workload.context_len) if cfg.workload.phase == "decode" else None
        if routes:
            require_own_routes(model, cfg.workload.phase)
        batch = int(cfg.batch)
        windows, missing = text_windows(cfg, model, n_tokens, batch)
        columns = ("weights", "margin", *(("logits",) if logits else ()), *(GUESSES if guesses else ()))
        beside = ({"log_p": 2 + routes} if routes else {}) | ({"predicted": 1} if predicted else {})
        missing += [_OF_NO_CONTEXT] if predicted and context_len is not None else []
        layers, source = layers_of(model), source_of(cfg, model)
        guessed = Guesses(model, layers)
        with (
            TraceWriter(path, layers, columns, windows.names, source, missing, token_columns=beside) as writer,
            router_logits(moe_layers(model)) as take,
            guessed.looking() if guesses else nullcontext(),
        ):
            for first in progress(range(0, len(windows.ids_WS) // batch * batch, batch)):
                ids_BS, domain_B = windows.ids_WS[first : first + batch].to(device), windows.domain_W[first:][:batch]
                for tokens, routings, predicted_T in _passes(model, ids_BS, first, context_len):
                    tokens = tokens._replace(domain=domain_B.numpy()[tokens.sequence - first].astype(np.int16))
                    looked, guess, of_tokens = take(), guessed.take(), {"predicted": predicted_T}
                    if routes:
                        targets_BS = windows.targets_WS[first : first + batch].to(device)
                        log_p = log_probabilities(model, ids_BS, targets_BS, routes, cfg.seed + first)
                        of_tokens["log_p"] = log_p.cpu().numpy()
                        take(), guessed.take()  # what its own passes left there
                    _add(writer, tokens, routings, looked, guess, {name: of_tokens[name] for name in beside})
    return missing


def require_text(cfg: DictConfig) -> None:
    """Raise `ValueError` unless the workload is texts with the router's own choice."""
    if cfg.workload.get("name") != "text":
        raise ValueError("workload: needs real text; set workload=text and workload.path (a file or a folder).")
    if cfg.workload.get("prefill_chunk") is not None:
        raise ValueError(
            f"workload.prefill_chunk={cfg.workload.prefill_chunk}: windows and contexts are computed as a whole here; "
            "remove it."
        )
    if cfg.workload.get("load", "native") != "native":
        raise ValueError(f"workload.load={cfg.workload.load}: the routes are the router's own choice here; remove it.")


def text_model(cfg: DictConfig, donor: Mapping[str, Tensor] | None = None) -> tuple[torch.device, TransformerDecoder]:
    """(device, model) of a configuration that reads texts; with `donor` as `build.build_model`.

    Raises:
        ValueError: the model has no MoE layers, or does not fit the texts.
        UnavailableError: the device or an implementation is not here.
    """
    device = build.resolve_device(cfg)
    model = build.build_model(cfg, device, donor)
    build.require_runnable(cfg, model, device)
    if not moe_layers(model):
        raise ValueError(f"model={option_name(cfg.model)}: has no MoE layers, so there are no routes to record.")
    build.build_input(cfg, model, device)  # its errors name the keys
    assert isinstance(model, TransformerDecoder), "what reads text is a decoder"
    return device, model


def text_windows(
    cfg: DictConfig, model: TransformerDecoder, n_tokens: int | None, batch: int
) -> tuple[text.Windows, list[str]]:
    """(windows of the texts for about `n_tokens` tokens, in batches; a sentence for each that is left out)."""
    length = passes.n_positions(cfg)
    domains = text.read_domains(cfg.workload.path, model.vocab_size, getattr(model, "tokenizer_file", None))
    n_windows = None if n_tokens is None else max(n_tokens // (batch * length), 1) * batch
    windows = text.windows(domains, length, n_windows, int(cfg.seed))
    missing = [f"{name}: shorter than one window (seq_len tokens)" for name in windows.left_out]
    if left_out := len(windows.ids_WS) % batch:
        which = "the last window, which does" if left_out == 1 else f"the last {left_out} windows, which do"
        missing.append(f"{which} not fill a batch")
    if cfg.workload.get("ids", "text") == "uniform":
        shape = (len(windows.ids_WS), length + 1)  # with the token that follows
        ids_WS = text.uniform_ids(shape, model.vocab_size, int(cfg.seed), windows.ids_WS.device)
        windows = windows._replace(
            ids_WS=ids_WS[:, :-1], targets_WS=ids_WS[:, 1:], domain_W=torch.zeros_like(windows.domain_W),
            names=("uniform",),
        )  # fmt: skip
    return windows, missing


def _passes(
    model: TransformerDecoder, ids_BS: Tensor, first: int, context_len: int | None
) -> Iterator[tuple[Tokens, Sequence[Routing], np.ndarray]]:
    """One pass over whole windows, or the pass over their contexts and every step after it; the likeliest next tokens.

    Of a context no next token is predicted: -1.
    """
    if context_len is None:
        model.ropes.reserve(ids_BS.shape[1], ids_BS.device)
        yield pass_tokens(ids_BS, "prefill", first), *_kept(model(ids_BS))
        return
    task = Decode(model, model.make_cache(*ids_BS.shape), context_len)
    context_BC = ids_BS[:, :context_len]
    yield pass_tokens(context_BC, "prefill", first), task.fill(ids_BS), np.full(context_BC.numel(), -1)
    for position in range(context_len, ids_BS.shape[1]):
        yield pass_tokens(ids_BS, "decode", first, np.array([position])), *_kept(task(ids_BS))
        task.advance()


def _kept(output: Output) -> tuple[Sequence[Routing], np.ndarray]:
    return output.routings, output.y.argmax(-1).flatten().cpu().numpy()


def _add(
    writer: TraceWriter,
    tokens: Tokens,
    routings: Sequence[Routing],
    logits: Sequence[Tensor],
    guesses: Sequence[Mapping[str, Tensor]],
    of_tokens: Mapping[str, np.ndarray],
) -> None:
    arrays = [_arrays(routing, layer.top_k) for routing, layer in zip(routings, writer.layers, strict=True)]
    more = {
        "weights": [weights for _, weights in arrays],
        "margin": [
            boundary_margin(of_layer, layer.top_k).cpu().numpy()
            for of_layer, layer in zip(logits, writer.layers, strict=True)
        ],
        "logits": [of_layer.float().cpu().numpy() for of_layer in logits],
        **{name: [of_layer[name].cpu().numpy() for of_layer in guesses if name in of_layer] for name in GUESSES},
    }
    writer.add(tokens, [ids for ids, _ in arrays], of_tokens, **{name: more[name] for name in writer.columns})
