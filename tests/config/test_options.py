"""Every YAML option composes, and every model runs with every router and every experts implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moe_lab
from moe_lab.config import targets
from moe_lab.errors import UnavailableError
from moe_lab.records.schema import Record
from tests import quick
from tests.conftest import needs_cxx

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.glob("**/*.yaml"))
# _base: no options; analyze is another root (tests/analyses/test_analyze.py).
OPTIONS = [option for option in OPTIONS if not option.startswith(("_", "analy", "hydra")) and option != "config"]
ROUTERS = sorted(path.stem for path in (CONF / "router").glob("*.yaml"))
EXPERTS = sorted(path.stem for path in (CONF / "experts").glob("*.yaml"))
CALLED = [option for option in OPTIONS if option.rpartition("/")[0] in ("model", "router", "workload")]
UNAVAILABLE = {("moe_layer", "hash"), ("moe_layer", "lookahead")}
ON_A_GPU = ("deepgemm", "flashinfer", "flashinfer_low", "fused", "sonic", "vllm")
EIGHT = {"decoder_moe": "model.n_experts=8", "moe_layer": "model.shape.n_experts=8"}  # for routers with 8 groups


def choose(option: str) -> list[str]:
    """Overrides that choose `option` ('router/torch') and what it needs beside it."""
    group, _, name = option.rpartition("/")
    needs = {"model/shape": ["model=moe_layer"], "dtype": ["device=auto"], "execution": ["device=auto"]}
    paths = {"model/checkpoint": [f"model.path={quick.TINY_OLMOE}"], "workload/text": [f"workload.path={quick.TEXTS}"]}
    return [*needs.get(group, []), f"{group}={name}", *paths.get(option, [])]


@pytest.mark.parametrize(
    "option",
    [  # test_defaults.py composes the others, too, and looks up what they name; each of the experts runs below
        pytest.param(
            o, id=o.replace("/", "-"), marks=pytest.mark.slow if o in CALLED or o.startswith("experts/") else ()
        )
        for o in OPTIONS
    ],
)
def test_every_option_composes_and_names_what_exists(option: str) -> None:
    """The option is in the composed configuration under its own name, and each target can be imported."""
    cfg = moe_lab.compose(choose(option))
    group, _, name = option.rpartition("/")
    if group not in ("experiment", "debug", "tracker"):
        node = cfg
        for key in group.split("/"):
            node = node[key]
        assert node.name == name
        if "_target_" in node:
            assert callable(targets.locate(node._target_))
    assert (CONF / f"{option}.yaml").read_text().startswith("# ")


PAIRS = [(router, "auto") for router in ROUTERS] + [("torch", experts) for experts in EXPERTS if experts != "auto"]


@pytest.mark.parametrize(
    ("router", "experts"),
    [
        pytest.param(*pair, id="-".join(pair), marks=pytest.mark.slow if pair[0] in quick.RELATED else ())
        for pair in PAIRS
    ],
)
@pytest.mark.parametrize(  # a decoder with every router is tried on the checkpoint
    "model",
    [pytest.param("decoder_moe", id="decoder_moe", marks=pytest.mark.slow), pytest.param("moe_layer", id="moe_layer")],
)
def test_every_moe_model_runs_with_every_router_and_experts(
    model: str, router: str, experts: str, tmp_path: Path
) -> None:
    """The record is ok, says what ran, and its routing counts add up; an unavailable router says so."""
    eight = [EIGHT[model]] if router in ("deepseek_v2", "deepseek_v3") else []
    cfg = quick.compose(model, f"router={router}", f"experts={experts}", *eight)
    if router == "native":
        with pytest.raises(ValueError, match="router=native: only for model=checkpoint"):
            moe_lab.run(cfg, tmp_path)
        return
    if (model, router) in UNAVAILABLE:
        with pytest.raises(UnavailableError, match=router):
            moe_lab.run(cfg, tmp_path)
        return
    if experts in ON_A_GPU and not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match=f"experts={experts}: needs device=cuda"):
            moe_lab.run(cfg, tmp_path)
        return
    if experts == "transformers":
        pytest.importorskip("transformers")
    record = moe_lab.run(cfg, tmp_path)
    assert (record.status, record.reason) == ("ok", None)
    assert record.implementation["experts"].split()[0] == ("grouped" if experts == "auto" else experts)  # on a CPU
    assert record.check is not None
    assert record.check.passed
    assert record.routing is not None
    assert len(record.routing["layers"]) == (2 if model == "decoder_moe" else 1)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The checkpoint with its own router."""
    return moe_lab.run(quick.compose("checkpoint"), tmp_path_factory.mktemp("native"))


@pytest.mark.parametrize(
    "router", [pytest.param(r, id=r, marks=pytest.mark.slow if r in quick.RELATED else ()) for r in ROUTERS]
)
@pytest.mark.slow
def test_a_checkpoint_runs_with_every_router(router: str, native: Record, tmp_path: Path) -> None:
    """On text: verified, and what the router does to the predictions is known against the checkpoint's own."""
    cfg = quick.compose("checkpoint", f"router={router}")
    record = moe_lab.run(cfg, tmp_path)
    assert (record.status, record.reason) == ("ok", None)
    assert record.check is not None and record.check.passed
    assert record.routing is not None and len(record.routing["layers"]) == 4
    assert record.quality is not None and native.quality is not None
    assert not any("was not measured" in text for text in record.warnings)
    if router in ("native", "olmoe"):  # OLMoE is what it was trained as
        assert (record.quality["kl_to_native"], record.quality["top1_agreement"]) == (0, 1)
    else:
        assert record.quality["kl_to_native"] > 0
    assert record.quality["native_bits_per_byte"] == pytest.approx(native.quality["bits_per_byte"], rel=1e-5)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("phase", [pytest.param(phase, id=phase) for phase in ("prefill", "decode")])
@pytest.mark.parametrize(
    "router",
    [
        *(pytest.param(r, id=r) for r in ("native", "sinkhorn", "hash")),
        *(pytest.param(r, id=r, marks=pytest.mark.slow) for r in ("expert_choice", "loss_free", "top_p", "capacity")),
    ],
)
def test_routers_of_every_kind_serve_a_checkpoint(router: str, phase: str, tmp_path: Path) -> None:
    """Filling a cache and stepping behind one, each verified."""
    more = [f"workload.phase={phase}", "seq_len=5", *(["workload.context_len=9"] if phase == "decode" else [])]
    record = moe_lab.run(quick.compose("checkpoint", f"router={router}", *more), tmp_path)
    assert (record.status, record.reason) == ("ok", None)
    assert record.check is not None and record.check.passed
    assert not any("was not measured" in text for text in record.warnings)


@pytest.mark.parametrize("model", [pytest.param(m, id=m) for m in ("minimal", "transformer_decoder")])
def test_a_dense_model_runs_and_has_no_routing(model: str, tmp_path: Path) -> None:
    """Without experts the record's routing is null and names no router."""
    record: Record = moe_lab.run(quick.compose(model), tmp_path)
    assert record.status == "ok"
    assert record.routing is None
    assert not {"router", "experts"} & set(record.implementation)


@pytest.mark.parametrize(
    "dtype",  # in fp32 each runs in another test of this file
    [pytest.param("fp32", id="fp32", marks=pytest.mark.slow), pytest.param("bf16", id="bf16")],
)
@pytest.mark.parametrize("model", [pytest.param(m, id=m) for m in quick.MODELS])
def test_every_model_runs_in_every_cpu_dtype(model: str, dtype: str, tmp_path: Path) -> None:
    """Verified, and the error is no larger than the dtype explains."""
    record = moe_lab.run(quick.compose(model, f"dtype={dtype}"), tmp_path)
    assert record.status == "ok"


@pytest.mark.gpu
@pytest.mark.parametrize("execution", [pytest.param(e, id=e) for e in ("eager", "cuda_graph", "compile")])
@pytest.mark.parametrize("dtype", [pytest.param(d, id=d) for d in ("fp32", "fp16", "bf16")])
@pytest.mark.parametrize("model", [pytest.param(m, id=m) for m in quick.MODELS])
def test_every_model_runs_on_cuda(model: str, dtype: str, execution: str, tmp_path: Path) -> None:
    """Verified on the device in every dtype and execution."""
    cfg = quick.compose(model, f"dtype={dtype}", f"execution={execution}", device="cuda")
    record = moe_lab.run(cfg, tmp_path)
    assert (record.status, record.reason) == ("ok", None)


@needs_cxx
@pytest.mark.slow
def test_a_cpu_run_compiles(tmp_path: Path) -> None:
    """execution=compile captures the MoE decoder whole and is verified like the others."""
    record = moe_lab.run(quick.compose("decoder_moe", "execution=compile", "model.n_layers=1"), tmp_path)
    assert (record.status, record.reason) == ("ok", None)


def test_the_loop_cannot_be_compiled(tmp_path: Path) -> None:
    """What reads results on the host is unavailable under compile, not silently eager."""
    with pytest.raises(UnavailableError, match="experts=loop"):
        moe_lab.run(quick.compose("decoder_moe", "execution=compile", "experts=loop"), tmp_path)


def test_debug_fast_times_one_iteration(tmp_path: Path) -> None:
    """Verified and recorded as any run."""
    small = [text for text in quick.overrides("decoder_moe") if text.startswith(("model", "device"))]
    record = moe_lab.run(moe_lab.compose([*small, "debug=fast"]), tmp_path)
    assert record.status == "ok"
    assert record.latency_ms is not None and record.latency_ms.n == 1
    assert record.check is not None and record.check.passed
