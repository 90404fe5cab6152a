"""Configurations, runs and records small enough for a test, on top of `tests.quick`."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import moe_lab
from moe_lab.records import weight_changes
from moe_lab.records.schema import Record
from moe_lab.runs.run import Run
from tests import quick

ROOT = Path(__file__).resolve().parent.parent

VOCAB, D, HEADS, LAYERS, E, K, F, BATCH, SEQ = 97, 32, 4, 2, 5, 2, 24, 2, 7
"""The sizes of `decoder_moe()`, and as far as it has them of `transformer_decoder()` and `moe_layer()`."""
T = BATCH * SEQ


@cache
def _composed(model: str, overrides: tuple[str, ...]) -> DictConfig:
    return quick.compose(model, *overrides)


def compose(model: str, *overrides: str) -> DictConfig:
    """A quick run's configuration; the caller may change it."""
    return copy.deepcopy(_composed(model, overrides))


def decoder_moe(*overrides: str) -> DictConfig:
    """Two layers of five experts, top-2; odd sizes wherever the model allows them."""
    return compose("decoder_moe", *overrides)


def transformer_decoder(*overrides: str) -> DictConfig:
    """The same decoder with dense MLPs."""
    return compose("transformer_decoder", *overrides)


def moe_layer(
    *overrides: str, n_experts: int = E, top_k: int = K, d_model: int = D, hidden: int = F, tokens: int = T
) -> DictConfig:
    """One MoE layer on `tokens` hidden states."""
    sizes = {"n_experts": n_experts, "top_k": top_k, "d_model": d_model, "mlp_hidden_dim": hidden}
    shape = [f"model.shape.{key}={value}" for key, value in sizes.items()]
    return compose("moe_layer", *shape, "batch=1", f"seq_len={tokens}", *overrides)


def minimal(*overrides: str) -> DictConfig:
    """model=minimal of width 37."""
    return compose("minimal", *overrides)


@cache
def option(group: str, name: str) -> Any:
    """The node of GROUP=NAME as plain data; nobody changes it."""
    return OmegaConf.to_container(moe_lab.compose([f"{group}={name}"])[group], resolve=True)


def keys_of(group: str, name: str) -> dict[str, Any]:
    """The keys of GROUP=NAME that its class is called with, for a test that calls the class itself."""
    others = {"_target_", "name", "ignores", *weight_changes.NODES}
    if group == "router":
        others |= {"top_k", "inner", "calibration_tokens"}
    return {key: value for key, value in option(group, name).items() if key not in others}


def built(cfg: DictConfig) -> Run:
    """A Run after `build`: its model, twin, input and step are there."""
    run = Run(cfg)
    run.build()
    return run


def record(cfg: DictConfig | None = None, **fields: Any) -> Record:
    """A record with the least that the schema asks for, of `cfg` where that matters."""
    config = OmegaConf.to_container(cfg, resolve=True) if cfg is not None else {}
    least = {"status": "ok", "cell_id": "0" * 12, "code_id": "1" * 12, "config": config}
    return Record(**{**least, **fields})


def python(code: str, *arguments: str | Path, env: Mapping[str, str] | None = None) -> str:
    """What `code` prints in a fresh interpreter with `arguments` as sys.argv[1:]; an error there is an error here."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
