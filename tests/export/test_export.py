"""export=netron: every model and router as a pair that computes what the model does, or a refusal.

Each passes through all of export/trace.py, export/outline.py, export/simplify.py, export/form.py and export/parity.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import moe_lab
from moe_lab.errors import ExportError, MismatchError, UnavailableError
from moe_lab.export.export import axes
from moe_lab.ops.library import OPS
from moe_lab.routers.base import Router
from moe_lab.runs import build
from tests import quick, tiny
from tests.export import pairs

REFUSED = {
    "base": "an assignment solver on the host chooses the experts",
    "random": "it chooses experts at random",
    "native": "only for model=checkpoint",
}
NEEDS = {  # what the option asks of five experts
    "deepseek_v2": ("router.n_groups=1", "router.top_groups=1"),
    "deepseek_v3": ("router.n_groups=1", "router.top_groups=1"),
}
EXPORTABLE = [name for name in pairs.ROUTERS if name not in REFUSED]
PASSED = 1e-5


def check(folder: Path, found: dict[str, object]) -> None:
    """A pair that passed, on at least four shapes, with and without optimisations."""
    report = json.loads((folder / "parity.json").read_text())
    assert report["status"] == "passed", report["reason"]
    assert report["rel_error"] < PASSED and report["argmax_agreement"] == 1
    assert all(share == 1 for share in report["id_agreement"].values())
    shapes = {(tuple(case["shape"]), case["optimized"]) for case in report["cases"]}
    assert len(shapes) == len(report["cases"]) >= 8
    assert found["parity"]["rel_error"] == report["rel_error"]  # type: ignore[index]


@pytest.mark.parametrize(
    "router",
    [
        pytest.param(name, id=name, marks=() if name in ("torch", "deepseek_v3") else pytest.mark.slow)
        for name in EXPORTABLE
        if name not in ("hash", "lookahead")
    ],
)
def test_every_router_computes_the_same_in_onnx_runtime(router: str, tmp_path: Path) -> None:
    """One MoE layer; the router is one node of it, a function that opens."""
    cfg = pairs.compose("moe_layer", f"router={router}", *NEEDS.get(router, ()))
    found, model = pairs.export(cfg, tmp_path / "pair")
    check(tmp_path / "pair", found)
    inside = pairs.functions(tmp_path / "pair")
    layer, kind = type(model.moe).__name__, type(model.moe.router).__name__
    assert inside[layer].count(kind) == 1 and len(inside[kind]) > 1
    assert [node.op_type for node in pairs.graph(tmp_path / "pair").graph.node] == [layer]


@pytest.mark.parametrize(
    "router",
    [
        pytest.param(name, id=name, marks=() if name in ("sinkhorn", "hash") else pytest.mark.slow)
        for name in EXPORTABLE
    ],
)
@pytest.mark.slow
def test_every_router_computes_the_same_in_a_decoder(router: str, tmp_path: Path) -> None:
    """Two layers, with attention; token ids in, logits out."""
    cfg = pairs.compose("decoder_moe", f"router={router}", *NEEDS.get(router, ()))
    found, _ = pairs.export(cfg, tmp_path / "pair")
    check(tmp_path / "pair", found)


@pytest.mark.slow
def test_tiles_are_rounded_in_the_graph(tmp_path: Path) -> None:
    """For any number of tokens, of which some have no whole tile."""
    cfg = pairs.compose("moe_layer", "router=token_rounding", "router.tile=8")
    found, _ = pairs.export(cfg, tmp_path / "pair")
    check(tmp_path / "pair", found)


@pytest.mark.slow
def test_tables_of_the_first_layers_are_exported(tmp_path: Path) -> None:
    """One layer chooses by the token's id, the other by its logits: two functions."""
    cfg = pairs.compose("decoder_moe", "router=deepseek_v4", "router.hash_layers=1")
    found, _ = pairs.export(cfg, tmp_path / "pair")
    check(tmp_path / "pair", found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(policy, id=policy, marks=() if policy == "next_best" else pytest.mark.slow)
        for policy in ("token", "position", "prioritized", "next_best", "dropless")
    ],
)
def test_every_policy_of_a_capacity_computes_the_same(policy: str, tmp_path: Path) -> None:
    """Tokens are dropped, and more of them in longer batches: the capacity is computed in the graph."""
    factor = [] if policy == "dropless" else ["router.factor=0.6"]
    cfg = pairs.compose("moe_layer", "router=capacity", f"router.policy={policy}", *factor)
    found, _ = pairs.export(cfg, tmp_path / "pair")
    check(tmp_path / "pair", found)


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        pytest.param("minimal", (), id="minimal"),
        pytest.param(
            "transformer_decoder",
            ("model.tie_embeddings=true",),
            id="transformer_decoder, tied",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "transformer_decoder",
            ("model.qk_norm=head", "model.n_kv_heads=2"),
            id="shared keys, norms",
            marks=pytest.mark.slow,
        ),
        pytest.param("checkpoint", (), id="checkpoint", marks=pytest.mark.slow),
        pytest.param("moe_layer", ("model.shape.top_k=5",), id="every expert", marks=pytest.mark.slow),
        pytest.param("decoder_moe", ("model.n_dense_layers=1", "model.shared_expert_hidden_dim=8"), id="shared expert"),
    ],
)
def test_every_model_computes_the_same(model: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    """And the top level reads from input to output."""
    found, _ = pairs.export(pairs.compose(model, *overrides), tmp_path / "pair")
    check(tmp_path / "pair", found)


@pytest.mark.slow
def test_the_top_level_of_a_decoder_is_its_blocks(tmp_path: Path) -> None:
    """ids -> embedding -> blocks -> norm -> head; what they are made of opens."""
    pairs.export(pairs.compose("decoder_moe", "model.n_layers=3"), tmp_path / "pair")
    proto = pairs.graph(tmp_path / "pair")
    names = [(node.op_type, node.name) for node in proto.graph.node]
    assert names == [
        ("Rope", "ropes.0"),
        ("Embedding", "embed"),
        ("Block", "layers.0"),
        ("Block_2", "layers.1"),
        ("Block_2", "layers.2"),
        ("add_rms_norm", "norm"),
        ("Linear", "head"),
    ]
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["ids", "logits"]
    sizes = [size.dim_param or size.dim_value for size in proto.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", "seq_len"]
    inside = pairs.functions(tmp_path / "pair")
    assert inside["Block_2"] == ["add_rms_norm", "Attention", "add_rms_norm", "Reshape", "MoELayer", "Shape", "Reshape"]
    assert inside["MoELayer"] == ["SoftmaxTopK", "experts_mlp"]
    assert {"Attention", "SoftmaxTopK", "experts_mlp", "add_rms_norm", "rotate", "Linear", "Rope"} <= set(inside)


def test_sinkhorn_iterates_in_a_loop(tmp_path: Path) -> None:
    """However many iterations: one Loop inside the router."""
    sizes = set()
    for iters in (2, 9):
        folder = tmp_path / str(iters)
        found, _ = pairs.export(pairs.compose("moe_layer", "router=sinkhorn", f"router.iters={iters}"), folder)
        inside = pairs.functions(folder)
        assert inside["Sinkhorn"].count("sinkhorn_scores") == 1 and inside["sinkhorn_scores"].count("Loop") == 1
        sizes.add(found["nodes_in_functions"])
    assert len(sizes) == 1


@pytest.mark.slow
def test_all_weights_lie_in_one_file_under_their_names(tmp_path: Path) -> None:
    """Values, alignment, equal norms too; the graph holds none, and nothing of this machine."""
    cfg = pairs.compose("decoder_moe", "router=loss_free")
    model = build.build_model(cfg, torch.device("cpu"))
    folder = tmp_path / "pair"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(1.0)
    from moe_lab.export import export as exporting
    from moe_lab.runs.export import make_inputs

    exporting.export(cfg, model, folder, make_inputs)
    proto, blob = pairs.graph(folder), (folder / "__params__").read_bytes()
    state = model.state_dict()
    assert {tensor.name for tensor in proto.graph.initializer} == set(state)
    for tensor in proto.graph.initializer:
        assert tensor.data_location == onnx.TensorProto.EXTERNAL and not tensor.raw_data
        where = {entry.key: entry.value for entry in tensor.external_data}
        assert where["location"] == "__params__" and int(where["offset"]) % 4096 == 0
        bytes_ = blob[int(where["offset"]) :][: int(where["length"])]
        values = np.frombuffer(bytes_, np.float32).reshape(tuple(tensor.dims))
        assert np.array_equal(values, state[tensor.name].numpy())
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    constants = [attribute.t for node in nodes for attribute in node.attribute if attribute.HasField("t")]
    assert max(len(constant.raw_data) for constant in constants) <= 1024
    text = (folder / "__model__").read_bytes()
    assert str(tiny.ROOT).encode() not in text and b".py" not in text and b"torch" not in text
    assert text[0] == 0x08  # by which Netron tells it from PaddlePaddle's file of that name
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert all(path.stat().st_nlink == 1 for path in folder.iterdir())
    assert {path.name for path in folder.iterdir()} == {"__model__", "__params__", "parity.json", "manifest.json"}


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        pytest.param(("export.dynamic=[batch]",), ["batch", 7], id="batch"),
        pytest.param(("export.dynamic=[seq_len]", "batch=1"), [1, "seq_len"], id="seq_len", marks=pytest.mark.slow),
        pytest.param(("export.dynamic=[]",), [2, 7], id="none"),
    ],
)
@pytest.mark.slow
def test_only_the_axes_asked_for_are_free(overrides: tuple[str, ...], shape: list[object], tmp_path: Path) -> None:
    """The others are numbers, and parity looks at lengths of the free ones alone."""
    pairs.export(pairs.compose("decoder_moe", *overrides), tmp_path / "pair")
    proto = pairs.graph(tmp_path / "pair")
    sizes = [size.dim_param or size.dim_value for size in proto.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == shape
    report = json.loads((tmp_path / "pair" / "parity.json").read_text())
    assert report["status"] == "passed"
    free = [axis for axis, size in enumerate(shape) if isinstance(size, str)]
    seen = {tuple(case["shape"]) for case in report["cases"]}
    assert len(seen) == 1 if not free else len({one[free[0]] for one in seen}) >= 4


def test_axes_are_named_by_what_they_follow() -> None:
    """Of a layer's input both make the number of tokens; a width is fixed."""
    models = {name: build.build_model(quick.compose(name)) for name in ("decoder_moe", "minimal", "moe_layer")}
    both = ("batch", "seq_len")
    assert axes(models["decoder_moe"], both) == ["batch", "seq_len"]
    assert axes(models["decoder_moe"], ["seq_len"]) == [None, "seq_len"]
    assert axes(models["minimal"], both) == ["batch", None]
    assert axes(models["moe_layer"], both) == ["tokens", None] == axes(models["moe_layer"], ["batch"])


@pytest.mark.parametrize("view", [pytest.param("modules", id="modules"), pytest.param("flat", id="flat")])
@pytest.mark.slow
def test_an_older_opset_and_a_flat_view_compute_the_same(view: str, tmp_path: Path) -> None:
    """Opset 18 spells attention out; flat, only our own ops are functions."""
    cfg = pairs.compose("decoder_moe", "router=sinkhorn", "export.opset=18", f"export.view={view}")
    found, _ = pairs.export(cfg, tmp_path / "pair")
    check(tmp_path / "pair", found)
    proto, inside = pairs.graph(tmp_path / "pair"), pairs.functions(tmp_path / "pair")
    assert {opset.domain: opset.version for opset in proto.opset_import}[""] == 18
    ours = {"add_rms_norm", "experts_mlp", "rotate", "sinkhorn_scores"}
    assert set(inside) == ours if view == "flat" else ours | {"Block", "Attention"} < set(inside)


@pytest.mark.parametrize(
    "model", [pytest.param("decoder_moe", id="ids"), pytest.param("moe_layer", id="hidden states")]
)
@pytest.mark.slow
def test_bf16_is_verified_through_fp32_and_says_so(model: str, tmp_path: Path) -> None:
    """ONNX Runtime has no bf16 kernels on a CPU: never `passed`."""
    found, _ = pairs.export(pairs.compose(model, "dtype=bf16"), tmp_path / "pair")
    report = json.loads((tmp_path / "pair" / "parity.json").read_text())
    assert report["status"] == found["parity"]["status"] == "verified_in_fp32"
    assert "bfloat16" in report["reason"] and "NOT_IMPLEMENTED" in report["reason"]
    assert report["rel_error"] < PASSED
    types = {tensor.name: tensor.data_type for tensor in pairs.graph(tmp_path / "pair").graph.initializer}
    assert set(types.values()) == {onnx.TensorProto.BFLOAT16}


@pytest.mark.parametrize("experts", [pytest.param("loop", id="loop"), pytest.param("grouped", id="grouped")])
@pytest.mark.slow
def test_the_experts_implementation_is_not_part_of_the_mathematics(experts: str, tmp_path: Path) -> None:
    """Every implementation gives the same bytes; so do two exports in one process."""
    digests = []
    for name, override in (("a", "experts=grouped"), ("b", f"experts={experts}")):
        pairs.export(pairs.compose("moe_layer", override), tmp_path / name)
        files = [tmp_path / name / file for file in ("__model__", "__params__")]
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_routing_depends_on_the_data(tmp_path: Path) -> None:
    """ONNX Runtime alone, from another folder: other ids, other experts, as torch has it."""
    _, model = pairs.export(pairs.compose("decoder_moe"), tmp_path / "pair")
    session = onnxruntime.InferenceSession(tmp_path / "pair" / "__model__")
    for seed in range(3):
        ids = torch.randint(tiny.VOCAB, (4, 9), generator=torch.Generator().manual_seed(seed))
        (logits,) = session.run(None, {"ids": ids.numpy()})
        with torch.inference_mode():
            expected = model(ids).y
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", [pytest.param(name, id=name) for name in ("base", "random")])
def test_a_router_that_onnx_cannot_express_is_refused_by_name(router: str, tmp_path: Path) -> None:
    """One line, before anything is written; a capacity around it changes nothing."""
    for overrides in ((f"router={router}",), ("router=capacity", f"router@router.inner={router}")):
        cfg = pairs.compose("moe_layer", *overrides)
        with pytest.raises(UnavailableError) as refused:
            pairs.export(cfg, tmp_path / "pair")
        assert f"router={cfg.router.name}" in str(refused.value) and REFUSED[router] in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def softmax(kind: type) -> Callable[[int, int], Router]:
    """This subclass of the softmax router, with the keys of router=torch."""
    return partial(kind, **tiny.keys_of("router", "torch"))


@pytest.mark.parametrize(
    ("make_router", "raised", "said"),
    [
        pytest.param(
            pairs.WithoutBody, ExportError, "op moe_lab.route_triton has no ONNX body", id="op without a body"
        ),
        pytest.param(pairs.ReadsTheHost, ExportError, "torch cannot export the model", id="reads values"),
        pytest.param(
            softmax(pairs.OtherExperts), MismatchError, "the experts differ from the fp32 selection", id="other experts"
        ),
        pytest.param(softmax(pairs.OtherWeights), MismatchError, "a routing weight of token", id="other weights"),
    ],
)
@pytest.mark.slow
def test_what_a_graph_cannot_hold_is_an_error_and_leaves_nothing(
    make_router: Callable[[int, int], Router],
    raised: type[Exception],
    said: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One line; a pair that computes something else than the model is not kept."""
    with pytest.raises(raised, match=said) as refused:
        pairs.export(pairs.compose("moe_layer"), tmp_path / "pair", make_router)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
    if isinstance(refused.value, MismatchError):
        assert refused.value.found is not None and refused.value.found["parity"]["status"] == "failed"


def test_a_body_that_computes_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what ONNX Runtime runs, so parity sees it."""
    wrong = dataclasses.replace(OPS["experts_mlp"], onnx="tests.export.wrong_experts")
    monkeypatch.setitem(OPS, "experts_mlp", wrong)
    with pytest.raises(MismatchError, match="the relative error is"):
        pairs.export(pairs.compose("moe_layer"), tmp_path / "pair")
    assert not list(tmp_path.iterdir())


_RUN = """
import sys
from pathlib import Path
from tests.export import pairs
pairs.export(pairs.compose("decoder_moe", "router=sinkhorn"), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_processes_write_the_same_bytes(tmp_path: Path) -> None:
    """With other hash seeds, in other folders."""
    digests = []
    for seed in ("1", "2"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": f"{tiny.ROOT}:{os.environ.get('PYTHONPATH', '')}",
        }
        (tmp_path / seed).mkdir()
        target = tmp_path / seed / "pair"
        subprocess.run(pairs.python("-c", _RUN, str(target)), check=True, cwd=tmp_path / seed, env=environment)
        digests.append(
            [hashlib.sha256((target / name).read_bytes()).hexdigest() for name in ("__model__", "__params__")]
        )
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_a_run_records_its_export(tmp_path: Path) -> None:
    """`moe_lab.run`: counts, sizes and parity in the record, the files below the run's folder."""
    cfg = pairs.compose("decoder_moe", "measure.phases=false")
    record = moe_lab.run(cfg, tmp_path / "run")
    assert record.status == "ok" and record.export is not None
    folder = tmp_path / "run" / "netron"
    assert record.export["dir"] == str(folder)
    assert record.export["params_bytes"] == (folder / "__params__").stat().st_size
    assert record.export["model_bytes"] == (folder / "__model__").stat().st_size
    assert record.export["nodes"] == len(pairs.graph(folder).graph.node)
    assert record.export["functions"] == len(pairs.graph(folder).functions)
    assert record.export["parity"]["status"] == "passed" and record.export["parity"]["rel_error"] < PASSED
    again = moe_lab.run(cfg, tmp_path / "run")  # its own folder is replaced with it
    assert again.status == "ok" and (folder / "__model__").exists()


def test_a_folder_that_is_there_stops_a_run_before_it_is_timed(tmp_path: Path) -> None:
    """A mistake of the person's: one line with the mend."""
    (tmp_path / "pair").mkdir()
    cfg = pairs.compose("minimal", f"export.dir={tmp_path / 'pair'}")
    with pytest.raises(ValueError, match=r"export\.dir=.*export\.overwrite=true"):
        moe_lab.run(cfg, tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [pytest.param(name, id=name) for name in ("fp32", "bf16", "fp16")])
def test_a_cuda_run_exports_a_copy(dtype: str, tmp_path: Path) -> None:
    """Parity is against that copy; the bytes are those of a CPU run, where that dtype is computed on a CPU."""
    overrides = ("router=sinkhorn", "measure.phases=false", f"dtype={dtype}")
    cfg = quick.compose("decoder_moe", "export=netron", *overrides, device="cuda")
    record = moe_lab.run(cfg, tmp_path / "run")
    assert record.status == "ok" and record.export is not None
    assert record.export["parity"]["status"] == ("passed" if dtype == "fp32" else "verified_in_fp32")
    if dtype != "fp16":
        pairs.export(pairs.compose("decoder_moe", *overrides), tmp_path / "cpu")
        for name in ("__model__", "__params__"):
            assert (tmp_path / "run" / "netron" / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes()
