"""What a run leaves behind: its record from plain data, the files of its folder, its log."""

from __future__ import annotations

import gzip
import json
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import yaml

from moe_lab.config import targets
from moe_lab.errors import ExportError, MismatchError, UnavailableError
from moe_lab.measure import memory, statistics
from moe_lab.measure.blocks import Seen
from moe_lab.measure.clocks import Block
from moe_lab.records import store
from moe_lab.records.schema import Latency, Record
from moe_lab.runs.trace import RunTrace

log = logging.getLogger("moe_lab")

_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the first is ten times as fast, where libyaml is


class TimedBlock(NamedTuple):
    """A block of samples and when it was timed: in which process, which round, at which place in the round."""

    replicate: int
    round: int
    order: int
    block: Block
    seen: Seen = Seen()


def samples_ms(blocks: Sequence[TimedBlock]) -> np.ndarray:
    """Every sample, in order."""
    return np.concatenate([timed.block.ms for timed in blocks]) if blocks else np.empty(0)


def latency_of(
    blocks: Sequence[TimedBlock], target_ci: float, *, cache: Any, probe_ms: Sequence[float]
) -> Latency | None:
    """The record's `latency_ms`; None without a sample."""
    if not blocks:
        return None
    numbers = sorted({timed.replicate for timed in blocks})
    replicates = [samples_ms([timed for timed in blocks if timed.replicate == number]) for number in numbers]
    latency = statistics.summarize(samples_ms(blocks), target_ci, replicates)
    latency.replicate_probe_ms = list(probe_ms)
    latency.cache = cache
    latency.throttled_blocks = sum(bool(timed.seen.throttled) for timed in blocks)
    latency.repeated_blocks = sum(timed.seen.repeats for timed in blocks)
    return latency


def noise_warnings(latency: Latency | None, target_ci: float) -> list[str]:
    """A warning if the median is not known to `target_ci`."""
    if latency is None or latency.stable:
        return []
    if latency.ci95_low is None or latency.ci95_high is None:
        width = "unknown"
    else:
        width = f"{(latency.ci95_high - latency.ci95_low) / latency.p50:.1%} wide"
    return [
        f"latency is not stable: the 95 % interval of the median is {width} after {latency.n} samples "
        f"(measure.target_ci={target_ci}); raise measure.max_time_s or use a less busy machine."
    ]


def throughput(p50_ms: float, n_tokens: int, *, window: int | None) -> dict[str, float]:
    """The record's `throughput` of iterations of `n_tokens` tokens; of decoding `window` of each sequence."""
    rates = {"tokens_per_s": n_tokens / (p50_ms / 1e3), "time_per_token_us": p50_ms * 1e3 / n_tokens}
    return rates if window is None else {**rates, "time_per_output_token_ms": p50_ms / window}


def failure_of(error: BaseException) -> tuple[str, str]:
    """(status, reason) of the record of a run that met `error`; the traceback goes into the log."""
    if isinstance(error, UnavailableError):
        log.warning("unavailable: %s", error)
        return "skipped", f"unavailable: {error}"
    if isinstance(error, KeyboardInterrupt):
        log.warning("interrupted")
        return "failed", "interrupted"
    if isinstance(error, MismatchError):
        log.error("%s", error)
        return "failed", f"mismatch: {error.where}" + (f": {error.clause}" if error.clause else "")
    log.error("%s", "".join(traceback.format_exception(error)))
    if isinstance(error, ExportError):
        return "failed", f"error: export: {error}"
    if isinstance(error, ValueError):
        return "failed", f"error: {error}{targets.place_of(error)}"
    return "failed", reason_of(error)


def reason_of(error: BaseException) -> str:
    """The record's `reason` of an error that nobody foresaw."""
    if memory.is_exhausted_by(error):
        return "out_of_memory"
    text = error.msg if isinstance(error, SyntaxError) else str(error)  # whose text has the place already
    lines: Sequence[str] = text.strip().splitlines() or [""]
    return f"error: {type(error).__name__}: {lines[0]}{targets.place_of(error)}"


def write(
    record: Record,
    blocks: Sequence[TimedBlock],
    routing_arrays: Mapping[str, np.ndarray],
    trace: RunTrace | None,
    timeline: Sequence[Mapping[str, Any]] | None,
    folder: Path,
) -> None:
    """`result.json` last: where it stands, the rest does too. What an earlier run left and this one has not goes."""
    if (aside := store.set_aside_unreadable(folder)) is not None:
        record.warnings.append(f"an earlier result could not be read; it was renamed to {aside.name}")
    store.write_atomic(folder / "config.yaml", yaml.dump(record.config, Dumper=_DUMPER, sort_keys=False).encode())
    samples: dict[str, np.ndarray] = {}
    if blocks:
        lengths = [len(timed.block.ms) for timed in blocks]
        samples = {
            "ms": samples_ms(blocks),
            "replicate": np.repeat([timed.replicate for timed in blocks], lengths),
            "round": np.repeat([timed.round for timed in blocks], lengths),
            "order": np.repeat([timed.order for timed in blocks], lengths),
            "stamp_s": np.concatenate([timed.block.stamp_s for timed in blocks]),
            "throttled": np.repeat([bool(timed.seen.throttled) for timed in blocks], lengths),
        }
    for name, arrays in ((store.SAMPLES, samples), (store.ROUTING, routing_arrays)):
        if arrays:
            store.write_arrays(folder / name, arrays)
        else:
            (folder / name).unlink(missing_ok=True)
    if trace is not None:
        trace.write(folder / store.TRACE)
    else:
        (folder / store.TRACE).unlink(missing_ok=True)
    if timeline is not None:
        content = json.dumps({"displayTimeUnit": "ns", "traceEvents": timeline}).encode()
        store.write_atomic(folder / store.TIMELINE, gzip.compress(content, mtime=0))
    else:
        (folder / store.TIMELINE).unlink(missing_ok=True)
    store.write_record(folder, record)


@contextmanager
def run_log(folder: Path) -> Iterator[TextIO]:
    """Send the `moe_lab` logger to the end of `run.log`."""
    handler = store.LogFile(folder / store.LOG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        assert handler.stream is not None
        yield handler.stream
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        handler.close()
