"""runs/run.py: from a configuration to files, what is seen after the timing (runs/observe.py), and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import moe_lab
from moe_lab.errors import MismatchError
from moe_lab.measure import environment
from moe_lab.measure.clocks import STEPS, Step
from moe_lab.measure.device_lock import DeviceLock
from moe_lab.models import ForcedRouting
from moe_lab.models.decoder_moe import DecoderMoE
from moe_lab.models.minimal import Minimal
from moe_lab.records import identity
from moe_lab.records.fields import CONTENTION, names
from moe_lab.records.phases import AGREES
from moe_lab.records.schema import BUSY
from moe_lab.records.store import read_record
from moe_lab.records.trace import Trace
from moe_lab.runs.run import Run
from tests import quick, tiny

FIELDS = {
    "schema",
    "status",
    "reason",
    "cell_id",
    "code_id",
    "env_id",
    "name",
    "overrides",
    "interleaved_with",
    "implementation",
    "latency_ms",
    "throughput",
    "phases_ms",
    "phases_share",
    "contention",
    "memory",
    "check",
    "routing",
    "quality",
    "roofline",
    "export",
    "environment",
    "warnings",
}


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_record_has_every_field_and_the_folder_every_file(in_tmp: Path) -> None:
    """result.json, samples.npz, routing.npz, config.yaml and run.log agree with each other."""
    record = moe_lab.run(quick.compose("decoder_moe", "measure.roofline=true"))
    folder = Path(str(record.directory))
    assert folder.parent == Path("outputs/runs")
    assert folder.name.endswith(record.cell_id)
    content = json.loads((folder / "result.json").read_text())
    assert set(content) >= FIELDS
    assert content == record.to_dict()
    assert read_record(folder).to_dict() == record.to_dict()

    samples = np.load(folder / "samples.npz")
    latency = record.latency_ms
    assert latency is not None
    assert latency.n == len(samples["ms"]) == len(samples["round"]) == len(samples["order"]) == len(samples["stamp_s"])
    assert latency.p50 == pytest.approx(np.median(samples["ms"]))
    if latency.n >= 6:  # with fewer the median has no 95 % interval; how many there are depends on the machine
        assert latency.ci95_low is not None
        assert latency.ci95_high is not None
        assert latency.ci95_low <= latency.p50 <= latency.ci95_high
    assert record.throughput is not None
    assert record.throughput["tokens_per_s"] == pytest.approx(14 / latency.p50 * 1e3)

    routing = np.load(folder / "routing.npz")
    assert routing["counts_LE"].sum(1).tolist() == [14 * 2] * 2
    assert routing["mean_score_LE"].sum(1) == pytest.approx([1, 1])
    assert record.routing is not None
    mean = 14 * 2 / 5
    worst = routing["counts_LE"].max() / mean
    assert record.routing["worst"]["load_max_over_mean"] == pytest.approx(worst)

    assert OmegaConf.load(folder / "config.yaml").model.n_experts == 5
    assert "verified" in (folder / "run.log").read_text()
    assert record.roofline is not None
    assert record.roofline["floor_ms"] > 0
    phases, whole = record.phases_share, record.phases_ms
    assert phases is not None and whole is not None
    assert sum(share for share in phases.values() if share is not None) == pytest.approx(1)
    agrees = abs(whole["sum_ms"] / latency.p50 - 1) <= AGREES
    assert whole["router"] == (pytest.approx(phases["router"] * whole["sum_ms"]) if agrees else None)
    assert None not in (phases["router"], phases["dispatch"], phases["experts"], phases["combine"], phases["attention"])


def test_the_same_cell_lands_in_the_same_folder(in_tmp: Path) -> None:
    """A second run replaces the first's result; a label changes nothing."""
    first = moe_lab.run(quick.compose("minimal"))
    second = moe_lab.run(quick.compose("minimal", "name=again"))
    assert first.directory == second.directory
    assert read_record(Path(str(first.directory))).name == "again"


def test_the_record_says_how_busy_the_machine_was(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning of one line; another load is not another machine, and waiting is not another cell."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(in_tmp))
    first = moe_lab.run(quick.compose("minimal", "sweep.wait=true"))
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0 * (os.cpu_count() or 1), 0.0, 0.0))
    device_id = environment.device_id(torch.device("cpu"))
    with DeviceLock(device_id):
        second = moe_lab.run(quick.compose("minimal"))
    assert (first.cell_id, first.env_id) == (second.cell_id, second.env_id)
    assert first.contention is not None and second.contention is not None
    assert set(first.contention) == set(names(CONTENTION)) == set(second.contention)
    assert (first.contention["other_runs"], second.contention["other_runs"]) == (0, 1)
    assert second.contention["load_average"] >= 99
    (busy,) = [text for text in second.warnings if text.startswith(BUSY)]
    assert "1 other run on this device" in busy and "load average" in busy and "\n" not in busy


def test_two_runs_compute_the_same(tmp_path: Path) -> None:
    """Everything but the clock repeats: error, routing, identity."""
    one = moe_lab.run(quick.compose("decoder_moe"), tmp_path / "a")
    two = moe_lab.run(quick.compose("decoder_moe"), tmp_path / "b")
    for field in ("cell_id", "code_id", "env_id", "check", "routing", "implementation"):
        assert getattr(one, field) == getattr(two, field)


def test_without_routing_metrics_the_record_says_null(tmp_path: Path) -> None:
    """measure.routing=false leaves routing null and writes no routing.npz; the cell stays the same."""
    record = moe_lab.run(quick.compose("decoder_moe", "measure.routing=false", "measure.phases=false"), tmp_path)
    assert record.routing is None
    assert record.phases_ms is None
    assert not (tmp_path / "routing.npz").exists()


def test_one_token_through_sinkhorn_is_declared_in_the_warnings(tmp_path: Path) -> None:
    """The fallback to the logits stands in the record."""
    record = moe_lab.run(quick.compose("moe_layer", "router=sinkhorn", "batch=1", "seq_len=1"), tmp_path)
    assert record.status == "ok"
    assert any("with one token the plan is uniform" in warning for warning in record.warnings)


def test_a_latency_that_does_not_settle_is_marked(tmp_path: Path) -> None:
    """stable is false and a warning says so when the interval stays wider than asked."""
    record = moe_lab.run(quick.compose("decoder_moe", "measure.target_ci=1e-9"), tmp_path)
    assert record.latency_ms is not None
    assert record.latency_ms.stable is False
    assert any("not stable" in warning for warning in record.warnings)


def test_nan_in_a_gate_is_a_failed_record_that_names_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends before it is timed; the traceback is in run.log."""
    build = Run.build

    def poisoned(self: Run) -> None:
        build(self)
        assert isinstance(self.built.model, DecoderMoE)
        self.built.model.layers[1].mlp.weights.gate_ED.data[0, 0] = float("nan")

    monkeypatch.setattr(Run, "build", poisoned)
    record = moe_lab.run(quick.compose("decoder_moe"), tmp_path)
    assert record.status == "failed"
    assert record.reason is not None
    assert record.reason.startswith("error: layer 1: the router's logits are NaN")
    assert record.latency_ms is None
    assert "Traceback" in (tmp_path / "run.log").read_text()
    assert not (tmp_path / "samples.npz").exists()


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory."), "out_of_memory", id="cuda-oom"),
        pytest.param(RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory", id="cpu-oom"),
        pytest.param(RuntimeError("first line\nsecond"), "error: RuntimeError: first line", id="any"),
    ],
)
def test_a_failure_while_running_is_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, reason: str
) -> None:
    """Whatever the forward pass raises becomes the reason, and the traceback goes to run.log."""

    def fail(self: Minimal, *_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(Minimal, "forward", fail)
    record = moe_lab.run(quick.compose("minimal"), tmp_path)
    assert (record.status, record.reason) == ("failed", reason)
    assert read_record(tmp_path).reason == reason
    assert type(raised).__name__ in (tmp_path / "run.log").read_text()


@pytest.mark.slow
def test_running_out_of_memory_is_a_record(tmp_path: Path) -> None:
    """What the estimate let pass and no memory is left for is a failed row, not a dead process."""
    program = (
        "import resource, torch, moe_lab\n"
        "from moe_lab.runs import memory_estimate\n"
        "memory_estimate.estimate = lambda config: None\n"
        "limit = 8 << 30\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "cfg = moe_lab.compose(['model=minimal', 'model.hidden=60000', 'device=cpu'])\n"
        f"record = moe_lab.run(cfg, {str(tmp_path)!r})\n"
        "print(record.status, record.reason)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["failed", "out_of_memory"]
    assert read_record(tmp_path).reason == "out_of_memory"


def test_a_planted_fault_is_a_mismatch_and_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong output is a failed record with the reason mismatch, without a latency."""
    call = Step.__call__

    def wrong(self: Step):  # type: ignore[no-untyped-def]
        output = call(self)
        return output._replace(y=output.y * 1.01)

    monkeypatch.setattr(Step, "__call__", wrong)
    record = moe_lab.run(quick.compose("minimal"), tmp_path)
    assert (record.status, record.reason) == ("failed", "mismatch: layers")
    assert record.latency_ms is None
    assert record.check is not None
    assert record.check.passed is False


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    """A run in a process of its own that measures for a minute."""
    arguments = [*quick.overrides("decoder_moe", "measure.max_time_s=60", "measure.target_ci=1e-9"), *more]
    command = [sys.executable, "-m", "moe_lab", *arguments, f"hydra.run.dir={folder}"]
    process = subprocess.Popen(command, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while "verified" not in (log.read_text() if (log := folder / "run.log").exists() else ""):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_ctrl_c_leaves_a_record_and_exit_code_130(tmp_path: Path) -> None:
    """An interrupted run says so in one line and in its record."""
    process = start(tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines() == [
        "moe-lab: interrupted; a record that was begun has the results up to this point"
    ]
    record = read_record(tmp_path)
    assert (record.status, record.reason) == ("failed", "interrupted")


@pytest.mark.slow
def test_kill_9_leaves_no_half_written_file(tmp_path: Path) -> None:
    """A killed run has a record that says so, and the next run in the folder is whole."""
    process = start(tmp_path)
    process.kill()
    process.communicate()
    killed = read_record(tmp_path)
    assert killed.status == "failed" and str(killed.reason).startswith("unfinished: ")
    assert list(moe_lab.load(tmp_path)["status"]) == ["failed"]
    record = moe_lab.run(quick.compose("decoder_moe"), tmp_path)
    assert record.status == "ok"
    assert read_record(tmp_path).status == "ok"


def test_a_full_disk_is_one_line_and_leaves_the_old_result_whole(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the full disk: exit code 2, no temporary file left, the earlier record readable."""
    moe_lab.run(quick.compose("decoder_moe", "name=old"), tmp_path)
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import moe_lab.cli.main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "sys.exit(moe_lab.cli.main.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, *quick.overrides("decoder_moe"), f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "File too large" in done.stderr
    assert read_record(tmp_path).name == "old"
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_a_parked_run_holds_no_step_and_an_eager_one_comes_back_without_another_check() -> None:
    """Model, input and verification stay; what is timed then is the model that was verified."""
    run = tiny.built(quick.compose("decoder_moe"))
    run.verify()
    verified, y, step = run.verification, run.built.step().y, run.built.step
    run.park()
    assert not hasattr(run, "step")
    run.unpark()
    assert run.built.step is not step
    assert run.verification is verified
    assert torch.equal(run.built.step().y, y)
    assert len(run.time_block(3).ms) == 3


def test_another_execution_is_verified_again_when_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled or captured anew, so it may compute something else."""

    class Wrong(Step):
        """Right the first time that it is made."""

        made = 0

        def __init__(self, model: torch.nn.Module, x: torch.Tensor, forced: ForcedRouting = None):
            super().__init__(model, x, forced)
            Wrong.made += 1
            self.factor = 1.0 if Wrong.made == 1 else 1.01

        def __call__(self):  # type: ignore[no-untyped-def]
            output = super().__call__()
            return output._replace(y=output.y * self.factor)

    monkeypatch.setitem(STEPS, "compile", Wrong)
    run = tiny.built(quick.compose("minimal", "execution=compile"))
    run.verify()
    run.park()
    with pytest.raises(MismatchError):
        run.unpark()


def test_the_time_spent_is_that_at_work(tmp_path: Path) -> None:
    """Not what other runs of a sweep do meanwhile."""
    begun = time.perf_counter()
    run = Run(quick.compose("minimal"))
    with run.at_work():
        run.build()
        time.sleep(0.1)
    left = time.perf_counter()
    time.sleep(0.3)
    came = time.perf_counter()
    with run.at_work():
        record = run.record()
    assert record.elapsed_s is not None
    assert 0.1 <= record.elapsed_s <= time.perf_counter() - begun - (came - left)


@pytest.mark.parametrize(
    "load", [pytest.param(load, id=load) for load in ("balanced", "random", "zipf", "hot", "one_hot")]
)
@pytest.mark.parametrize("model", [pytest.param(model, id=model) for model in ("decoder_moe", "moe_layer")])
@pytest.mark.slow
def test_a_forced_load_is_verified_and_said(model: str, load: str, tmp_path: Path) -> None:
    """The record says that no router ran, the realised load is its own, and there is no route to check."""
    record = moe_lab.run(quick.compose(model, f"workload.load={load}", "batch=5", "seq_len=8"), tmp_path)
    assert (record.status, record.reason) == ("ok", None)
    assert record.implementation["router"] == f"forced: {load}"
    assert record.check is not None
    assert record.check.passed
    assert (record.check.near_ties, record.check.free_rel_error, record.check.changed_sets) == (None, None, None)
    assert record.routing is not None
    most = record.routing["worst"]["load_max_over_mean"]
    assert most == pytest.approx({"balanced": 1.0, "one_hot": 2.5, "hot": 2.5}.get(load, most))
    assert most > 1 or load == "balanced"


def test_a_load_that_cannot_be_had_is_a_warning(tmp_path: Path) -> None:
    """Nine tenths of the slots cannot go to one expert of which a token has two."""
    cfg = quick.compose("moe_layer", "workload.load=hot", "workload.hot_share=0.9", "batch=5", "seq_len=8")
    (warning,) = [text for text in moe_lab.run(cfg, tmp_path).warnings if "workload.load" in text]
    assert "40.0% of the slots go to other experts than requested" in warning


def routes(folder: Path) -> np.ndarray:
    """[L, T, K] that a run recorded."""
    with Trace(folder / "routes.trace") as trace:
        return np.stack([trace.ids(index) for index in range(len(trace.layers))])


def test_the_routes_of_a_layer_alone_are_recorded(tmp_path: Path) -> None:
    """Its input is not ids of tokens."""
    record = moe_lab.run(quick.compose("moe_layer", "measure.record_routing=true"), tmp_path / "run")
    assert (record.status, record.reason) == ("ok", None)
    with Trace(tmp_path / "run" / "routes.trace") as trace:
        tokens = trace.tokens()
        assert trace.ids(0).shape == (14, 2)
    assert tokens.sequence.tolist() == [0] * 7 + [1] * 7 and tokens.position.tolist() == [*range(7)] * 2
    assert set(tokens.token) == {-1}


def test_a_recorded_routing_is_replayed(tmp_path: Path) -> None:
    """The same ids for the same tokens; for others, drawn from them; the cell is that of the recording's content."""
    recording = quick.compose("decoder_moe", "router=sinkhorn", "measure.record_routing=true")
    first = moe_lab.run(recording, tmp_path / "first")
    recorded_LTK = routes(tmp_path / "first")
    assert recorded_LTK.shape == (2, 14, 2)
    replay = ("workload.load=replay", f"workload.trace={tmp_path / 'first'}", "measure.record_routing=true")
    record = moe_lab.run(quick.compose("decoder_moe", *replay), tmp_path / "second")
    assert (record.status, record.implementation["router"]) == ("ok", "forced: replay")
    assert np.array_equal(routes(tmp_path / "second"), recorded_LTK)
    with np.load(tmp_path / "first" / "routing.npz") as arrays, np.load(tmp_path / "second" / "routing.npz") as again:
        assert np.array_equal(again["counts_LE"], arrays["counts_LE"])
    shutil.copy(tmp_path / "first" / "routes.trace", tmp_path / "moved.trace")
    moved = quick.compose("decoder_moe", "workload.load=replay", f"workload.trace={tmp_path / 'moved.trace'}")
    assert identity.cell_id(moved) == record.cell_id != first.cell_id
    assert moe_lab.run(moved, tmp_path / "of a file").status == "ok"
    longer = moe_lab.run(quick.compose("decoder_moe", *replay, "batch=9"), tmp_path / "third")
    assert longer.status == "ok"
    drawn_LTK, rows = routes(tmp_path / "third"), {tuple(row) for row in recorded_LTK[1].tolist()}
    assert drawn_LTK.shape == (2, 63, 2)
    assert {tuple(row) for row in drawn_LTK[1].tolist()} <= rows


@pytest.mark.slow
def test_windows_of_a_recording_are_replayed(tmp_path: Path) -> None:
    """Each is consecutive tokens of one sequence, the same in all layers; what has none is said."""
    moe_lab.run(quick.compose("decoder_moe", "measure.record_routing=true"), tmp_path / "first")
    recorded_LBSK = routes(tmp_path / "first").reshape(2, 2, 7, 2)
    decode = ("workload.phase=decode", "workload.context_len=2", "workload.window=3", "seq_len=6", "batch=5")
    replay = ("workload.load=replay", f"workload.trace={tmp_path / 'first'}", "measure.record_routing=true")
    record = moe_lab.run(quick.compose("decoder_moe", *decode, *replay), tmp_path / "second")
    assert (record.status, record.reason) == ("ok", None)
    replayed_LBgK = routes(tmp_path / "second")[:, :15].reshape(2, 5, 3, 2)
    windows = [recorded_LBSK[:, b, s : s + 3] for b in range(2) for s in range(5)]
    for sequence in range(5):
        assert any(np.array_equal(replayed_LBgK[:, sequence], window) for window in windows)
    longer = [word.replace("window=3", "window=8").replace("seq_len=6", "seq_len=8") for word in decode]
    with pytest.raises(ValueError, match=r"workload\.window=8: no sequence of .* has so many tokens"):
        moe_lab.run(quick.compose("decoder_moe", *longer, *replay), tmp_path / "third")
    tmp_path.joinpath("old").mkdir()
    np.savez(tmp_path / "old" / "routing.npz", expert_ids_LTK=np.zeros((2, 7, 2), np.int32))
    old = ("workload.load=replay", f"workload.trace={tmp_path / 'old'}")
    with pytest.raises(ValueError, match=r"workload\.window=3: .*does not say which tokens follow each other"):
        moe_lab.run(quick.compose("decoder_moe", *decode, *old), tmp_path / "fourth")


@pytest.mark.parametrize("fit", [pytest.param(fit, id=fit) for fit in ("power_law", "dirichlet")])
def test_a_load_that_is_fitted_to_a_recording_runs(fit: str, tmp_path: Path) -> None:
    """The record says so, and that one draw is one draw; what is replayed may be a stretch of the recording."""
    moe_lab.run(quick.compose("decoder_moe", "measure.record_routing=true", "batch=8"), tmp_path / "first")
    trace = (f"workload.trace={tmp_path / 'first'}", "batch=2")
    record = moe_lab.run(quick.compose("decoder_moe", "workload.load=fitted", f"workload.fit={fit}", *trace), tmp_path)
    assert (record.status, record.implementation["router"]) == ("ok", "forced: fitted")
    assert any("the load that the seed drew" in text for text in record.warnings) == (fit == "dirichlet")
    stretch = ("workload.load=replay", "workload.trace_consecutive=true", "measure.record_routing=true")
    record = moe_lab.run(quick.compose("decoder_moe", *stretch, *trace), tmp_path / "second")
    assert any("14 tokens, from a place drawn from the 56 recorded" in text for text in record.warnings)
    whole_LTK, part_LTK = routes(tmp_path / "first"), routes(tmp_path / "second")
    assert any(np.array_equal(whole_LTK[:, start : start + 14], part_LTK) for start in range(43))


def test_a_recording_of_an_older_run_is_replayed(tmp_path: Path) -> None:
    """Its routes are in `routing.npz`."""
    ids_LTK = np.tile(np.array([[3, 1], [0, 4]], np.int32), (2, 7, 1))
    tmp_path.joinpath("old").mkdir()
    np.savez(tmp_path / "old" / "routing.npz", expert_ids_LTK=ids_LTK)
    cfg = quick.compose(
        "decoder_moe", "workload.load=replay", f"workload.trace={tmp_path / 'old'}", "measure.record_routing=true"
    )
    assert moe_lab.run(cfg, tmp_path / "new").status == "ok"
    assert np.array_equal(routes(tmp_path / "new"), ids_LTK)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param(["workload.trace=nowhere"], "nowhere.*measure.record_routing", id="no-folder"),
        pytest.param(["workload.trace=FIRST", "model.top_k=3"], "workload.trace.*uses 3 of 5", id="other-k"),
        pytest.param(["workload.trace=FIRST", "model.n_experts=2"], "workload.trace.*2 of 2", id="fewer-experts"),
        pytest.param(
            ["workload.trace=FIRST", "model.n_layers=3"], "2 MoE layers, but the model has 3", id="other-layers"
        ),
    ],
)
def test_a_recording_that_does_not_fit_is_said(more: list[str], message: str, tmp_path: Path) -> None:
    """A mistake that names the key."""
    moe_lab.run(quick.compose("decoder_moe", "measure.record_routing=true"), tmp_path / "first")
    given = [text.replace("FIRST", str(tmp_path / "first")) for text in more]
    with pytest.raises(ValueError, match=message):
        moe_lab.run(quick.compose("decoder_moe", "workload.load=replay", *given), tmp_path / "second")


@pytest.mark.parametrize("load", [pytest.param(load, id=load) for load in ("replay", "fitted")])
def test_a_load_from_a_recording_that_is_not_named_is_a_mistake(load: str) -> None:
    """Of the configuration: nothing is built."""
    with pytest.raises(ValueError, match=rf"^workload\.load={load}: set workload\.trace to a trace file"):
        Run(quick.compose("decoder_moe", f"workload.load={load}"))
