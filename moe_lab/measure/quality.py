"""What the router does to the model's predictions of a text, against the same model with the checkpoint's own router.

With p the probabilities that the run gives to the next token, and q those of the model with its native router:

    nats_per_token        mean over tokens of -ln p(the token that follows)
    bits_per_byte         sum of -log2 p(the token that follows) over the bytes of text in these tokens
    delta_bits_per_byte   the run's bits per byte minus the native ones
    kl_to_native          mean over tokens of sum_v q_v ln(q_v / p_v), in nats
    top1_agreement        share of the tokens where p and q are largest at the same v

A token is predicted from what stands before it in its window, and from nothing else.

The intervals (`_ci95_low`, `_ci95_high`) are Student's t for a ratio of sums, with windows as the independent units;
`delta_bits_per_byte` takes the difference window by window. Neighbouring windows of one text resemble each other, so
for other text than this the intervals are rather too narrow.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_lab.intervals import ratio_of_sums
from moe_lab.models import Output
from moe_lab.models.moe_layer import moe_layers
from moe_lab.workloads.text import Windows

_ELEMENTS_AT_ONCE = 1 << 26  # of logits in fp32


@torch.inference_mode()
def quality(
    model: nn.Module, native: nn.Module | None, windows: Windows, batch: int, device: torch.device
) -> tuple[dict[str, Any], np.ndarray]:
    """The record's `quality`. A number that is not finite is None; so is one of no window, and the interval of one.

    Args:
        model: the run's; given ids [B, S] its `Output.y` are logits [B, S, V].
        native: the same parameters with the checkpoint's own router; `model` itself if that is its router. None if
            there is no such thing: then what compares with it is None too.
        windows: taken `batch` at a time in order. What a router does may depend on who is in the batch, so an
            incomplete last one is left out.
        device: of the models.

    Returns:
        ({tokens, windows, bytes, the numbers in the head of this file with their intervals, native_bits_per_byte,
        windows_left_out, domains: {name: {the same but the last two}}, domain_information: of each MoE layer, see the
        function}, slots by MoE layer, domain and expert [L, G, E]).

    Raises:
        ValueError: there are fewer windows than one batch.
    """
    used = len(windows.ids_WS) // batch * batch
    if not used:
        raise ValueError(
            f"workload.path: the texts have {len(windows.ids_WS)} windows of seq_len tokens, fewer than batch={batch}; "
            "lower batch or seq_len, or add text."
        )
    layers, G = moe_layers(model), len(windows.names)
    E = max((layer.weights.n_experts for layer in layers), default=0)
    sums, on_device_LGE = [], torch.zeros(len(layers), G, E, dtype=torch.int64, device=device)
    for start in range(0, used, batch):
        pieces = (windows.ids_WS, windows.targets_WS, windows.domain_W)
        ids_BS, targets_BS, domain_B = (tensor[start : start + batch].to(device) for tensor in pieces)
        output: Output = model(ids_BS)
        native_y_BSV = output.y if native is None or native is model else native(ids_BS).y
        sums.append(_window_sums(output.y, native_y_BSV, targets_BS))
        domain_T = domain_B.repeat_interleave(ids_BS.shape[1])
        for counts_GE, routing in zip(on_device_LGE, output.routings, strict=True):
            counts_GE += _counts(routing.expert_ids_TK, domain_T, G, E)
    sums_4W, counts_LGE = torch.cat(sums, dim=1).cpu().numpy(), on_device_LGE.cpu().numpy()
    if native is None:
        sums_4W[1:] = math.nan
    bytes_W, domain_W = windows.bytes_W[:used].numpy(), windows.domain_W[:used].numpy()
    S = windows.ids_WS.shape[1]
    return {
        **_summary(sums_4W, bytes_W, S),
        "windows_left_out": len(windows.ids_WS) - used,
        "domains": {
            name: _summary(sums_4W[:, domain_W == index], bytes_W[domain_W == index], S)
            for index, name in enumerate(windows.names)
        },
        "domain_information": domain_information(counts_LGE),
    }, counts_LGE


def domain_information(counts_LGE: np.ndarray) -> list[float]:
    """How much the expert of a slot tells of the text it comes from: I(expert; domain) / H(domain), layer by layer.

    0: every domain loads the experts alike; 1: no expert is used by two domains.
    """
    information = []
    for counts_GE in counts_LGE:
        p_GE = counts_GE / max(counts_GE.sum(), 1)
        of_both, of_domain, of_expert = (_entropy(p) for p in (p_GE, p_GE.sum(1), p_GE.sum(0)))
        information.append((of_domain + of_expert - of_both) / of_domain if of_domain else 0.0)
    return information


def _entropy(p: np.ndarray) -> float:
    used = p[p > 0]
    return float(-(used * np.log(used)).sum())


def _counts(expert_ids_TK: Tensor, domain_T: Tensor, n_domains: int, n_experts: int) -> Tensor:
    """[G, E] int64 slots."""
    cell_TK = domain_T.unsqueeze(1) * n_experts + expert_ids_TK
    return cell_TK[expert_ids_TK >= 0].bincount(minlength=n_domains * n_experts).view(n_domains, n_experts)


def _window_sums(y_BSV: Tensor, native_y_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """[4, B] float64 sums over each row's tokens: nats, native nats, KL in nats, tokens with the same first choice."""
    y_TV, native_y_TV = y_BSV.flatten(0, 1), native_y_BSV.flatten(0, 1)
    rows = max(1, _ELEMENTS_AT_ONCE // y_TV.shape[-1])
    pieces = zip(y_TV.split(rows), native_y_TV.split(rows), targets_BS.flatten().split(rows), strict=True)
    per_token_4T = torch.cat([_per_token(*piece) for piece in pieces], dim=1)
    return per_token_4T.double().view(-1, *targets_BS.shape).sum(-1)


def _per_token(y_TV: Tensor, native_y_TV: Tensor, targets_T: Tensor) -> Tensor:
    """[4, T] float32, what `_window_sums` adds up."""
    log_p_TV, log_q_TV = (logits_TV.log_softmax(-1, dtype=torch.float32) for logits_TV in (y_TV, native_y_TV))
    nats_T, native_nats_T = (-log_TV.gather(1, targets_T.unsqueeze(1)).squeeze(1) for log_TV in (log_p_TV, log_q_TV))
    q_TV = log_q_TV.exp()
    # p - q adds up to 0. It cancels the rounding of the logarithms, which alone may make the KL of close p, q negative.
    kl_T = (q_TV * (log_q_TV - log_p_TV) + (log_p_TV.exp() - q_TV)).sum(-1)
    same_T = (y_TV.argmax(-1) == native_y_TV.argmax(-1)).float()
    same_T = same_T.masked_fill(nats_T.isnan() | native_nats_T.isnan(), torch.nan)  # nothing is the largest of NaNs
    return torch.stack([nats_T, native_nats_T, kl_T, same_T])


def _summary(sums_4W: np.ndarray, bytes_W: np.ndarray, seq_len: int) -> dict[str, Any]:
    """The numbers of some windows, without those of their domains."""
    nats_W, native_nats_W, kl_W, same_W = sums_4W
    tokens_W = np.full(len(bytes_W), seq_len)
    bits_W, native_bits_W = nats_W / math.log(2), native_nats_W / math.log(2)
    return {
        "tokens": int(tokens_W.sum()),
        "windows": len(bytes_W),
        "bytes": int(bytes_W.sum()),
        **_with_interval("bits_per_byte", bits_W, bytes_W),
        **_with_interval("nats_per_token", nats_W, tokens_W),
        "native_bits_per_byte": ratio_of_sums(native_bits_W, bytes_W).value,
        **_with_interval("delta_bits_per_byte", bits_W - native_bits_W, bytes_W),
        **_with_interval("kl_to_native", kl_W, tokens_W),
        **_with_interval("top1_agreement", same_W, tokens_W, within=(0.0, 1.0)),
    }


def _with_interval(
    name: str, above_W: np.ndarray, below_W: np.ndarray, within: tuple[float, float] = (-math.inf, math.inf)
) -> dict[str, float | None]:
    """sum(above) / sum(below) under `name`, and beside it the ends of its 95 % interval, cut off at `within`."""
    ratio, low, high = ratio_of_sums(above_W, below_W, within)
    return {name: ratio, f"{name}_ci95_low": low, f"{name}_ci95_high": high}
