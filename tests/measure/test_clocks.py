"""measure/clocks.py: eager, compiled and captured steps, and their clocks."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moe_lab
from moe_lab.errors import MismatchError, UnavailableError
from moe_lab.measure.clocks import STEPS, CompiledStep, GraphStep, HotGraphStep, Step, _FlushL2, make_step
from moe_lab.models import ForcedRouting, Output
from moe_lab.models.serving import Decode
from moe_lab.runs.run import Run
from tests import tiny
from tests.conftest import needs_cxx


class Recording(nn.Module):
    """Notes whether garbage collection was on in each call, and raises in call number `fails_at`."""

    def __init__(self, fails_at: int | None = None):
        super().__init__()
        self.fails_at, self.collecting = fails_at, []

    def forward(self, x: Tensor) -> Output:
        self.collecting.append(gc.isenabled())
        if self.fails_at == len(self.collecting):
            raise RuntimeError("planted")
        return Output(x + 1)


class Walking(nn.Module):
    """Goes on between iterations, and takes its time for it."""

    def __init__(self, pause_s: float = 0.0):
        super().__init__()
        self.pause_s, self.at, self.seen = pause_s, 0, []

    def forward(self, x: Tensor, forced_routing: ForcedRouting = None) -> Output:
        self.seen.append(self.at)
        return Output(x + 1)

    def advance(self) -> None:
        time.sleep(self.pause_s)
        self.at += 1


class Breaking(nn.Module):
    """Cannot be captured as one graph."""

    def forward(self, x: Tensor) -> Output:
        y = x + 1
        torch._dynamo.graph_break()
        return Output(y * 2)


@pytest.fixture
def _collection_on_afterwards() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("n", [pytest.param(n, id=f"n{n}") for n in (1, 3, 17)])
def test_step_times_each_iteration_on_the_cpu(n: int) -> None:
    """n positive samples; stamps do not go back and lie within the call."""
    step = tiny.built(tiny.moe_layer()).built.step
    before = time.perf_counter()
    block = step.time_block(n)
    after = time.perf_counter()
    assert block.ms.shape == block.stamp_s.shape == (n,)
    assert (block.ms > 0).all()
    assert (np.diff(block.stamp_s) >= 0).all()
    assert before < block.stamp_s[0] and block.stamp_s[-1] < after


def test_samples_fit_between_their_stamps() -> None:
    """No sample is longer than the time since the stamp before it."""
    block = tiny.built(tiny.moe_layer()).built.step.time_block(20)
    assert (block.ms[1:] / 1e3 <= np.diff(block.stamp_s)).all()


def test_step_computes_what_its_model_computes() -> None:
    """A step adds nothing and leaves out nothing."""
    run = tiny.built(tiny.decoder_moe())
    assert torch.equal(run.built.step().y, run.built.model(run.built.x).y)


def test_every_iteration_of_a_block_runs_the_model() -> None:
    """n samples are n forward passes."""
    model = Recording()
    Step(model, torch.zeros(2)).time_block(5)
    assert len(model.collecting) == 5


@pytest.mark.parametrize("forced", [pytest.param(None, id="free"), pytest.param((), id="forced")])
def test_what_goes_on_between_iterations_is_not_timed(forced: ForcedRouting) -> None:
    """Once after each iteration of a block, and not after a call; the pauses are in no sample, but between stamps."""
    model = Walking(pause_s=0.02)
    step = Step(model, torch.zeros(2), forced)
    step()
    block = step.time_block(4)
    step()
    assert model.seen == [0, 0, 1, 2, 3, 4]
    assert np.median(block.ms) < 20
    assert (np.diff(block.stamp_s) > 0.02).all()


def decode(*more: str) -> Run:
    return tiny.built(tiny.decoder_moe("workload.phase=decode", "workload.context_len=3", *more))


def test_a_timed_block_of_decoding_goes_round() -> None:
    """Seven steps, one after the other, and from the last back to the first; what they compute stays the same."""
    run = decode()
    assert isinstance(run.built.task, Decode) and run.built.task.n_steps == 7
    before = [output.y.clone() for output in run.built.outputs()]
    run.built.task.seek(5)
    run.built.step.time_block(17)
    assert int(run.built.task.position_g) == 3 + (5 + 17) % 7
    assert all(map(torch.equal, before, (output.y for output in run.built.outputs())))


@needs_cxx
@pytest.mark.slow
def test_a_compiled_step_of_decoding_serves_every_position() -> None:
    """It compiles nothing when it goes on, and computes what the eager one does."""
    run = decode("execution=compile", "model.n_layers=1")
    with torch._dynamo.config.patch(error_on_recompile=True):
        run.built.step.time_block(9)
        outputs = [output.y.clone() for output in run.built.outputs()]
    eager = Step(run.built.task, run.built.x)
    for index, y in enumerate(outputs):
        run.built.task.seek(index)
        torch.testing.assert_close(y, eager().y, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=dtype) for dtype in ("fp32", "bf16")])
def test_a_captured_step_of_decoding_is_replayed_at_each_position(dtype: str) -> None:
    """The position is read on the device: every replay gives what an eager step gives there."""
    run = decode("device=cuda", "execution=cuda_graph", f"dtype={dtype}")
    assert isinstance(run.built.task, Decode)
    run.built.step.time_block(10)
    assert int(run.built.task.position_g) == 3 + 10 % 7
    eager = Step(run.built.task, run.built.x)
    for index, output in enumerate(run.built.outputs()):
        y = output.y.clone()
        assert int(run.built.task.position_g) == 3 + index
        torch.testing.assert_close(y, eager().y)


@pytest.mark.usefixtures("_collection_on_afterwards")
@pytest.mark.parametrize("enabled", [pytest.param(True, id="on_before"), pytest.param(False, id="off_before")])
def test_garbage_collection_is_off_while_timing_and_then_as_before(enabled: bool) -> None:
    """Nobody pays for another cell's garbage, and nobody is left without collection."""
    (gc.enable if enabled else gc.disable)()
    model = Recording()
    Step(model, torch.zeros(2)).time_block(4)
    assert model.collecting == [False] * 4
    assert gc.isenabled() is enabled


@pytest.mark.usefixtures("_collection_on_afterwards")
@pytest.mark.parametrize("enabled", [pytest.param(True, id="on_before"), pytest.param(False, id="off_before")])
def test_garbage_collection_is_as_before_after_an_exception(enabled: bool) -> None:
    """An iteration that raises in the middle of a block."""
    (gc.enable if enabled else gc.disable)()
    with pytest.raises(RuntimeError, match="planted"):
        Step(Recording(fails_at=3), torch.zeros(2)).time_block(5)
    assert gc.isenabled() is enabled


def test_a_step_leaves_gradients_alone() -> None:
    """Forward passes are in inference mode, and the mode ends with them."""
    step = tiny.built(tiny.minimal()).built.step
    assert step().y.is_inference()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.slow
@needs_cxx
def test_compiled_step_computes_what_eager_computes() -> None:
    """The whole forward pass of model=minimal, whose custom op Inductor must leave as it is."""
    run = tiny.built(tiny.minimal())
    compiled = CompiledStep(run.built.model, run.built.x)
    torch.testing.assert_close(compiled().y, run.built.step().y, rtol=1e-5, atol=1e-6)
    assert (compiled.time_block(3).ms > 0).all()


@needs_cxx
@pytest.mark.slow
@pytest.mark.parametrize("router", [pytest.param("torch", id="torch"), pytest.param("sinkhorn", id="sinkhorn")])
def test_compiled_decoder_computes_what_eager_computes(router: str) -> None:
    """Every layer of the decoder compiles without a graph break, and routes as before."""
    run = tiny.built(tiny.decoder_moe(f"router={router}"))
    compiled, eager = CompiledStep(run.built.model, run.built.x)(), run.built.step()
    torch.testing.assert_close(compiled.y, eager.y, rtol=1e-4, atol=1e-5)
    for one, other in zip(compiled.routings, eager.routings, strict=True):
        assert torch.equal(one.expert_ids_TK, other.expert_ids_TK)


def test_a_graph_break_is_unavailable_under_compile() -> None:
    """What broke out would run eagerly under the label compile."""
    with pytest.raises(UnavailableError, match="execution=compile"):
        CompiledStep(Breaking(), torch.zeros(3))


@needs_cxx
@pytest.mark.slow
def test_a_second_compiled_step_leaves_the_first_compiled() -> None:
    """A sweep times the members of a group in turns: no sample may hold a compilation."""
    first = CompiledStep(nn.Sequential(nn.Identity(), nn.ReLU()), torch.zeros(3))
    CompiledStep(nn.Sequential(nn.Identity(), nn.Tanh()), torch.zeros(3))
    torch._dynamo.utils.counters.clear()
    first.time_block(2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_a_captured_graph_needs_cuda() -> None:
    """The error names the key and what this run is on."""
    with pytest.raises(UnavailableError, match=r"execution=cuda_graph.*cpu"):
        GraphStep(Recording(), torch.zeros(2))


def test_each_execution_of_the_configuration_has_a_step() -> None:
    """conf/execution and STEPS list the same names."""
    options = {path.stem for path in (tiny.ROOT / "conf/execution").glob("*.yaml")}
    assert options == set(STEPS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=dtype) for dtype in ("fp32", "bf16")])
def test_captured_graph_computes_what_eager_computes(dtype: str) -> None:
    """A replay gives the eager pass's output and routing."""
    run = tiny.built(tiny.decoder_moe("device=cuda", "execution=cuda_graph", f"dtype={dtype}"))
    eager, replayed = Step(run.built.model, run.built.x)(), run.built.step()
    torch.cuda.synchronize()
    assert isinstance(run.built.step, GraphStep)
    torch.testing.assert_close(replayed.y, eager.y, rtol=1e-5, atol=1e-5)
    for one, other in zip(replayed.routings, eager.routings, strict=True):
        assert torch.equal(one.expert_ids_TK, other.expert_ids_TK)


@pytest.mark.gpu
@pytest.mark.parametrize("execution", [pytest.param(name, id=name) for name in ("eager", "cuda_graph")])
def test_events_give_positive_times(execution: str) -> None:
    """n samples on CUDA, for a graph from the events that are nodes of it."""
    step = tiny.built(tiny.decoder_moe("device=cuda", f"execution={execution}")).built.step
    block = step.time_block(9)
    assert block.ms.shape == block.stamp_s.shape == (9,)
    assert (block.ms > 0).all()
    assert (np.diff(block.stamp_s) >= 0).all()


@pytest.mark.gpu
def test_replays_of_a_timed_block_write_the_output_again() -> None:
    """An output poisoned before the block is whole after it: what was timed is the whole pass."""
    run = tiny.built(tiny.decoder_moe("device=cuda", "execution=cuda_graph"))
    want = Step(run.built.model, run.built.x)().y.clone()
    with torch.inference_mode():
        run.built.step().y.fill_(float("nan"))
    run.built.step.time_block(3)
    torch.cuda.synchronize()
    torch.testing.assert_close(run.built.step._output.y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_replay_reads_the_input_anew() -> None:
    """Other tokens in the same tensor give other logits: nothing was baked into the graph."""
    run = tiny.built(tiny.decoder_moe("device=cuda", "execution=cuda_graph"))
    before = run.built.step().y.clone()
    run.built.x.copy_((run.built.x + 1) % tiny.VOCAB)
    after = run.built.step().y.clone()
    torch.testing.assert_close(after, Step(run.built.model, run.built.x)().y, rtol=1e-5, atol=1e-5)
    assert not torch.equal(before, after)


@pytest.mark.gpu
@pytest.mark.parametrize("execution", [pytest.param(name, id=name) for name in ("eager", "cuda_graph")])
def test_peak_on_cuda_holds_at_least_the_parameters(execution: str) -> None:
    """The allocator's peak includes the model itself."""
    run = tiny.built(tiny.decoder_moe("device=cuda", f"execution={execution}"))
    assert run.built.step.peak_bytes() >= sum(p.numel() * p.element_size() for p in run.built.model.parameters())


@needs_cxx
@pytest.mark.slow
def test_a_timed_block_compiles_nothing_again() -> None:
    """What is timed is what was verified: a block neither recompiles nor depends on what only the host looks at."""
    run = tiny.built(tiny.decoder_moe("execution=compile", "model.n_layers=1"))
    before = run.built.step().y.clone()
    with torch._dynamo.config.patch(error_on_recompile=True):
        block = run.built.step.time_block(3)
        assert torch.equal(run.built.step().y, before)
    assert len(block.ms) == 3


@pytest.mark.gpu
def test_a_hot_graph_is_twenty_passes_and_times_one() -> None:
    model = Walking()
    x = torch.ones(1024, device="cuda")
    step = make_step("cuda_graph", "hot", model, x)
    assert isinstance(step, HotGraphStep)
    assert len(model.seen) == 2 + 20  # two before the capture
    ms = step.time_block(5).ms
    whole = make_step("cuda_graph", "natural", model, x)
    assert len(ms) == 5 and (ms > 0).all()
    assert isinstance(whole, GraphStep) and whole.calls == 1
    step.check()


@pytest.mark.gpu
def test_the_routes_that_a_forced_pass_reads_are_no_outputs() -> None:
    run = tiny.built(tiny.decoder_moe("device=cuda", "execution=cuda_graph", "workload.load=balanced"))
    step = run.built.make_step("hot")
    assert isinstance(step, HotGraphStep)
    step.check()


@pytest.mark.gpu
def test_a_graph_that_does_not_write_its_outputs_is_found() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made_once = torch.ones(4, device="cuda")

        def forward(self, x: Tensor) -> Output:
            x + 1  # what the graph computes instead
            return Output(self.made_once)

    step = make_step("cuda_graph", "hot", Constant(), torch.ones(4, device="cuda"))
    assert isinstance(step, HotGraphStep)
    with pytest.raises(MismatchError, match="did not write its outputs"):
        step.check()


@pytest.mark.gpu
def test_a_graph_outlives_those_captured_before_it() -> None:
    """What a library's product needs beside its operands is the graph's own: others' graphs and workspaces may go."""
    weight = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)

    def products(x: torch.Tensor) -> Output:
        return Output(x @ weight @ weight, ())

    first = GraphStep(products, x)  # type: ignore[arg-type]
    second = GraphStep(products, x)  # type: ignore[arg-type]
    expected = second().y.clone()
    del first
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # as torch's own graphs do
    torch.cuda.empty_cache()
    assert torch.equal(second().y, expected)


@pytest.mark.gpu
def test_a_gpu_is_busy_as_long_as_its_graph_takes() -> None:
    """Many small launches: it waits for the host most of an eager pass. One large product: it does not wait."""

    def many(x: torch.Tensor) -> Output:
        for _ in range(200):
            x = x + 1
        return Output(x, ())

    small = Step(many, torch.zeros(8, device="cuda"))  # type: ignore[arg-type]
    eager_ms = float(np.median(small.time_block(20).ms))
    graph_ms = float(np.median(GraphStep(many, torch.zeros(8, device="cuda")).time_block(20).ms))  # type: ignore[arg-type]
    assert graph_ms * 0.8 < small.busy_ms() < 0.8 * eager_ms
    side = torch.randn(8192, 8192, device="cuda")
    large = Step(lambda x: Output(x @ x, ()), side)  # type: ignore[arg-type]
    assert large.busy_ms() > 0.9 * float(np.median(large.time_block(5).ms))


@pytest.mark.gpu
def test_a_launch_bound_run_says_so() -> None:
    """In its row, with the share of the time in which the GPU computed; a graph does not wait."""
    options = ("model=decoder_moe", "batch=1", "seq_len=8", "device=cuda", "measure.max_time_s=0.2")
    eager, graph = (moe_lab.run(moe_lab.compose([*options, f"execution={name}"])) for name in ("eager", "cuda_graph"))
    (warning,) = (text for text in eager.warnings if text.startswith("launch-bound"))
    assert "% of the time; compare kernels with execution=cuda_graph" in warning
    assert eager.latency_ms is not None and graph.latency_ms is not None
    assert eager.gpu_busy_ms is not None and eager.gpu_busy_ms < 0.8 * eager.latency_ms.p50
    assert graph.gpu_busy_ms is None and not any(text.startswith("launch-bound") for text in graph.warnings)


def test_the_flush_reads_three_times_the_cache_and_writes_nothing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, which stands for a GPU with a cache of 4000 bytes."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=4000))
    flush = _FlushL2(torch.device("cpu"))
    assert flush._buffer.nbytes == 12_000
    flush._buffer.fill_(2)
    flush()
    assert int(flush._sum) == 2 * flush._buffer.numel() and bool((flush._buffer == 2).all())


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["eager", "cuda_graph"])
def test_the_l2_cache_is_flushed_before_each_cold_iteration(execution: str) -> None:
    step = make_step(execution, "cold", Walking(), torch.ones(4, device="cuda"))
    flush, calls = step.prepare, []

    def counted() -> None:
        calls.append(1)
        flush()

    step.prepare = counted
    assert len(step.time_block(7).ms) == len(calls) == 7
    assert flush._buffer.nbytes >= 3 * torch.cuda.get_device_properties(0).L2_cache_size  # type: ignore[attr-defined]
