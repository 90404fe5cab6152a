"""`moe-lab doctor`: what this machine can run. `--noise`: how far two measurements of the same code differ here.

`--rates`: how fast weights are loaded here, for `moe-lab analyze`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from moe_lab.cli.json_output import print_json
from moe_lab.cli.listing import groups
from moe_lab.cli.progress import Terminal
from moe_lab.config.compose import compose, composing_multirun
from moe_lab.config.schemas import ROUTER_IMPLEMENTATIONS
from moe_lab.measure import contention, energy
from moe_lab.ops import cxx, extension
from moe_lab.records.schema import Record
from moe_lab.results.noise import noise_file, read_floor, write_floor
from moe_lab.sweep import multirun, session
from moe_lab.sweep import plan as planning
from moe_lab.sweep.engine import Worker
from moe_lab.sweep.scratch import Scratch
from moe_lab.terminal import Console

_PROCESSES = 10
_NOISE_SWEEP = (
    "model=moe_layer",
    "router=torch",
    "batch=1,8",
    "seq_len=1,64",
    "measure.phases=false",
    "measure.roofline=false",
    "measure.max_time_s=1",
)


def show(*, json: bool = False) -> None:
    """Print the machine, and each router, experts, execution, dtype and device with what keeps it from running here."""
    worker = Worker()
    try:
        worker.start()
        options = [f"{group}={path.stem}" for group in _LOOKED_AT for path in groups(None)[group]]
        configs = [compose(["model=decoder_moe", option]) for option in options]
        options += [
            f"router.impl={impl} device={device}" for impl in ROUTER_IMPLEMENTATIONS[1:] for device in ("cpu", "cuda")
        ]
        asked = [option.split() for option in options[len(configs) :]]
        configs += [compose(["model=decoder_moe", "router=mixtral", *words]) for words in asked]
        containers = [planning.plain(cfg) for cfg in configs]
        base, *seen = worker.call("look", [planning.plain(compose(["model=decoder_moe"])), *containers])
    finally:
        worker.close()
    floor = read_floor(base["env_id"])
    if json:
        print_json(_content(base, floor, options, seen))
        return
    console = Console(soft_wrap=True, highlight=False)
    for key, value in base["env"].items():
        console.print(f"{key:20} {'-' if value is None else value}", markup=False)
    console.print(f"{'env_id':20} {base['env_id']}", markup=False)
    known = "not measured; run moe-lab doctor --noise" if floor is None else f"{floor:.1%} between two processes"
    console.print(f"{'noise floor':20} {known}", markup=False)
    console.print(f"{'load average':20} {_load()}\n", markup=False)
    for option, look in zip(options, seen, strict=True):
        words = str(look["skip"] or "ok").replace("impossible: ", "not with model=decoder_moe: ", 1)
        console.print(f"{option:32} {words}", markup=False)
    for tool, path, purpose in _tools():
        console.print(f"{tool:32} {path or f'not found; needed for {purpose}'}", markup=False)
    for what, text in _readable(base["device_id"]).items():
        console.print(f"{what:32} {text}", markup=False)


def _tools() -> list[tuple[str, str | None, str]]:
    """(name, path if it is there, what it is needed for) of each compiler."""
    return [
        ("C++ compiler", cxx.find_cxx(), "execution=compile on a CPU and router.impl=cuda_ext"),
        ("nvcc", extension.find_nvcc(), "building the CUDA extension"),
    ]


def _readable(device_id: str | None) -> dict[str, str]:
    """What `measure.energy` and `measure.throttled` can read of this device, and what not, for people."""
    if device_id is None:
        return {}
    reasons = contention.readable_reasons(device_id)
    return {**energy.readable(device_id), "throttle reasons": ", ".join(reasons) or "none can be read"}


def _content(
    base: dict[str, Any], floor: float | None, options: Sequence[str], seen: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "environment": base["env"],
        "env_id": base["env_id"],
        "noise_floor": floor,
        "load_average": _loads(),
        "options": [
            {"option": option, "runs": look["skip"] is None, "reason": look["skip"]}
            for option, look in zip(options, seen, strict=True)
        ],
        "tools": {name: path for name, path, _ in _tools()},
        "readable": _readable(base["device_id"]),
    }


_LOOKED_AT = ("router", "experts", "execution", "dtype", "device")


def _loads() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _load() -> str:
    loads = _loads()
    return "-" if loads is None else ", ".join(f"{load:.2f}" for load in loads)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def measure_rates(place: Path, *, json: bool = False) -> None:
    """Measure and print how fast weights are loaded from host memory and from the disk that `place` is on."""
    from moe_lab.measure import rates

    found = {"disk": rates.disk(place), "host_to_device": rates.host_to_device()}
    if json:
        of_rates = {name: dataclasses.asdict(rate) for name, rate in found.items()}
        print_json({"rates": of_rates, "measured": _now(), "load_average": _loads()})
        return
    console = Console(soft_wrap=True, highlight=False)
    for name, rate in found.items():
        value = f"not measured: {rate.reason}" if rate.gb_per_s is None else f"{rate.gb_per_s:.3g} GB/s"
        console.print(f"{name:20} {value} ({rate.of})", markup=False)
    console.print(f"{'load average':20} {_load()}", markup=False)


def measure_noise() -> None:
    """Measure and store how far the medians of fresh processes lie apart, with the same code on this machine.

    The floor is the 95th percentile of |ln(a / b)| over all pairs of processes, for the cell where that is largest.
    """
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"running the same four cells in {_PROCESSES} fresh processes; this takes some minutes")
    with closing(Scratch()) as scratch:
        sweep = [*_NOISE_SWEEP, f"measure.replicates={_PROCESSES}", f"hydra.sweep.dir={scratch.path}"]
        records = _run(sweep, scratch.path)
    if any(record.status != "ok" or record.latency_ms is None for record in records):
        raise ValueError(f"the measurement failed: {', '.join(record.reason or 'ok' for record in records)}")
    medians = {_name(record.config): record.latency_ms.replicate_p50 for record in records if record.latency_ms}
    floors = {name: _floor(values) for name, values in medians.items()}
    for name, floor in floors.items():
        console.print(f"{name:24} {np.median(medians[name]):10.4g} ms   two processes differ by up to {floor:.1%}")
    env_id = records[0].env_id
    assert env_id is not None
    floor = max(floors.values())
    content: dict[str, Any] = {
        "env_id": env_id,
        "floor": floor,
        "floors": floors,
        "medians_ms": medians,
        "measured": _now(),
        "load_average": _load(),
        "environment": records[0].environment,
    }
    write_floor(env_id, content)
    console.print(f"noise floor {floor:.1%}, stored in {noise_file(env_id)}", markup=False)


def _run(overrides: list[str], folder: Path) -> list[Record]:
    worker = Worker(folder / multirun.LOG)
    try:
        with composing_multirun(overrides, None) as (loader, config):
            jobs = multirun.JobComposer(loader, config).jobs(multirun.expand(loader, config))
            plan = planning.make(jobs, folder, worker, ["moe-lab", "doctor", "--noise"])
        return session.execute(plan, worker, Terminal())
    finally:
        worker.close()


def _name(config: dict[str, Any]) -> str:
    return f"batch={config['batch']} seq_len={config['seq_len']}"


def _floor(medians: list[float]) -> float:
    """exp of the 95th percentile of |ln(a / b)| over all pairs, minus 1."""
    apart = [abs(math.log(a / b)) for a, b in itertools.combinations(medians, 2)]
    return math.expm1(float(np.percentile(apart, 95)))
