"""What a run with a checkpoint says of it and of a router that is not the one it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from moe_lab.models import checkpoint_config
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.records.identity import option_name
from moe_lab.runs.build import is_native


def checkpoint_warnings(cfg: DictConfig, model: Checkpoint) -> list[str]:
    """What of a checkpoint or of its router makes the model another than the one that was trained."""
    found, router = model.warnings(), option_name(cfg.router)
    if untrained := model.untrained():
        names = ", ".join(untrained)
        found.append(f"router={router}: the checkpoint has no {names} for this router; it is 0 in every layer.")
    key, node = "router", cfg.router
    while isinstance(node.get("inner"), DictConfig):
        key, node = f"{key}.inner", node.inner
    if is_native(node) or model.own_norms:  # a norm of what the experts give takes out what all weights have in common
        return found
    trained = checkpoint_config.read(cfg.model.path).router
    warnings = (_sum_warning(router, key, node, trained), _scale_warning(router, key, node, trained))
    return found + [text for text in warnings if text is not None]


def _scale_warning(router: str, key: str, node: DictConfig, trained: Mapping[str, Any]) -> str | None:
    """Where a router multiplies its weights by another number than the trained one."""
    scale, wanted = node.get("scale", 1.0), trained.get("scale", 1.0)
    if scale == wanted:
        return None
    remedy = f" {key}.scale={wanted:g} keeps the checkpoint's rule." if "scale" in node else ""
    return (
        f"router={router}: a token's weights are multiplied by {scale:g}, and those of the checkpoint's router by "
        f"{wanted:g}; this alone changes the predictions.{remedy}"
    )


def _sum_warning(router: str, key: str, node: DictConfig, trained_router: Mapping[str, Any]) -> str | None:
    """Where a router's softmax weights sum to 1 and the trained ones do not, or the other way round.

    Their size alone changes the predictions, which would be taken for the price of the router's choice.
    """
    trained = trained_router.get("renormalize")
    is_softmax = node.get("score", "softmax") == "softmax"
    if trained is None or not is_softmax or node.get("renormalize", trained) == trained:
        return None
    sums = "sum to 1, and those of the checkpoint's router do not"
    if trained:
        sums = "do not sum to 1, and those of the checkpoint's router do"
    return (
        f"router={router}: a token's weights {sums}; this alone changes the predictions. "
        f"{key}.renormalize={str(trained).lower()} keeps the checkpoint's rule."
    )
