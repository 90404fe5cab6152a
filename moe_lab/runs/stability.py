"""The same tokens under two configurations: which experts they use, and what the model predicts after them.

Both run beside each other and are compared window by window, so no distribution over the vocabulary is kept. With A_t
and B_t a token's experts in one layer, q and p the distributions of the next token, by the first configuration and by a
variant:

    same       |A_t and B_t|, of |A_t| (used)
    changed    A_t is not B_t; the first change is in the first layer where that is so: later layers read other inputs
    near-tie   the margin at the first change, r_(k) - r_(k+1) of the router's probabilities by the first configuration,
               sorted, is at most what rounding in the coarser of the two dtypes explains:
               score max(r) + logit median|logits|, with the tolerances of a step that fuses (measure/tolerances.py).
               Only if both choose the k largest of a softmax, with the same k: else another number decides
    KL         sum_v q_v ln(q_v / p_v), in float64
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from moe_lab.errors import UnavailableError
from moe_lab.measure.clocks import make_step
from moe_lab.measure.route_flips import boundary_margin
from moe_lab.measure.tolerances import TOLERANCES, Tolerance, exact_products, tolerance_of
from moe_lab.models.moe_layer import moe_layers
from moe_lab.models.parameters import shareable
from moe_lab.models.transformer_decoder import TransformerDecoder
from moe_lab.ops.library import DTYPES
from moe_lab.records import inputs
from moe_lab.records.trace import Layer
from moe_lab.routers.contract import members
from moe_lab.routers.softmax_topk import SoftmaxTopK
from moe_lab.runs import build
from moe_lab.runs.record import reason_of
from moe_lab.runs.trace import layers_of, require_text, router_logits, text_model, text_windows
from moe_lab.workloads.text import Windows

_ELEMENTS_AT_ONCE = 1 << 24  # of distributions in float64


class Compared(NamedTuple):
    """A variant beside the first configuration: sums over the tokens of each of W windows, by MoE layer L; float64."""

    same_LW: np.ndarray
    used_LW: np.ndarray
    changed_LW: np.ndarray
    first_LW: np.ndarray
    """Tokens whose first change is in this layer."""
    near_W: np.ndarray | None
    """Tokens whose first change is a near-tie; None if the routers choose by something else."""
    argmax_W: np.ndarray
    """Tokens whose likeliest next token is another."""
    kl_W: np.ndarray
    """In nats."""
    margins: np.ndarray
    """Of all first changes, the first configuration's margin; float32."""
    implementation: dict[str, str]
    """Who computed the variant."""


class _Window(NamedTuple):
    """What a configuration computes of one window of S tokens: logits [S, V], and layer by layer who is used [S, E]."""

    y_SV: Tensor
    members: list[Tensor]
    logits: list[Tensor]
    """The routers', where they are looked at: in the first configuration."""


@dataclass(frozen=True)
class First:
    """The first configuration, built, with the windows on which variants are compared with it.

    Attributes:
        n_windows: so many of them are used, a multiple of the batch of each configuration.
        missing: a sentence for everything that is left out.
    """

    cfg: DictConfig
    device: torch.device
    model: TransformerDecoder
    windows: Windows
    n_windows: int
    missing: list[str]

    @classmethod
    @exact_products()  # fp32 means fp32
    def of(cls, cfg: DictConfig, variants: Sequence[DictConfig], n_tokens: int | None) -> First:
        """Build it; about `n_tokens` tokens, spread evenly over the texts, or all that they have.

        Raises:
            ValueError: the model has no MoE layers, the workload no texts, or too few windows; it is not an eager pass.
            UnavailableError: the device or an implementation is not here.
        """
        require_text(cfg)
        if cfg.workload.phase != "forward":
            raise ValueError(f"workload.phase={cfg.workload.phase}: whole passes are compared; remove it.")
        if cfg.execution.name != "eager":
            raise ValueError(f"execution={cfg.execution.name}: the first one is eager; put it among the variants.")
        device, model = text_model(cfg)
        batches = sorted({int(each.batch) for each in (cfg, *variants)})
        batch = math.lcm(*batches)
        windows, missing = text_windows(cfg, model, n_tokens, batch)
        n_windows = len(windows.ids_WS) // batch * batch
        if not n_windows:
            raise ValueError(
                f"batch: the texts have {len(windows.ids_WS)} windows of seq_len tokens, and batches of "
                f"{', '.join(map(str, batches))} need a multiple of {batch}; choose other batches, or lower seq_len."
            )
        return cls(cfg, device, model, windows, n_windows, missing)

    @property
    def layers(self) -> list[Layer]:
        """The MoE layers."""
        return layers_of(self.model)

    @exact_products()
    def compare(self, cfg: DictConfig, progress: Callable[[range], Any] = iter) -> Compared:
        """Run `cfg` beside it.

        Raises:
            ValueError: it has other layers of experts or another vocabulary.
            UnavailableError: it cannot run here.
        """
        is_donor = build.weights_key(cfg, build.resolve_device(cfg)) == build.weights_key(self.cfg, self.device)
        device, model = text_model(cfg, shareable(self.model) if is_donor else None)
        self._require_comparable(model)
        dtype = max((DTYPES[each.dtype.name] for each in (self.cfg, cfg)), key=lambda dtype: TOLERANCES[dtype].model)
        tolerance = tolerance_of(self.model, dtype, fuses=True)
        top_k = [layer.router.top_k for layer in moe_layers(self.model)]
        with (
            closing(_outputs(self.cfg, self.model, self.device, self, looks=True)) as firsts,
            closing(_outputs(cfg, model, device, self)) as others,
        ):
            sums = [_sums(next(firsts), next(others), top_k, tolerance) for _ in progress(range(self.n_windows))]
        *counted, margins = zip(*sums, strict=True)
        same, used, changed, is_first, near, argmax, kl = (np.stack(values, axis=-1) for values in counted)
        ran = build.implementation(cfg, model, device)
        has_near_ties = _chosen_by_softmax(self.model) == _chosen_by_softmax(model) is not None
        near_W = near if has_near_ties else None
        return Compared(same, used, changed, is_first, near_W, argmax, kl, np.concatenate(margins), ran)

    def _require_comparable(self, model: TransformerDecoder) -> None:
        tokenizers = [getattr(each, "tokenizer_file", None) for each in (self.model, model)]
        ids = [None if file is None else inputs.file_id(file) for file in tokenizers]
        if self.model.vocab_size != model.vocab_size or ids[0] != ids[1]:
            raise ValueError("it has another vocabulary or tokenizer, so its tokens are others")
        sizes, others = ([(layer.layer, layer.n_experts) for layer in layers_of(each)] for each in (self.model, model))
        if sizes != others:
            raise ValueError("it has other layers of experts, or other numbers of experts")


def compare_all(
    first: First, variants: Mapping[str, DictConfig], progress: Callable[[str, range], Any]
) -> dict[str, Compared | str]:
    """Each variant beside the first configuration; of one that could not be compared the reason."""
    found: dict[str, Compared | str] = {}
    for name, cfg in variants.items():
        try:
            found[name] = first.compare(cfg, lambda windows, name=name: progress(name, windows))  # type: ignore[misc]
        except UnavailableError as error:
            found[name] = f"unavailable: {error}"
        except ValueError as error:
            found[name] = f"error: {error}"
        except Exception as error:  # out of memory, what a kernel or a compiler raises: a row as well
            found[name] = reason_of(error)
    return found


def _outputs(
    cfg: DictConfig, model: TransformerDecoder, device: torch.device, first: First, *, looks: bool = False
) -> Generator[_Window]:
    """Window by window, computed `cfg.batch` at a time by the execution of `cfg`."""
    batch, ids_WS = int(cfg.batch), first.windows.ids_WS
    S, layers = ids_WS.shape[1], moe_layers(model)
    x = ids_WS[:batch].to(device, copy=True)
    step = make_step(cfg.execution.name, "natural", build.build_task(cfg, model, x)[0], x)
    with router_logits(layers if looks else []) as take:
        for start in range(0, first.n_windows, batch):
            x.copy_(ids_WS[start : start + batch])
            output, logits = step(), take()
            used = [
                members(routing.expert_ids_TK, layer.weights.n_experts)
                for layer, routing in zip(layers, output.routings, strict=True)
            ]
            for row in range(batch):
                tokens = slice(row * S, (row + 1) * S)
                yield _Window(output.y[row], [used_TE[tokens] for used_TE in used], [z_TE[tokens] for z_TE in logits])


def _chosen_by_softmax(model: TransformerDecoder) -> list[int] | None:
    """k of each layer, if they all choose the k largest of a softmax."""
    routers = [layer.router for layer in moe_layers(model)]
    return [router.top_k for router in routers] if all(isinstance(each, SoftmaxTopK) for each in routers) else None


def _sums(first: _Window, other: _Window, top_k: Sequence[int], tolerance: Tolerance) -> tuple[np.ndarray, ...]:
    """The arrays of `Compared` of one window."""
    first_LSE, other_LSE = first.members, [used_SE.to(first.y_SV.device) for used_SE in other.members]
    same_LS, used_LS = (
        torch.stack([used_SE.sum(-1) for used_SE in of_layers])
        for of_layers in ([a & b for a, b in zip(first_LSE, other_LSE, strict=True)], first_LSE)
    )
    changed_LS = torch.stack([(a != b).any(-1) for a, b in zip(first_LSE, other_LSE, strict=True)])
    is_first_LS = changed_LS & (changed_LS.cumsum(0) == 1)
    margin_LS = torch.stack([boundary_margin(z_SE, k) for z_SE, k in zip(first.logits, top_k, strict=True)])
    allowed_LS = torch.stack([_allowed(z_SE, tolerance) for z_SE in first.logits])
    near_LS = is_first_LS & (margin_LS <= allowed_LS)
    kl_S, argmax_S = _predictions(first.y_SV, other.y_SV.to(first.y_SV.device))
    by_layer = [values_LS.double().sum(1) for values_LS in (same_LS, used_LS, changed_LS, is_first_LS)]
    whole = [near_LS.double().sum(), argmax_S.double().sum(), kl_S.sum()]
    return tuple(values.cpu().numpy() for values in (*by_layer, *whole, margin_LS[is_first_LS]))


def _allowed(logits_SE: Tensor, tolerance: Tolerance) -> Tensor:
    """By how much rounding may move a margin."""
    logits_SE = logits_SE.float()
    largest_S = logits_SE.softmax(-1).amax(-1)
    return tolerance.score * largest_S + tolerance.logit * logits_SE.abs().median(-1).values


def _predictions(y_SV: Tensor, other_y_SV: Tensor) -> tuple[Tensor, Tensor]:
    """(KL of the next token's distributions [S] float64, whether its likeliest value is another [S])."""
    rows, kl = max(1, _ELEMENTS_AT_ONCE // y_SV.shape[1]), []
    for y_RV, other_y_RV in zip(y_SV.split(rows), other_y_SV.split(rows), strict=True):
        log_q_RV, log_p_RV = (logits.log_softmax(-1, dtype=torch.float64) for logits in (y_RV, other_y_RV))
        kl.append((log_q_RV.exp() * (log_q_RV - log_p_RV)).sum(-1))
    return torch.cat(kl), y_SV.argmax(-1) != other_y_SV.argmax(-1)
