"""runs/weight_changes.py: the changed models against what the change means, in every phase; who shares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

import moe_lab
from moe_lab.models.moe_layer import MoELayer, moe_layers
from moe_lab.models.parameters import shareable
from moe_lab.ops.fake_quantize import fake_quantize
from moe_lab.records.identity import cell_id
from moe_lab.routers.base import Routing
from moe_lab.runs import build, trained
from moe_lab.runs.weight_changes import WeightChanges
from moe_lab.sweep.bench import Bench
from moe_lab.sweep.plan import plain
from tests import quick
from tests.models import checkpoints

CPU = torch.device("cpu")
QWEN3 = quick.ASSETS / "tiny-qwen3-moe"
PYDOC, JARGON = quick.TEXTS / "pydoc.txt", quick.TEXTS / "jargon.txt"
CALIBRATION = (f"model.calibration.path={PYDOC}", "model.calibration.tokens=512", f"workload.path={JARGON}")


def checkpoint(*more: str, path: Path = quick.TINY_OLMOE) -> DictConfig:
    return quick.compose("checkpoint", f"model.path={path}", *CALIBRATION, *more)


def changes_of(model: Any) -> WeightChanges:
    changes: WeightChanges = model.weight_changes
    return changes


def left(model: Any) -> list[list[int]]:
    """Which experts each layer has, of a model with some removed."""
    return [[expert for (expert,) in change.groups] for change in changes_of(model).layers]


def without(layers: list[MoELayer], kept: list[list[int]]) -> None:
    """Layers whose routers choose among the experts `kept` alone, which they still hold."""
    for layer, ids in zip(layers, kept, strict=True):
        select = layer.router.select

        def masked(logits_TE: Tensor, ctx: Any = None, *, select: Any = select, ids: list[int] = ids) -> Routing:
            mask_E = torch.full((logits_TE.shape[1],), -torch.inf)
            mask_E[ids] = 0
            return select(logits_TE + mask_E, ctx)

        layer.router.select = masked  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "by",
    [
        pytest.param("frequency", id="frequency"),
        pytest.param("weight", id="weight", marks=pytest.mark.slow),
        pytest.param("reap", id="reap"),
    ],
)
@pytest.mark.parametrize(
    "path", [pytest.param(quick.TINY_OLMOE, id="olmoe"), pytest.param(QWEN3, id="qwen3", marks=pytest.mark.slow)]
)
def test_a_pruned_model_is_the_model_that_never_chooses_the_removed(by: str, path: Path) -> None:
    """The softmax over those left is that of logits with -inf for the others. And those removed are the least."""
    cfg = checkpoint("model.prune.experts=5", f"model.prune.by={by}", path=path)
    model, whole = build.build_model(cfg, CPU), build.build_model(trained.unchanged(cfg), CPU)
    layers = moe_layers(whole)
    assert all(len(ids) == layer.weights.n_experts - 5 for ids, layer in zip(left(model), layers, strict=True))
    if by == "frequency":
        for change, ids in zip(changes_of(model).layers, left(model), strict=True):
            gone = sorted(set(range(len(change.counts_E))) - set(ids))
            assert change.counts_E[gone].max() <= change.counts_E[ids].min()
    x = build.build_input(cfg, model, CPU)
    native = whole(x).y
    without(layers, left(model))
    found, wanted = model(x).y, whole(x).y
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, native, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_counts_are_of_the_calibration_text_by_the_models_own_router() -> None:
    """Four windows of 128 tokens, two slots in each layer; another text counts others, another router does not."""
    one = build.build_model(checkpoint("model.prune.experts=1"), CPU)
    assert {float(change.counts_E.sum()) for change in changes_of(one).layers} == {1024.0}
    assert changes_of(one).texts == ("pydoc",) and changes_of(one).tokens == 512
    other = build.build_model(checkpoint("model.prune.experts=1", "router=sinkhorn", "batch=3", "experts=loop"), CPU)
    roff = build.build_model(
        checkpoint("model.prune.experts=1", f"model.calibration.path={quick.TEXTS / 'roff.txt'}"), CPU
    )
    for a, b, c in zip(*(changes_of(model).layers for model in (one, other, roff)), strict=True):
        assert np.array_equal(a.counts_E, b.counts_E) and a.groups == b.groups
        assert not np.array_equal(a.counts_E, c.counts_E)


def test_merged_experts_are_means_and_the_others_untouched() -> None:
    """Gate and matrices of a group, by its slots; REAP's layers of one are the checkpoint's to the bit."""
    cfg = checkpoint("model.merge.experts=3")
    model, whole = build.build_model(cfg, CPU), build.build_model(trained.unchanged(cfg), CPU)
    n_merged = 0
    for change, layer, before in zip(changes_of(model).layers, moe_layers(model), moe_layers(whole), strict=True):
        assert sorted(expert for group in change.groups for expert in group) == list(range(16))
        assert len(change.groups) == layer.weights.n_experts == 13
        for name, w in layer.weights.named_parameters():
            old = before.weights.get_parameter(name)
            for expert, group in enumerate(change.groups):
                shares = torch.tensor(change.counts_E[list(group)], dtype=torch.float32)
                shares = shares / shares.sum() if shares.any() else torch.full_like(shares, 1 / len(group))
                mean = torch.einsum("g,g...->...", shares, old[list(group)])
                n_merged += len(group) > 1
                assert torch.equal(w[expert], old[group[0]]) if len(group) == 1 else torch.allclose(w[expert], mean)
    assert n_merged


def test_only_the_coldest_are_quantised() -> None:
    """Those with the fewest slots, as the op says; everything else is the checkpoint's."""
    cfg = checkpoint(
        "model.quantize_experts.format=int4", "model.quantize_experts.coldest=6", "model.quantize_experts.group_size=64"
    )
    model, whole = build.build_model(cfg, CPU), build.build_model(trained.unchanged(cfg), CPU)
    for change, layer, before in zip(changes_of(model).layers, moe_layers(model), moe_layers(whole), strict=True):
        cold = list(change.quantized)
        assert len(cold) == 6 and change.counts_E[cold].max() <= np.delete(change.counts_E, cold).min()
        for name in ("w_gate_up_E2FD", "w_down_EDF"):
            old, new = before.weights.get_parameter(name), layer.weights.get_parameter(name)
            for expert in range(16):
                wanted = fake_quantize(old[expert], "int4", 64) if expert in cold else old[expert]
                assert torch.equal(new[expert], wanted)
        assert torch.equal(layer.weights.gate_ED, before.weights.gate_ED)
    assert torch.equal(model.get_parameter("head.weight"), whole.get_parameter("head.weight"))


def test_a_gate_is_quantised_or_noisy_and_nothing_else_changes() -> None:
    """The noise is as large as asked for, another in each layer and for another seed, and the same once more."""
    whole = moe_layers(build.build_model(checkpoint(), CPU))
    int8 = moe_layers(build.build_model(checkpoint("model.quantize_gate.format=int8"), CPU))
    for before, after in zip(whole, int8, strict=True):
        assert torch.equal(after.weights.gate_ED, fake_quantize(before.weights.gate_ED, "int8", 32))
        assert torch.equal(after.weights.w_down_EDF, before.weights.w_down_EDF)
    noise = []
    for seed in (0, 0, 1):
        layers = moe_layers(build.build_model(checkpoint("model.quantize_gate.noise=0.1", f"seed={seed}"), CPU))
        pairs = zip(layers, whole, strict=True)
        noise.append([(after.weights.gate_ED - before.weights.gate_ED) for after, before in pairs])
        for of, before in zip(noise[-1], whole, strict=True):
            relative = of.square().mean().sqrt() / before.weights.gate_ED.square().mean().sqrt()
            assert relative.item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(noise[0][0], noise[1][0])
    assert not torch.allclose(noise[0][0], noise[2][0], atol=1e-3)
    a, b = (of / of.norm() for of in noise[0][:2])
    assert abs(float((a * b).sum())) < 0.1


ALL = ("model.prune.experts=2", "model.quantize_experts.format=int8", "model.quantize_gate.format=fp8")
PHASES: dict[str, tuple[str, ...]] = {
    "forward": (),
    "prefill": ("workload.phase=prefill",),
    "decode": ("workload.phase=decode", "workload.context_len=9", "seq_len=3"),
}


@pytest.mark.parametrize(
    "phase", [pytest.param(p, id=p, marks=() if p == "decode" else pytest.mark.slow) for p in PHASES]
)
def test_a_changed_checkpoint_runs_verified(phase: str, tmp_path: Path) -> None:
    """In bf16, with pruning and both quantisations; the record has what was changed."""
    record = moe_lab.run(checkpoint(*ALL, *PHASES[phase], "dtype=bf16"), tmp_path)
    assert (record.status, record.reason) == ("ok", None)
    assert record.check is not None and record.check.passed
    assert not any("was not measured" in text for text in record.warnings)
    changes = record.weight_changes
    assert changes is not None and record.memory is not None and record.routing is not None
    assert (changes["experts_before"], changes["experts"], changes["quantized_experts"]) == (16, 14, 14)
    assert changes["calibration_texts"] == "pydoc" and changes["calibration_router"] == "native"
    assert changes["stored_mb"] < record.memory["parameters_mb"]
    # int8 in groups of 32: 34 bytes for 64 of bf16.
    assert changes["stored_expert_mb"] == pytest.approx(record.routing["pooled"]["expert_mb"] * 34 / 64)
    assert any("fake-quantised" in text for text in record.warnings)


ROUTERS: dict[str, tuple[str, ...]] = {
    "expert_choice": ("decoder_moe",),
    "soft": ("decoder_moe",),
    "capacity": ("decoder_moe",),
    "loss_free": ("decoder_moe", "workload.phase=decode", "workload.context_len=4"),
    "xshare": ("decoder_moe", "model.n_dense_layers=1", "workload.phase=prefill"),
    "sinkhorn": ("moe_layer",),
    "top_p": ("moe_layer", "experts=loop"),
    "mixtral": ("moe_layer", "workload.load=zipf"),
}


@pytest.mark.parametrize(
    "router",
    [pytest.param(r, id=r, marks=() if r in ("expert_choice", "top_p") else pytest.mark.slow) for r in ROUTERS],
)
def test_random_models_are_changed_by_random_tokens(router: str, tmp_path: Path) -> None:
    """With routers of every kind: verified, with fewer experts."""
    model, *more = ROUTERS[router]
    prune = ("model.prune.experts=2", "model.prune.by=weight", "model.calibration.tokens=64")
    quantize = ("model.quantize_experts.format=fp8", "model.quantize_experts.group_size=8")
    record = moe_lab.run(quick.compose(model, f"router={router}", *prune, *quantize, *more), tmp_path)
    assert (record.status, record.reason) == ("ok", None)
    assert record.check is not None and record.check.passed
    assert record.weight_changes is not None
    assert (record.weight_changes["experts"], record.weight_changes["calibration_texts"]) == (3, "random")
    assert not any("was not measured" in text for text in record.warnings)


@pytest.mark.slow
def test_quality_is_that_of_the_changed_weights_beside_the_unchanged_model(tmp_path: Path) -> None:
    """The native bits are the checkpoint's own, whatever was changed and whichever router runs."""
    whole = moe_lab.run(checkpoint(), tmp_path / "whole")
    noisy = moe_lab.run(checkpoint("model.quantize_gate.noise=1"), tmp_path / "noisy")
    fewer = moe_lab.run(checkpoint("model.prune.experts=8", "router=qwen3_moe"), tmp_path / "fewer")
    for record in (noisy, fewer):
        assert whole.quality is not None and record.quality is not None
        assert record.quality["native_bits_per_byte"] == pytest.approx(whole.quality["bits_per_byte"], rel=1e-5)
        assert record.quality["bits_per_byte"] != whole.quality["bits_per_byte"]
        assert record.quality["kl_to_native"] > 0.001
    assert whole.weight_changes is None
    assert noisy.weight_changes is not None and noisy.weight_changes["gate_flips"] > 0.1
    assert fewer.weight_changes is not None and "gate_flips" not in fewer.weight_changes


@pytest.mark.slow
def test_a_trained_bias_goes_with_its_expert(tmp_path: Path) -> None:
    """GLM's router has a selection bias in its files; also inside another router, and where weights are shared."""
    folder = checkpoints.checkpoint("glm4_moe", tmp_path / "glm", n_group=1, topk_group=1, vocab_size=256)
    of = (f"model.path={folder}", "model.prune.experts=2", "model.calibration.tokens=128", "workload=random")
    text = f"model.calibration.path={PYDOC}"
    native = moe_lab.compose(["model=checkpoint", *of, text, "router=native", "batch=2", "seq_len=5", "device=cpu"])
    inner = moe_lab.compose(
        ["model=checkpoint", *of, text, "router=capacity", "router@router.inner=native", "seq_len=5", "device=cpu"]
    )
    whole, model = build.build_model(trained.unchanged(native), CPU), build.build_model(native, CPU)
    shared = build.build_model(inner, CPU, shareable(model))
    for before, after, other, ids in zip(*map(moe_layers, (whole, model, shared)), left(model), strict=True):
        wanted = before.router.bias_E[ids]  # type: ignore[index]
        assert len(ids) == 4 and wanted.any()
        assert torch.equal(after.router.bias_E, wanted)  # type: ignore[arg-type]
        assert torch.equal(other.router.inner.bias_E, wanted)  # type: ignore[union-attr, arg-type]
    record = moe_lab.run(native, tmp_path / "run")
    assert record.status == "ok" and record.check is not None and record.check.passed


@pytest.mark.parametrize(
    ("more", "text"),
    [
        pytest.param(["model.prune.experts=15"], "model.prune.experts=15: leaves 1 of 16 .* at most 14", id="too_many"),
        pytest.param(["model.merge.experts=16"], "model.merge.experts=16: leaves 0 of 16", id="merged_too_many"),
        pytest.param(
            ["model.prune.experts=13", "router.top_k=4"], "leaves 3 of 16 .* uses 4; .* at most 12", id="own_top_k"
        ),
        pytest.param(
            ["model.quantize_experts.format=int4", "model.quantize_experts.coldest=17"],
            r"coldest=17: must be <= 16",
            id="coldest",
        ),
        pytest.param(
            ["model.quantize_experts.format=int4", "model.quantize_experts.group_size=48"],
            "quantize_experts.group_size=48: must divide 128",
            id="group_size",
        ),
        pytest.param(
            ["model.quantize_gate.format=int4", "model.quantize_gate.group_size=48"],
            "quantize_gate.group_size=48: must divide 128",
            id="group_size_of_the_gate",
        ),
        pytest.param(
            ["model.prune.experts=4", "router=deepseek_v3", "router.n_groups=4"],
            "model.prune: .* 4 groups of neighbouring experts",
            id="groups",
        ),
    ],
)
def test_what_cannot_be_changed_is_told_without_building(more: list[str], text: str) -> None:
    """`check_available` is what `moe-lab plan` asks; a run says the same."""
    with pytest.raises(ValueError, match=text):
        build.check_available(checkpoint(*more))
    with pytest.raises(ValueError, match=text):
        build.build_model(checkpoint(*more), CPU)


def test_sizes_are_those_of_what_is_left() -> None:
    """Nothing is allocated to know them."""
    whole, fewer = build.parameters_of(checkpoint()), build.parameters_of(checkpoint("model.prune.experts=4"))
    assert whole - fewer == 4 * 4 * (3 * 128 * 128 + 128) * 4  # layers, experts, numbers, bytes


@pytest.mark.slow
def test_weights_are_shared_between_cells_with_equal_keys_alone(tmp_path: Path) -> None:
    """Another router has the changed tensors and knows how they were changed; another change has its own."""
    bench, found = Bench(), {}
    for name, more in {
        "one": ["model.prune.experts=4"],
        "same": ["model.prune.experts=4", "router=qwen3_moe", "batch=1"],
        "more": ["model.prune.experts=4", "model.quantize_experts.format=int8"],
        "whole": [],
    }.items():
        cfg = checkpoint(*more)
        bench.build(plain(cfg), str(tmp_path / name))
        model = bench._runs[cell_id(cfg)].made().model
        found[name] = {key: tensor.data_ptr() for key, tensor in shareable(model).items()}, model
    assert found["one"][0] == found["same"][0]
    assert changes_of(found["same"][1]) is changes_of(found["one"][1])
    assert not set(found["one"][0].values()) & set(found["more"][0].values())
    assert not set(found["one"][0].values()) & set(found["whole"][0].values())


def test_a_donor_of_other_weights_is_refused() -> None:
    """Whatever the names of its parameters."""
    whole = build.build_model(checkpoint(), CPU)
    with pytest.raises(AssertionError, match="a donor has the weights"):
        build.build_model(checkpoint("model.quantize_gate.noise=0.1"), CPU, shareable(whole))
