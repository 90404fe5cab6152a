"""Energy, clocks, throttling, profiles and the phases of a graph on a CUDA device, beside what they must agree with.

    python -m benchmarks.energy_profiles --out outputs/energy_profiles

Some two minutes. Needs nvidia-ml-py (`pip install 'moe-lab[energy]'`) for energy. Each line is a figure and what it is
compared with: the energy of one long run with power x time, where power was sampled by a thread every 20 ms; the
kernels of a profile with `gpu_busy_ms`; the phases of a replay with its latency; an eager latency before and after a
profile in the same process.
"""

from __future__ import annotations

import argparse
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moe_lab
from moe_lab.config.compose import compose
from moe_lab.measure import contention, energy, environment
from moe_lab.measure.profile import Profile
from moe_lab.records.schema import Record
from moe_lab.runs.run import Run

_LARGE = {
    "model": "decoder_moe",
    "model.d_model": 2048,
    "model.n_heads": 16,
    "model.n_layers": 4,
    "model.top_k": 8,
    "model.mlp_hidden_dim": 1024,
    "model.n_experts": 64,
    "batch": 8,
    "seq_len": 1024,
    "dtype": "bf16",
    "device": "cuda",
    "experts": "fused",
    "measure.roofline": "false",
    "measure.routing": "false",
    "measure.caches": "false",
    "measure.max_time_s": 2,
}
# Kernels that are long beside the gaps between them, and keep a GPU busy.
_DECODE = {"workload.phase": "decode", "workload.context_len": 1024, "batch": 16, "seq_len": 64}
_GRAPH = {"execution": "cuda_graph"}


def overrides(*changes: dict[str, Any], **more: Any) -> list[str]:
    """Of the large decoder, with these keys changed; `measure__energy=...` is `measure.energy`."""
    keys = {**_LARGE, **{key: value for change in changes for key, value in change.items()}}
    keys |= {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in keys.items()]


class SampledPower(threading.Thread):
    """The power of a GPU every 20 ms, while it is a context; `mean_w` between two moments of `time.perf_counter`."""

    def __init__(self, device_id: str):
        import pynvml

        super().__init__(daemon=True)
        pynvml.nvmlInit()
        self._nvml, self._gpu = pynvml, pynvml.nvmlDeviceGetHandleByUUID(device_id)
        self._ended = threading.Event()
        self.samples: list[tuple[float, float]] = []

    def run(self) -> None:
        """Sample until the context ends."""
        while not self._ended.wait(0.02):
            self.samples.append((time.perf_counter(), self._watts()))

    def _watts(self) -> float:
        """At this moment where NVML tells (Hopper's other power is a mean over a second)."""
        (field,) = self._nvml.nvmlDeviceGetFieldValues(self._gpu, [self._nvml.NVML_FI_DEV_POWER_INSTANT])
        if field.nvmlReturn == self._nvml.NVML_SUCCESS:
            return float(field.value.uiVal) / 1e3
        return float(self._nvml.nvmlDeviceGetPowerUsage(self._gpu)) / 1e3

    def __enter__(self) -> SampledPower:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self.join()

    def mean_w(self, begin: float, end: float) -> float:
        """Mean of the samples between."""
        return float(np.mean([watts for at, watts in self.samples if begin <= at <= end]))


def energy_beside_power(folder: Path, seconds: float) -> tuple[Record, float]:
    """One long run, and its energy over sampled power x time."""
    device_id = environment.device_id(torch.device("cuda"))
    asked = {"measure.energy": "true", "measure.target_ci": 1e-9, "measure.phases": "false"}
    cfg = compose(overrides(_GRAPH, asked, measure__max_time_s=seconds))
    with SampledPower(device_id) as power:
        record = moe_lab.run(cfg, folder)
    found = record.energy
    if record.status != "ok" or found is None or found["reason"] is not None:
        raise SystemExit(f"no energy: {record.reason or (found and found['reason'])}")
    with np.load(folder / "samples.npz") as samples:
        first_end = samples["stamp_s"][samples["round"] == 0].max()
        begin, end = first_end - found["block_seconds"][0], samples["stamp_s"].max()
    return record, found["joules"] / (power.mean_w(begin, end) * (end - begin))


def say(what: str, **values: Any) -> None:
    """A line."""
    told = (f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items())
    print(f"{what:28} {'  '.join(told)}", flush=True)


def show_energy(out: Path) -> None:
    """A long run beside power x time, and two cells in interleaved rounds."""
    record, over_power = energy_beside_power(out / "long", 10)
    found, latency = record.energy, record.latency_ms
    assert found is not None and latency is not None
    say("energy / (power x time)", ratio=over_power, within_5_percent=abs(over_power - 1) <= 0.05)
    names = ("joules", "seconds", "mean_power_w", "j_per_token", "resolution_s", "resolution_share", "sm_mhz")
    say("  long run", **{name: found[name] for name in (*names, "memory_mhz", "temperature_c")})
    for name in ("block_joules", "block_power_w", "block_sm_mhz", "block_throttled"):
        say(f"  {name}", first=found[name] and found[name][:6])
    say("  throttled", blocks=latency.throttled_blocks, of=len(found["block_joules"]))
    changes = {"experts": "fused,grouped", "measure.energy": "true", "measure.phases": "false"}
    where = [f"hydra.sweep.dir={out / 'both'}", "sweep.compare=[experts]"]
    moe_lab.multirun([*overrides(_GRAPH, changes, measure__max_time_s=6), *where])
    for row in moe_lab.load(out / "both").to_dict("records"):
        names = ("experts", "latency_ms.p50", "energy.j_per_token", "energy.mean_power_w", "energy.resolution_share")
        say("  interleaved", **{name: row[name] for name in names})


def show_profiles(out: Path) -> None:
    """Kernels beside the busy time, phases of a replay, what a profile leaves behind."""
    record = moe_lab.run(compose(overrides(measure__profile="true")), out / "eager")
    found, busy = record.profile, record.gpu_busy_ms
    if found is None or busy is None:
        raise SystemExit(f"no profile: {record.reason} {record.warnings}")
    ratio = found["kernels_ms"] / busy
    say("kernels / gpu_busy_ms", ratio=ratio, within_5_percent=abs(ratio - 1) <= 0.05, launches=found["launches"])
    for row in found["top"][:5]:
        say("  kernel", **{**row, "name": row["name"][:50]})
    say("  ncu", command=found["ncu"])
    size = (out / "eager" / "timeline.json.gz").stat().st_size / 1e6
    say("  timeline", mb=size, left_out=found["timeline_left_out"])
    for name, change in (("forward", {}), ("decode", _DECODE)):
        record = moe_lab.run(compose(overrides(_GRAPH, change, measure__profile="true")), out / name)
        phases, latency, found = record.phases_ms, record.latency_ms, record.profile
        assert phases is not None and latency is not None and found is not None, record.reason
        whole = {key: phases[key] for key in ("execution", "matched", "sum_ms", "launch_gap_ms")}
        say(f"phases of a graph, {name}", **whole, p50_ms=latency.p50, kernels_ms=found["kernels_ms"])
        say("  shares", **{name: share for name, share in (record.phases_share or {}).items() if share is not None})
        say("  phases from", text=found["phases_from"])
        for text in record.warnings:
            say("  warning", text=text)


def show_what_a_profile_leaves(out: Path) -> None:
    """The latency of an eager decoding step, which is launches, before and after a profile."""
    run = Run(compose(overrides(_DECODE)), out / "left")
    run.build()
    step = run.made().ready_step()
    step.time_block(50)
    before = float(np.median(step.time_block(200).ms))
    Profile(step)
    after = float(np.median(step.time_block(200).ms))
    say("eager step after a profile", before_ms=before, after_ms=after, ratio=after / before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("outputs/energy_profiles"))
    out = parser.parse_args().out.absolute()
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    begun = time.perf_counter()
    device_id = environment.device_id(torch.device("cuda"))
    say("device", name=torch.cuda.get_device_name(), torch=torch.__version__)
    for name, text in energy.readable(device_id).items():
        say(f"  {name}", text=text)
    say("  throttle reasons", readable=contention.readable_reasons(device_id) or "none can be read")
    say("  violation counters", ns=contention._gpu_violations(device_id))
    for show in (show_profiles, show_what_a_profile_leaves, show_energy):
        try:
            show(out)
        except (Exception, SystemExit):  # the others are figures all the same
            traceback.print_exc()
    say("seconds", all=time.perf_counter() - begun)


if __name__ == "__main__":
    main()
