"""sweep/bench.py: the runs that one process holds, in this process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

import moe_lab
from moe_lab.measure.blocks import Seen
from moe_lab.records import identity
from moe_lab.records.schema import BUSY
from moe_lab.records.store import read_record
from moe_lab.sweep.bench import Bench
from moe_lab.sweep.engine import CellFailedError
from moe_lab.sweep.plan import plain
from tests import quick

_MODULE = '''
import torch
from moe_lab.errors import UnavailableError
from moe_lab.routers.softmax_topk import SoftmaxTopK

class Scaled(SoftmaxTopK):
    """Has a parameter of its own, of `width` numbers per expert."""

    def __init__(self, n_experts, top_k, width):
        super().__init__(n_experts, top_k, impl="auto", renormalize=True, gate_bias=False)
        self.bias = torch.nn.Parameter(torch.empty(n_experts, width), requires_grad=False)

class Picky(SoftmaxTopK):
    """Raises when it is made, or when it selects."""

    def __init__(self, n_experts, top_k, when, kind):
        super().__init__(n_experts, top_k, impl="auto", renormalize=True, gate_bias=False)
        self.when = when
        self.error = {"unavailable": UnavailableError, "value": ValueError, "other": RuntimeError}[kind]
        if when == "made":
            raise self.error("planted")

    def select(self, logits_TE, ctx=None):
        raise self.error("planted")
'''


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for --config-dir with router=scaled and router=picky."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "router").mkdir()
    (folder / "router" / "scaled.yaml").write_text("_target_: bench_routers.Scaled\nname: scaled\nwidth: 1\n")
    (folder / "router" / "picky.yaml").write_text(
        "_target_: bench_routers.Picky\nname: picky\nwhen: made\nkind: other\n"
    )
    (folder / "bench_routers.py").write_text(_MODULE)
    return folder


def config(*more: str, plugin: Path | None = None, model: str = "moe_layer") -> dict[str, Any]:
    return plain(moe_lab.compose(quick.overrides(model, *more), config_dir=plugin))


def built(bench: Bench, content: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The parameters of a run after its step `build`."""
    cell_id = identity.cell_id(content)
    bench.build(content, str(folder / cell_id))
    return dict(bench._runs[cell_id].built.model.named_parameters())


def shared(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """Names under which both hold the very same memory."""
    return {name for name in one.keys() & other.keys() if one[name].data_ptr() == other[name].data_ptr()}


def fresh(content: dict[str, Any]) -> dict[str, Tensor]:
    """The parameters of the same model made alone."""
    return dict(moe_lab.build_model(OmegaConf.create(content)).named_parameters())


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["router=sinkhorn"], id="router"),
        pytest.param(["experts=loop"], id="experts"),
        pytest.param(["batch=3", "seq_len=2"], id="input"),
    ],
)
@pytest.mark.parametrize("model", [pytest.param(name, id=name) for name in ("moe_layer", "decoder_moe")])
def test_equal_models_share_every_parameter(model: str, more: list[str], tmp_path: Path) -> None:
    """The same memory, not a copy; it holds what the model alone would have."""
    bench, content = Bench(), config(*more, model=model)
    one = built(bench, config(model=model), tmp_path)
    other = built(bench, content, tmp_path)
    assert shared(one, other) == one.keys() == other.keys()
    assert all(torch.equal(values, other[name]) for name, values in fresh(content).items())


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["seed=1"], id="seed"),
        pytest.param(["dtype=bf16"], id="dtype"),
        pytest.param(["model.shape.n_experts=6"], id="model"),
    ],
)
def test_other_models_share_nothing(more: list[str], tmp_path: Path) -> None:
    """Nor does a first model come back when a second one was built between."""
    bench = Bench()
    one = built(bench, config(), tmp_path)
    other = built(bench, config(*more), tmp_path)
    assert shared(one, other) == set()
    assert all(torch.equal(values, other[name]) for name, values in fresh(config(*more)).items())


def test_a_routers_own_parameters_are_its_own(plugin: Path, tmp_path: Path) -> None:
    """Of another size they are filled anew, as if the model had been made alone; the rest is shared."""
    bench = Bench()
    contents = [config("router=scaled", f"router.width={width}", plugin=plugin) for width in (1, 3)]
    plain_, narrow, wide = (built(bench, content, tmp_path) for content in (config(), *contents))
    (own,) = narrow.keys() - plain_.keys()
    assert shared(narrow, wide) == shared(plain_, wide) == plain_.keys()
    assert (narrow[own].shape[1], wide[own].shape[1]) == (1, 3)
    for content, found in zip(contents, (narrow, wide), strict=True):
        assert all(torch.equal(values, found[name]) for name, values in fresh(content).items())


@pytest.mark.gpu
def test_on_cuda_parameters_are_held_once_and_a_parked_graph_holds_nothing(tmp_path: Path) -> None:
    """Memory of the device: three runs of one model take its parameters once; a graph's pool goes when it is parked."""
    bench = Bench()
    sizes = ("model.shape.d_model=1024", "model.shape.mlp_hidden_dim=4096", "batch=64", "seq_len=16")
    contents = [config("device=cuda", f"execution={name}", *sizes) for name in ("eager", "cuda_graph")]
    contents.append(config("device=cuda", "router=sinkhorn", *sizes))
    start = torch.cuda.memory_allocated()
    for content in contents:
        cell_id = identity.cell_id(content)
        bench.build(content, str(tmp_path / cell_id))
        size = bench.verify(cell_id)["parameter_bytes"]
        assert size is not None and size > 2**27
        if content is contents[1]:
            (before, output) = torch.cuda.memory_reserved(), bench._runs[cell_id].built.step().y.clone()
        bench.park(cell_id)
        if content is contents[1]:
            assert torch.cuda.memory_reserved() < before
    assert torch.cuda.memory_allocated() - start < 1.5 * size
    graph = identity.cell_id(contents[1])
    bench.unpark(graph)
    assert torch.equal(bench._runs[graph].built.step().y, output)


def test_a_run_in_steps_leaves_its_record(tmp_path: Path) -> None:
    """Built, verified, parked, timed, finished: env_id is what `look` saw, the samples are those of all processes."""
    bench, content = Bench(), config()
    cell_id = identity.cell_id(content)
    (seen,) = bench.look([content])
    assert seen["skip"] is None
    bench.build(content, str(tmp_path))
    peak_bytes = bench.verify(cell_id)["peak_bytes"]
    bench.park(cell_id)
    bench.unpark(cell_id)
    n = bench.warm_up(cell_id, 0.001)
    blocks = [(replicate, 0, replicate, *bench.block(cell_id, n), Seen()) for replicate in (0, 1)]
    probe_ms = [bench.probe(cell_id) for _ in range(2)]
    bench.observe(cell_id, blocks, ["f" * 12], None, peak_bytes, probe_ms, None, {"other_runs": 2})
    bench.release(cell_id)
    record = read_record(tmp_path)
    assert (record.status, record.interleaved_with) == ("ok", ["f" * 12])
    assert (record.env_id, record.environment) == (seen["env_id"], seen["env"])
    assert record.routing is not None and record.phases_ms is not None and record.phases_share is not None
    assert record.contention == {"other_runs": 2} and any(text.startswith(BUSY) for text in record.warnings)
    assert record.latency_ms is not None
    assert record.latency_ms.replicate_probe_ms == probe_ms
    assert record.latency_ms.replicate_p50 == [pytest.approx(np.median(block[3])) for block in blocks]
    with np.load(tmp_path / "samples.npz") as samples:
        assert samples["ms"].tolist() == [*blocks[0][3], *blocks[1][3]]
        assert samples["replicate"].tolist() == samples["order"].tolist() == [0] * n + [1] * n


def test_a_failure_from_outside_is_written_without_observing(tmp_path: Path) -> None:
    """`interrupted` keeps what was timed by then."""
    bench, content = Bench(), config()
    cell_id = identity.cell_id(content)
    bench.build(content, str(tmp_path))
    bench.observe(cell_id, [(0, 0, 0, np.ones(7), np.ones(7), Seen())], [], None, None, [], ("failed", "interrupted"))
    record = read_record(tmp_path)
    assert (record.status, record.reason, record.routing) == ("failed", "interrupted", None)
    assert record.latency_ms is not None and record.latency_ms.n == 7


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    ("more", "skip"),
    [
        pytest.param(["dtype=fp16"], "unavailable: dtype=fp16", id="dtype"),
        pytest.param(["router=cuda_ext"], "unavailable: router=cuda_ext", id="router"),
        pytest.param(["router=picky", "router.kind=unavailable"], "unavailable: router=picky: planted", id="plugin"),
        pytest.param(["router=picky", "router.kind=value"], "impossible: planted", id="refused-key"),
        pytest.param(
            ["router=picky", "router.strength=1"], "impossible: router.strength: unknown key", id="no-such-key"
        ),
        pytest.param(["router=picky", "router.kind=other"], None, id="building-will-tell"),
        pytest.param([], None, id="can-run"),
    ],
)
def test_look_says_what_cannot_run_and_why(more: list[str], skip: str | None, plugin: Path) -> None:
    """Before anything is built; a reason begins as in the record's schema. Where it runs the machine is described."""
    more = ["+" + text if text.startswith("router.strength") else text for text in more]
    (seen,) = Bench().look([config(*more, plugin=plugin)])
    if skip is None:
        assert seen["skip"] is None
        assert seen["env_id"] == identity.env_id(seen["env"])
        assert seen["available_bytes"] is None or seen["available_bytes"] > 0
    else:
        assert seen["skip"].startswith(skip)


@pytest.mark.parametrize("when", [pytest.param("made", id="build"), pytest.param("select", id="verify")])
def test_a_step_that_fails_leaves_a_record_and_lets_go_of_the_run(when: str, plugin: Path, tmp_path: Path) -> None:
    """The traceback is in its log, and the next run is built as ever."""
    bench, content = Bench(), config("router=picky", f"router.when={when}", plugin=plugin)
    cell_id = identity.cell_id(content)

    def steps() -> None:
        bench.build(content, str(tmp_path))
        bench.verify(cell_id)

    with pytest.raises(CellFailedError) as raised:
        steps()
    record = read_record(tmp_path)
    assert (raised.value.status, raised.value.reason) == (record.status, record.reason)
    assert record.status == "failed"
    assert re.fullmatch(r"error: RuntimeError: planted \(bench_routers\.py:\d+\)", str(record.reason))
    assert 'raise self.error("planted")' in (tmp_path / "run.log").read_text()
    with pytest.raises(KeyError):
        bench.verify(cell_id)
    assert built(bench, config(), tmp_path).keys() == fresh(config()).keys()
