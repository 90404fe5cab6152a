"""The time of a token while experts are loaded: where its two rates come from, which are given or measured.

The rate of the link is `gb_per_s`, or that of `link` in the file `rates`, which `moe-lab doctor --rates FOLDER --json`
printed. The time of computation is `compute_ms`, or the median of the run in the folder `decode_run`: one step of
decoding of the trace's model at batch 1, everything resident.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_lab.records import files, store
from moe_lab.records.identity import model_content, model_name, weight_changes

LINKS = ("host_to_device", "disk")


def rates(cfg: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, float | None]:
    """`gb_per_s` and `compute_ms`; both None if neither was asked for. `source` is that of the trace's manifest.

    Raises:
        ValueError: one of both is missing or is given twice, the file or the run does not have it, or the run is of
            another model than the trace.
    """
    for number, measured in (("gb_per_s", "rates"), ("compute_ms", "decode_run")):
        if cfg[number] is not None and cfg[measured] is not None:
            raise ValueError(f"expert_cache.{measured}: expert_cache.{number} is given too; leave one of them out.")
    if cfg["link"] != LINKS[0] and cfg["rates"] is None:
        raise ValueError(f"expert_cache.link={cfg['link']}: has no effect without expert_cache.rates (a file).")
    gb_per_s = cfg["gb_per_s"] if cfg["rates"] is None else _of_file(Path(cfg["rates"]), cfg["link"])
    compute_ms = cfg["compute_ms"] if cfg["decode_run"] is None else _of_run(Path(cfg["decode_run"]), source)
    if (gb_per_s is None) != (compute_ms is None):
        given, missing = "expert_cache.gb_per_s", "expert_cache.compute_ms (ms) or expert_cache.decode_run (a folder)"
        if gb_per_s is None:
            given, missing = "expert_cache.compute_ms", "expert_cache.gb_per_s or expert_cache.rates (a file)"
        raise ValueError(f"{given}: the time of a token needs {missing} too.")
    return {"gb_per_s": gb_per_s, "compute_ms": compute_ms}


def _of_file(path: Path, link: str) -> float:
    try:
        rate = files.read_json(path)["rates"][link]
        value, reason = rate["gb_per_s"], rate["reason"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"expert_cache.rates={path}: not a file of rates ({error!r}); write one with moe-lab doctor --rates FOLDER "
            "--json > FILE."
        ) from error
    if value is None:
        raise ValueError(
            f"expert_cache.rates={path}: {link} was not measured there: {reason}; choose another expert_cache.link, or "
            "give expert_cache.gb_per_s."
        )
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ValueError(f"expert_cache.rates={path}: {link} is {value!r}; must be a number > 0 (GB/s).")
    return float(value)


def _of_run(folder: Path, source: Mapping[str, Any]) -> float:
    key = f"expert_cache.decode_run={folder}"
    try:
        record = store.read_record(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{key}: not the folder of a run: it has no {store.RESULT}.") from error
    workload = record.config.get("workload") or {}
    if record.status != "ok" or record.latency_ms is None:
        raise ValueError(f"{key}: that run has no time ({record.reason or record.status}).")
    is_one_token = record.config.get("batch") == 1 and workload.get("window", 1) == 1
    if workload.get("phase") != "decode" or not is_one_token:
        raise ValueError(f"{key}: must be a run with workload.phase=decode, batch=1 and workload.window=1.")
    if (other := _other_model(record.config, source)) is not None:
        raise ValueError(f"{key}: that run is of {other}; give one of the trace's model, or expert_cache.compute_ms.")
    return record.latency_ms.p50


def _other_model(config: Mapping[str, Any], source: Mapping[str, Any]) -> str | None:
    """How the run's model is not the trace's; None if it is the same, or if the trace does not name its own.

    A checkpoint is its files, wherever they lie. Where they cannot be read, and any other model, is its name.
    """
    name, its_name = model_name(config["model"]), source.get("model")
    if its_name is None:
        return None
    contents = model_content(config), source.get("model_content")
    if name != its_name if None in contents else contents[0] != contents[1]:
        return f"{name}{' (other files)' if name == its_name else ''}, and the trace of {its_name}"
    if weight_changes(config) != source.get("weight_changes"):
        return f"{name} with other changes of its weights than the trace"
    return None
