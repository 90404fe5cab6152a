"""What a sweep compared: model and shape, dtype, device, load, workload, sizes, when, by which command."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_lab.records import files
from moe_lab.records.identity import shape_name
from moe_lab.records.store import RESULT, ROUTING
from moe_lab.results.load import UNREADABLE_BECAUSE, Plan
from moe_lab.results.numbers import short

Facts = list[tuple[str, str]]
_FEWER = ("config.model.prune.experts", "config.model.merge.experts")
_MOST = 4  # values that are listed one by one
_SHAPE = {
    "n_layers": "{} layers",
    "n_experts": "{} experts",
    "top_k": "top-{}",
    "d_model": "width {}",
    "hidden": "width {}",
    "mlp_hidden_dim": "expert width {}",
}


def facts(directory: Path, runs: pd.DataFrame, plan: Plan, anchors: Sequence[str]) -> Facts:
    """(what, which) of the sweep whose table is `runs`; what is not known is left out."""
    if runs.empty:
        return []
    configs = _configs(directory, runs)
    environment = {key: _texts(runs, f"environment.{key}") for key in ("device_name", "moe_lab", "git_sha")}
    found = [
        ("Model", "; ".join(_model(name, runs, configs, directory) for name in _texts(runs, "model"))),
        ("Compared", _compared(runs, plan, anchors)),
        ("Workload", _workload(runs, configs)),
        ("Sizes", "; ".join(f"{key} {_range(runs[key])}" for key in ("batch", "seq_len") if runs[key].notna().any())),
        ("dtype", _few(_texts(runs, "dtype"))),
        ("Device", _few(environment["device_name"] or _texts(runs, "device"))),
        ("Router", _alone(runs, "router")),
        ("Experts", _experts(runs)),
        ("Execution", _few(_texts(runs, "execution"))),
        ("Cells", _cells(runs, plan)),
        ("Run", _times(runs["started"])),
        ("Version", _version(runs, environment)),
        ("Command", _command(plan)),
    ]
    return [(what, which) for what, which in found if which]


def _configs(directory: Path, runs: pd.DataFrame) -> dict[tuple[str, ...], Mapping[str, Any]]:
    """A configuration for each model and workload; what differs between those alike has a column in `runs`."""
    keys = ["model", "workload", *(["config.workload.trace"] if "config.workload.trace" in runs else [])]
    configs: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for values, cells in runs.groupby(keys, sort=False, dropna=False):
        try:
            configs[tuple(map(str, values))] = files.read_json(directory / cells["directory"].iloc[0] / RESULT)[
                "config"
            ]
        except UNREADABLE_BECAUSE:  # it changed since the table was made
            continue
    return configs


def _model(name: str, runs: pd.DataFrame, configs: Mapping[tuple[str, ...], Any], directory: Path) -> str:
    """Its name, and in brackets where it comes from and its shape, or each of its shapes."""
    cells = runs[runs["model"] == name]
    whole: Mapping[str, Any] = next((config for key, config in configs.items() if key[0] == name), {})
    config = whole.get("model") or {}
    column = "config.model.shape.name"
    if column in cells and cells[column].notna().any():
        shapes = [f"{shape}: {_shape(of_shape, config, {})}" for shape, of_shape in cells.groupby(column, sort=False)]
        return f"{name} ({'; '.join(shapes)})"
    path = config.get("path")
    own = _shape_option(config.get("shape") or {})
    words = [f"checkpoint {path}" if path else "", f"shape {own}" if own else ""]
    words.append(_shape(cells, config, _seen_shape(cells, whole, directory) if path else {}))
    text = ", ".join(filter(None, words))
    return f"{name} ({text})" if text else name


def _shape_option(shape: Mapping[str, Any]) -> str:
    """Its name, unless sizes that were set beside it make that untrue."""
    name = str(shape.get("name") or "")
    return name if shape_name(shape).startswith(name) else ""


def _shape(cells: pd.DataFrame, config: Mapping[str, Any], seen: Mapping[str, int]) -> str:
    """Layers, experts, top-k and widths: what differs between the cells, else what is configured, else was seen."""
    words, shape = [], config.get("shape") or {}
    unread = ("mlp_hidden_dim", *(() if config.get("gate") else ("d_model",))) if config.get("name") == "router" else ()
    for key, text in _SHAPE.items():
        columns = [f"config.model.{part}{key}" for part in ("", "shape.") if f"config.model.{part}{key}" in cells]
        values = [value for column in columns for value in cells[column].dropna().unique() if key not in seen]
        value = next((known[key] for known in (seen, config, shape) if known.get(key) is not None), None)
        if key not in unread and (values or value is not None):
            words.append(text.format(_sizes(values or [value])))
    return ", ".join(words).replace(" layers", " MoE layers" if seen else " layers")


def _seen_shape(cells: pd.DataFrame, config: Mapping[str, Any], directory: Path) -> dict[str, int]:
    """Of a checkpoint, whose configuration does not tell: what its routing shows. `config` is that of one cell."""
    has_own = pd.Series(True, cells.index)
    for group in ("router", "model"):
        column, value = f"config.{group}.top_k", (config.get(group) or {}).get("top_k")
        has_own &= cells[column].isna() if column in cells else value is None
    ran = cells[cells["status"] == "ok"].assign(has_own=has_own)
    fewer = [key for key in _FEWER if key in ran]
    ran = ran.assign(has_all=~ran[fewer].fillna(0).gt(0).any(axis=1))
    # The models with all experts, then routers that use all slots of a token, as many as the checkpoint says.
    telling = ran.sort_values(["has_all", "has_own", "router.static_k"], ascending=False, kind="stable")
    for row in telling.to_dict("records"):
        path = directory / row["directory"] / ROUTING
        try:
            files.require_arrays(path)
            with np.load(path, allow_pickle=False) as arrays:
                counts_LE = arrays["counts_LE"]
        except Exception:  # whatever zipfile, zlib and numpy raise: the charts say what cannot be read
            continue
        shape = {"n_layers": len(counts_LE), "n_experts": counts_LE.shape[1]}
        slots = counts_LE.sum() / (len(counts_LE) * row["batch"] * row["seq_len"])
        is_whole = row["has_own"] and row.get("router.static_k") is True and slots == int(slots)
        if is_whole and pd.isna(row.get("throughput.time_per_output_token_ms")):
            shape["top_k"] = int(slots)
        return shape
    return {}


def _compared(runs: pd.DataFrame, plan: Plan, anchors: Sequence[str]) -> str:
    variants = sorted(_texts(runs, "variant"), key=_natural)
    if len(variants) < 2:
        return _few(variants)
    beside = f", each beside {_few(anchors)}" if anchors else ""
    return f"{_few(variants, 8)}{beside} (by {', '.join(plan.compare)})"


_OF_WORKLOAD = ("phase", "context_len", "window", "load", "trace", "trace_layer")


def _workload(runs: pd.DataFrame, configs: Mapping[tuple[str, ...], Any]) -> str:
    texts = []
    for config in configs.values():
        workload = config.get("workload") or {}
        path = workload.get("path")
        tokens = (
            f"text ({path if isinstance(path, str) else _few(list(map(str, path)))})" if path else workload.get("name")
        )
        texts.append(str(tokens))
    found = {key: _configured(runs, configs, key) for key in _OF_WORKLOAD}
    parts = [_few(list(dict.fromkeys(texts))), f"{_few(found['phase'])} phase" if found["phase"] else ""]
    if "decode" in found["phase"]:
        parts.append(f"context {_range(pd.Series(found['context_len']))}")
        if windows := [text for text in found["window"] if text not in ("1", "None")]:
            parts.append(f"steps of up to {max(map(int, windows))} tokens")
    if found["load"]:
        trace = ""
        if {"replay", "fitted"} & set(found["load"]):
            layers = _few([text for text in found["trace_layer"] if text != "None"])
            trace = f" of {_few([text for text in found['trace'] if text != 'None'])}"
            trace += f" (layer {layers})" if layers else ""
        parts.append(f"{_few(found['load'])} load{trace}")
    return ", ".join(filter(None, parts))


def _configured(runs: pd.DataFrame, configs: Mapping[tuple[str, ...], Any], key: str) -> list[str]:
    """The values of a key of the workload; of the trace as the configurations name it, not its content's hash."""
    column = f"config.workload.{key}"
    if column in runs and key != "trace":
        return [str(value) for value in runs[column].dropna().unique()]
    return list(dict.fromkeys(str(c["workload"][key]) for c in configs.values() if key in (c.get("workload") or {})))


def _cells(runs: pd.DataFrame, plan: Plan) -> str:
    counts = Counter(runs["status"].astype(str))
    not_run = len(plan.statuses.keys() - set(runs["cell_id"]))
    parts = [f"{number:,} {status}" for status, number in counts.items()]
    return ", ".join(parts + ([f"{not_run} not run (planned)"] if not_run else []))


def _times(started: pd.Series) -> str:
    """When the first and the last cell started."""
    known = pd.to_datetime(started, utc=True, errors="coerce", format="ISO8601").dropna()
    if known.empty:
        return ""
    first, last = (f"{time:%Y-%m-%d %H:%M}" for time in (known.min(), known.max()))
    day = first[: -len("10:00")]
    return f"{first} UTC" if first == last else f"{first} to {last.removeprefix(day)} UTC"


def _version(runs: pd.DataFrame, environment: Mapping[str, list[str]]) -> str:
    is_dirty = "environment.git_dirty" in runs and bool(runs["environment.git_dirty"].fillna(False).any())
    git = [sha[:12] for sha in environment["git_sha"]]
    parts = [f"moe-lab {_few(environment['moe_lab'])}"] if environment["moe_lab"] else []
    parts += [f"git {_few(git)}{' with uncommitted changes' if is_dirty else ''}"] if git else []
    return ", ".join(parts)


def _command(plan: Plan) -> str:
    if not plan.commands:
        return ""
    more = len(plan.commands) - 1
    return shlex.join(plan.commands[-1]) + (f"  (the last of {more + 1} commands)" if more else "")


def _texts(runs: pd.DataFrame, column: str) -> list[str]:
    return [str(value) for value in runs[column].dropna().unique()] if column in runs else []


def _natural(text: str) -> list[tuple[float, str]]:
    """Sorts by the numbers in a text where it has any."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(float(part), "") if at % 2 else (0.0, part) for at, part in enumerate(parts)]


def _alone(runs: pd.DataFrame, column: str) -> str:
    """The option that all cells have; where they differ the variants name it."""
    found = _texts(runs, column)
    return found[0] if len(found) == 1 else ""


def _experts(runs: pd.DataFrame) -> str:
    """As `_alone`; with what `auto` chose, also where it is compared with others."""
    name = _alone(runs, "experts")
    ran = _texts(runs[runs["experts"] == "auto"], "implementation.experts") if "experts" in runs else []
    if not ran:
        return name
    return f"auto ({_few(ran)})" if name else f"auto is {_few(ran)}"


def _few(words: Iterable[str], most: int = _MOST) -> str:
    """The first few; how many more there are is said."""
    words = list(words)
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _sizes(values: Sequence[Any]) -> str:
    """As `_range`; a list, with one number for each layer, stands as it is typed."""
    if all(isinstance(value, int | float | np.number) for value in values):
        return _range(pd.Series(values))
    return _few([str(value) for value in values])


def _range(values: pd.Series) -> str:
    """`1, 8`, or of many numbers `1 to 512`."""
    known = sorted({float(value) for value in values.dropna()})
    if len(known) <= _MOST:
        return ", ".join(short(value) for value in known)
    return f"{short(known[0])} to {short(known[-1])} ({len(known)} values)"
