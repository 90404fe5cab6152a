"""Whether a configuration's model is the one that a checkpoint was trained to be, and what makes it another."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from moe_lab.models import checkpoint_config
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.records.identity import option_name
from moe_lab.records.weight_changes import active, other_keys

CHECKPOINT, NATIVE = "moe_lab.models.checkpoint.Checkpoint", "moe_lab.routers.native.native"


def is_checkpoint(node: DictConfig) -> bool:
    """Whether the model of this node comes from the folder of a checkpoint."""
    return str(node.get("_target_")) == CHECKPOINT


def is_native(node: DictConfig) -> bool:
    """Whether the router of this node is `router=native`."""
    return str(node.get("_target_")) == NATIVE


def native_router(impl: str = "auto") -> dict[str, Any]:
    """The node of `router=native`, for a configuration whose router is another."""
    return {"_target_": NATIVE, "name": "native", "impl": impl, "top_k": None}


def unchanged(cfg: DictConfig) -> DictConfig:
    """`cfg` without what changes the weights of its model (`runs.weight_changes`)."""
    found = copy.copy(cfg)
    found.model = OmegaConf.masked_copy(cfg.model, other_keys(cfg.model))
    return found


def as_trained(cfg: DictConfig) -> DictConfig:
    """`cfg` with the model that the checkpoint is: its own weights and router, as many experts for each token."""
    found = unchanged(cfg)
    found.router = native_router()
    found.model = {**found.model, "top_k": None}
    return found


def is_as_trained(cfg: DictConfig) -> bool:
    """Whether the model is what `as_trained` gives."""
    own_router = is_native(cfg.router) and cfg.router.top_k is None
    return own_router and cfg.model.get("top_k") is None and not active(cfg.model)


def with_its_weights(cfg: DictConfig, node: DictConfig, group: str) -> DictConfig:
    """A router's node whose `renormalize` is null, with the checkpoint's rule; true if that has no such rule.

    Raises:
        ValueError: the model is not a checkpoint.
    """
    if not is_checkpoint(cfg.model):
        raise ValueError(f"{group}.renormalize=null: only for model=checkpoint, whose rule it is; use true or false.")
    found = copy.copy(node)
    found.renormalize = checkpoint_config.read(cfg.model.path).router.get("renormalize", True)
    return found


def warnings(cfg: DictConfig, model: Checkpoint) -> list[str]:
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
    if trained is None or not is_softmax or node.get("renormalize", trained) in (trained, None):
        return None
    sums = "sum to 1, and those of the checkpoint's router do not"
    if trained:
        sums = "do not sum to 1, and those of the checkpoint's router do"
    return (
        f"router={router}: a token's weights {sums}; this alone changes the predictions. "
        f"{key}.renormalize={str(trained).lower()} keeps the checkpoint's rule."
    )
