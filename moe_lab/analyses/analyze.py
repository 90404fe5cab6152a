"""`moe-lab analyze`: every analysis of a trace that its configuration asks for, layer by layer, and what they find."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe_lab.analyses import (
    counterfactual,
    expert_cache,
    guesses,
    load_fit,
    page,
    placement,
    ranks,
    specialisation,
    speculation,
    stability,
    token_time,
    unique_experts,
)
from moe_lab.analyses.findings import Findings
from moe_lab.analyses.routes import Routes, View, routes_of, view_of
from moe_lab.config import analyses as schemas
from moe_lab.config.compose import composing
from moe_lab.config.hydra_patches import register
from moe_lab.config.mistakes import explain
from moe_lab.config.unread import key_of
from moe_lab.errors import nearest
from moe_lab.records.trace import PHASES, Trace

ANALYSES: dict[str, ModuleType] = {
    "expert_cache": expert_cache,
    "unique_experts": unique_experts,
    "speculation": speculation,
    "placement": placement,
    "ranks": ranks,
    "specialisation": specialisation,
    "stability": stability,
    "load_fit": load_fit,
    "counterfactual": counterfactual,
}
"""By their keys in the configuration. Each module has `of_layer(routes, cfg, layers)`, which is called in a process of
its own, and `conclude(parts, view, cfg, layers)`, which makes findings of what that gave for each layer. One that looks
at all layers together has `of_model(read, cfg, layers, n_threads)` too, and `conclude` gets what that gave as well."""
_SMALL = 1_000_000  # tokens times layers; below, starting processes takes longer than the work

_ALLOWED = {
    "expert_cache.policy": expert_cache.POLICIES,
    "expert_cache.prefetch": expert_cache.PREFETCHES,
    "expert_cache.scope": expert_cache.SCOPES,
    "expert_cache.link": token_time.LINKS,
    "placement.plan": placement.PLANS,
    "specialisation.guess": guesses.GUESSES,
}
_MOST = {"speculation.acceptance": 1.0}
_NEEDS = {"stability": "against", "speculation": "results"}
"""The key without which an analysis is left out."""
_LEAST = {"placement.age": 0, "placement.copies": 0}  # of the other whole numbers: 1


def compose(overrides: Sequence[str]) -> DictConfig:
    """The checked configuration of conf/analyze.yaml. Raises `ValueError` for a mistake; it names the key."""
    register()
    for word in overrides:
        _refuse_other_groups(word)
    try:
        with composing([_for_hydra(word) for word in overrides], None, "analyze") as composed:
            del composed["hydra"]
            cfg = composed
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error
    for key in map(str, cfg):
        if key not in (*ANALYSES, "out", "phase", "processes"):
            raise ValueError(f"{key}: unknown key; analyze has out, phase, processes, {', '.join(ANALYSES)}.")
    if cfg.phase not in (None, *PHASES):
        raise ValueError(f"phase={cfg.phase}: must be one of {', '.join(PHASES)}.")
    if cfg.processes is not None and cfg.processes < 1:
        raise ValueError(f"processes={cfg.processes}: must be a number >= 1.")
    for name in ANALYSES:
        for key, value in (cfg[name] or {}).items():
            _check(f"{name}.{key}", value)
    for name, needed in _NEEDS.items():
        typed = [
            word for word in overrides if (key := key_of(word)).startswith(f"{name}.") and key != f"{name}.{needed}"
        ]
        if typed and cfg[name] is not None and cfg[name][needed] is None:
            raise ValueError(f"{typed[0]}: has no effect without {name}.{needed}; set it too.")
    return cfg


_LISTS = [
    f"{name}.{field.name}"
    for name, schema in schemas.ANALYSES.items()
    for field in dataclasses.fields(schema)
    if str(field.type).startswith("list")
]


def _refuse_other_groups(word: str) -> None:
    """Raise `ValueError` for a choice of analyses that Hydra would take for something else."""
    key, _, value = word.partition("=")
    group, _, name = key.lstrip("+~").replace(".", "/").partition("/")
    if group == "analysis" and (name not in ANALYSES or "." in key):
        raise ValueError(
            f"{word}: each analysis is a group of its own; write analysis/NAME=OPTION, or analysis/NAME=null to leave "
            f"it out. NAME is one of {', '.join(ANALYSES)}.{nearest(name, ANALYSES)}"
        )
    if key in ANALYSES and value not in ("null", ""):
        raise ValueError(f"{word}: {key} has keys; write analysis/{key}=OPTION, or {key}.KEY=VALUE.")


def _for_hydra(word: str) -> str:
    """`key=1,2` and `key=1` as lists, because nothing is swept; `analysis/NAME=null` removes the group."""
    key, _, value = word.partition("=")
    if key.startswith("analysis/") and value == "null":
        return f"~{key}"
    return f"{key}=[{value}]" if key in _LISTS and value != "null" and not value.startswith("[") else word


def _check(key: str, value: Any) -> None:
    values = list(value) if isinstance(value, ListConfig) else [value]
    if isinstance(value, ListConfig) and not values:
        raise ValueError(f"{key}=[]: must have a value; analysis/{key.partition('.')[0]}=null leaves the analysis out.")
    for each in values:
        if key in _ALLOWED and each not in _ALLOWED[key]:
            near = nearest(str(each), _ALLOWED[key])
            raise ValueError(f"{key}={each}: must be one of {', '.join(_ALLOWED[key])}.{near}")
        least = _LEAST.get(key, 1)
        if isinstance(each, int) and each < least:
            raise ValueError(f"{key}={each}: must be a number >= {least}.")
        most = _MOST.get(key)
        if isinstance(each, float) and not (0 < each < float("inf") and (most is None or each <= most)):
            raise ValueError(f"{key}={each}: must be a number > 0{'' if most is None else f' and <= {most:g}'}.")


def analyze(path: Path, cfg: DictConfig) -> tuple[Path, list[Findings]]:
    """Analyse the trace at `path`; returns the folder of tables, plots and the page, and the findings.

    Raises:
        ValueError: it is not a trace, or does not have what is asked for.
        OSError: the folder cannot be written.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    asked = {name: plain[name] for name in ANALYSES if plain[name] is not None}
    for name, key in _NEEDS.items():
        if name in asked and asked[name][key] is None:
            del asked[name]
    if "stability" in asked:
        asked["stability"]["phase"] = plain["phase"]
    if "speculation" in asked:
        asked["speculation"]["cells"] = speculation.cells(asked["speculation"]["results"])
    with Trace(path) as trace:
        if "expert_cache" in asked:
            measured = token_time.rates(asked["expert_cache"], trace.source)
            asked["expert_cache"] |= {**measured, "model": trace.source.get("model")}
        view = view_of(trace, plain["phase"])
        n = _processes(trace, view, plain)
        parts = _by_layer(trace, view, asked, plain["phase"], min(n, len(trace.layers)))
        found = []
        for name, settings in asked.items():
            given = [[part[name] for part in parts], view, settings, trace.layers]
            if hasattr(ANALYSES[name], "of_model"):
                read = partial(_all_layers, trace, view, _wanted({name: settings}))
                given.append(ANALYSES[name].of_model(read, settings, trace.layers, n))
            found.append(ANALYSES[name].conclude(*given))
        folder = Path(plain["out"]) if plain["out"] else path.with_suffix(".analysis")
        page.write(folder, trace.path.name, page.facts(trace, view, plain), found, trace.missing)
    return folder, found


def _processes(trace: Trace, view: View, plain: Mapping[str, Any]) -> int:
    is_small = view.n_tokens * len(trace.layers) < _SMALL
    return int(plain["processes"] or (1 if is_small else os.cpu_count() or 1))


def _by_layer(trace: Trace, view: View, asked: Mapping[str, Any], phase: str | None, n: int) -> list[dict[str, Any]]:
    layers = range(len(trace.layers))
    if n == 1:
        return [_of_layer(trace, index, view, asked) for index in layers]
    with ProcessPoolExecutor(n, get_context("spawn"), _start, (str(trace.path), phase)) as pool:
        return list(pool.map(_in_a_process, layers, [asked] * len(layers)))


def _of_layer(trace: Trace, index: int, view: View, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What each analysis gives for one layer, which is read once."""
    wanted = _wanted(asked)
    routes = routes_of(trace, index, view, with_before="layer_before" in wanted, guesses=_recorded(wanted))
    return {name: ANALYSES[name].of_layer(routes, settings, trace.layers) for name, settings in asked.items()}


def _all_layers(trace: Trace, view: View, wanted: Sequence[str]) -> list[Routes]:
    """Every layer, with the guesses that are wanted."""
    found: list[Routes] = []
    for index in range(len(trace.layers)):
        routes = routes_of(trace, index, view, guesses=_recorded(wanted))
        found.append(dataclasses.replace(routes, before=found[-1] if found else None))
    return found


def _wanted(asked: Mapping[str, Any]) -> list[str]:
    return [*asked.get("specialisation", {}).get("guess", ()), *asked.get("expert_cache", {}).get("prefetch", ())]


def _recorded(wanted: Sequence[str]) -> set[str]:
    return {guesses.RECORDED[name] for name in wanted if name in guesses.RECORDED}


_opened: tuple[Trace, View]


def _start(path: str, phase: str | None) -> None:
    """In each process: open the trace once."""
    global _opened
    trace = Trace(path)
    _opened = trace, view_of(trace, phase)


def _in_a_process(index: int, asked: Mapping[str, Any]) -> dict[str, Any]:
    trace, view = _opened
    return _of_layer(trace, index, view, asked)
