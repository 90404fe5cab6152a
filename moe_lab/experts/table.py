"""What was measured to be the fastest: `choices/<device>.json`, written by `python -m benchmarks.tune_experts`.

A file holds {device, made_with, choices: [{dtype, E, K, D, F, T, implementation, tiles}]}. `implementation` is the
option of experts that is the fastest. `tiles` are the best ones for the kernels of `fused`, in the order of `Tiles`;
null where they cannot run. Read without torch.
"""

from __future__ import annotations

import importlib.resources
import json
from functools import cache, lru_cache
from math import log
from typing import NamedTuple


class Shape(NamedTuple):
    """Of a layer: how many experts, how many of them a token has, and their two widths."""

    E: int
    K: int
    D: int
    F: int


class Choice(NamedTuple):
    """What is the fastest at T tokens."""

    T: int
    implementation: str
    tiles: tuple[int, ...] | None


FUSED_DTYPES, FUSED_STEP, FUSED_EXPERTS = ("bf16", "fp16"), 16, 1024
"""Of the kernels of `fused`: their dtypes, what D and F must be a multiple of, and how many experts at most."""
_FEW = 3  # tokens: nearer to 8, which was measured, than to 1, for which `fused` has a kernel of its own


def file_name(device_name: str) -> str:
    """`nvidia_h200.json` for `NVIDIA H200`."""
    return "_".join(device_name.lower().split()) + ".json"


def neighbours(device_name: str, dtype: str, shape: Shape, T: int) -> list[Choice]:
    """What was measured at T tokens; else at the next fewer and the next more; nothing outside of what was measured."""
    choices = _choices(device_name).get((dtype, shape), [])
    fewer, more = [choice for choice in choices if choice.T <= T], [choice for choice in choices if choice.T >= T]
    if not fewer or not more:
        return []
    return [fewer[-1]] if fewer[-1].T == T else [fewer[-1], more[0]]


@lru_cache(maxsize=4096)
def fastest(device_name: str, dtype: str, shape: Shape, T: int) -> str:
    """`fused` or `grouped` where both can run: what was measured at the nearest T.

    Where nobody measured, `grouped` for a few tokens that hardly share an expert, whose kernels were the faster ones in
    all such cells that were measured (8 tokens of three shapes on an H200), else `fused`.
    """
    if dtype not in FUSED_DTYPES or shape.D % FUSED_STEP or shape.F % FUSED_STEP or shape.E > FUSED_EXPERTS:
        return "grouped"
    measured = neighbours(device_name, dtype, shape, T)
    if measured:
        return min(measured, key=lambda choice: abs(log(choice.T / T))).implementation
    return "grouped" if T >= _FEW and T * shape.K <= shape.E else "fused"


@cache
def _choices(device_name: str) -> dict[tuple[str, Shape], list[Choice]]:
    """By dtype and shape, in the order of T; nothing for a device that nobody measured."""
    file = importlib.resources.files("moe_lab.experts") / "choices" / file_name(device_name)
    if not file.is_file():
        return {}
    found: dict[tuple[str, Shape], list[Choice]] = {}
    for row in json.loads(file.read_text()).get("choices", []):
        shape = Shape(row["E"], row["K"], row["D"], row["F"])
        tiles = tuple(row["tiles"]) if row["tiles"] is not None else None
        found.setdefault((row["dtype"], shape), []).append(Choice(row["T"], row["implementation"], tiles))
    return {key: sorted(choices) for key, choices in found.items()}
