"""Types and limits of the `tracker` group. Each option stands under its own name, so several can be chosen at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from moe_lab.config import addresses
from moe_lab.errors import nearest

MODES = ("online", "offline")
LONGEST_S = 86400


@dataclass
class Mlflow:
    """tracker=mlflow."""

    uri: str | None
    experiment: str
    timeout_s: float


@dataclass
class Trackio:
    """tracker=trackio."""

    project: str
    dir: str | None
    timeout_s: float


@dataclass
class Wandb:
    """tracker=wandb."""

    project: str
    entity: str | None
    mode: str
    dir: str | None
    timeout_s: float


@dataclass
class Tensorboard:
    """tracker=tensorboard."""

    dir: str | None
    timeout_s: float


TRACKERS: dict[str, Any] = {"mlflow": Mlflow, "trackio": Trackio, "wandb": Wandb, "tensorboard": Tensorboard}
PLACES = (
    "tracker.mlflow.uri",
    "tracker.trackio.dir",
    "tracker.wandb.entity",
    "tracker.wandb.dir",
    "tracker.tensorboard.dir",
)
"""Where results are sent: only who types a command says that, not a YAML file that was found."""


def check(cfg: DictConfig) -> None:
    """Raise `ValueError` for a value of `tracker` that cannot be."""
    chosen = cfg.get("tracker")  # a record of an older version has none
    if chosen is not None and not isinstance(chosen, DictConfig):
        raise ValueError(f"tracker={chosen}: must be keys of trackers; choose tracker={', '.join(TRACKERS)} or none.")
    chosen = chosen or DictConfig({})
    for name in map(str, chosen):
        if name not in TRACKERS:
            raise ValueError(f"tracker.{name}: unknown tracker; use {', '.join(TRACKERS)}.{nearest(name, TRACKERS)}")
        node: Any = chosen[name]
        if not isinstance(node, DictConfig):
            raise ValueError(f"tracker.{name}={node}: must be the keys of a tracker; choose tracker={name}.")
        fields = TRACKERS[name].__dataclass_fields__
        for key in map(str, node):
            if key not in fields:
                has = ", ".join(fields)
                raise ValueError(f"tracker.{name}.{key}: unknown key; tracker.{name} has {has}.{nearest(key, fields)}")
        for key in fields:
            if key not in node:
                raise ValueError(
                    f"tracker.{name}.{key} has no value: start the defaults list of the YAML file with /tracker/{name}."
                )
        if not 0 < node.timeout_s <= LONGEST_S:  # neither NaN
            raise ValueError(
                f"tracker.{name}.timeout_s={node.timeout_s}: must be more than 0 and at most {LONGEST_S} (seconds)."
            )
        if "mode" in fields and node.mode not in MODES:
            raise ValueError(f"tracker.{name}.mode={node.mode}: must be one of {', '.join(MODES)}.")
        if "uri" in fields and node.uri is not None and (why := addresses.mistake(node.uri)) is not None:
            raise ValueError(f"tracker.{name}.uri: {why}")
