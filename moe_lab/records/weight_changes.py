"""What a configuration changes in the weights of a model once they are there: `model.prune`, `model.merge`,
`model.quantize_experts` and `model.quantize_gate`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SWITCHES = {
    "prune": ("experts",),
    "merge": ("experts",),
    "quantize_experts": ("format",),
    "quantize_gate": ("format", "noise"),
}
"""Of each change the keys of which one must be set for it to change anything."""
NODES = ("calibration", *_SWITCHES)
"""Their keys of `model`."""
SWITCHES = tuple(f"{node}.{key}" for node, keys in _SWITCHES.items() for key in keys)


def active(model: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """The nodes of `model` that change its weights, and `calibration` where experts are chosen by what they do.

    A node that changes nothing is left out, so a model without changes is the model that it was before there were any.
    """
    nodes = {key: node for key in _SWITCHES if isinstance(node := model.get(key), Mapping)}
    found = {key: node for key, node in nodes.items() if any(node.get(switch) for switch in _SWITCHES[key])}
    coldest = found.get("quantize_experts", {}).get("coldest")
    if ("prune" in found or "merge" in found or coldest is not None) and model.get("calibration") is not None:
        found = {"calibration": model["calibration"], **found}
    return found


def other_keys(model: Mapping[Any, Any]) -> list[str]:
    """The keys of `model` that are those of the model itself."""
    return [str(key) for key in model if not (key in NODES and isinstance(model[key], Mapping))]
