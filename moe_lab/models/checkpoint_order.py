"""The order of a head's dimensions in the files of a checkpoint, and in our decoder.

Ours turns dimension i with i + d/2. A file may have the two side by side (interleaved), or turn only the first ones of
a head (partial RoPE), i with i + rotary_dim/2. Attention is the same in every order that queries and keys share, so
their rows are put into ours once, after loading, and every kernel computes every kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_TURNED = re.compile(r"layers\.\d+\.attention\.(q|k|q_norm|k_norm|q_up|kv_down)\.(weight|bias)")


def order_of(width: int, rotary_dim: int, interleaved: bool) -> list[int]:
    """For each of the `width` dimensions of ours, which one of the file's it is."""
    if interleaved:
        first, second = list(range(0, rotary_dim, 2)), list(range(1, rotary_dim, 2))
    else:
        first, second = list(range(rotary_dim // 2)), list(range(rotary_dim // 2, rotary_dim))
    still = list(range(rotary_dim, width))
    half = len(still) // 2
    return [*first, *still[:half], *second, *still[half:]]


def reorder(
    parameters: Mapping[str, Tensor], order: Sequence[int], head_dim: int, kv_down_dim: int, *, gated: bool = False
) -> None:
    """Put the rows of queries and keys, just loaded, into our order.

    Args:
        order: see `order_of`; of a head's last dimensions, which in latent attention are fewer than `head_dim`.
        head_dim: of a query or a key.
        kv_down_dim: rows of `kv_down`, where the key that all heads share comes last.
        gated: the second half of `q` are not queries but a gate, which keeps its order.
    """
    if list(order) == sorted(order):
        return
    for name, parameter in parameters.items():
        if (match := _TURNED.fullmatch(name)) is None:
            continue
        width = kv_down_dim if match[1] == "kv_down" else head_dim
        first = width - len(order)
        rows = torch.tensor([*range(first), *(first + i for i in order)], device=parameter.device)
        turned = parameter.data[: len(parameter) // 2] if gated and match[1] == "q" else parameter.data
        heads = turned.unflatten(0, (-1, width))
        heads.copy_(heads.index_select(1, rows))
