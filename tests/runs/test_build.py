"""runs/build.py: models that share a donor's parameters, routers, and what can run here without being built.

A checkpoint's own router, and that no other model has one (routers/native.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import moe_lab
from moe_lab.errors import UnavailableError
from moe_lab.experts.loop import Loop
from moe_lab.measure import memory
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.moe_layer import MoELayer
from moe_lab.models.parameters import shareable
from moe_lab.models.serving import Decode, Prefill
from moe_lab.models.transformer_decoder import TransformerDecoder
from moe_lab.routers.balancing_bias import BalancingBias
from moe_lab.routers.base import Router, Routing
from moe_lab.routers.capacity import Capacity
from moe_lab.routers.sinkhorn import Sinkhorn
from moe_lab.routers.softmax_topk import SoftmaxTopK
from moe_lab.runs import build
from moe_lab.runs.passes import n_positions
from tests import quick, tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [pytest.param(tied, id=f"tied-{tied}") for tied in ("true", "false")])
@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=dtype) for dtype in ("fp32", "bf16")])
def test_a_model_with_a_donor_computes_what_it_computes_alone(dtype: str, tied: str) -> None:
    """On the donor's very memory, in inference mode, bit for bit."""
    more = (f"model.tie_embeddings={tied}", f"dtype={dtype}", "seed=3")
    donor = build.build_model(tiny.decoder_moe(*more), CPU)
    cfg = tiny.decoder_moe(*more, "router=sinkhorn", "experts=loop")
    parameters = dict(donor.named_parameters())
    model, alone = build.build_model(cfg, CPU, parameters), build.build_model(cfg, CPU)
    x = build.build_input(cfg, alone, CPU)
    assert torch.equal(model(x).y, alone(x).y)
    assert not model.training
    found = dict(model.named_parameters())
    assert found.keys() == parameters.keys()
    assert all(found[name].data_ptr() == values.data_ptr() for name, values in parameters.items())
    assert not any(values.requires_grad for values in found.values())
    assert (model.head.weight is model.embed.weight) == (tied == "true")


@pytest.mark.slow
def test_a_model_with_a_donor_takes_no_memory_for_its_parameters() -> None:
    """Sweeps hold many variants of one model."""
    if memory.resident_peak_bytes() is None:
        pytest.skip("this kernel does not tell a process's memory")
    code = (
        "import torch, moe_lab; from moe_lab.runs import build; from moe_lab.measure import memory\n"
        "cfg = moe_lab.compose(['model=minimal', 'model.hidden=8000', 'device=cpu'])\n"
        "donor = dict(build.build_model(cfg).named_parameters())\n"
        "before = memory.resident_peak_bytes()\n"
        "models = [build.build_model(cfg, None, donor) for _ in range(3)]\n"
        "print(memory.resident_peak_bytes() - before, sum(p.nbytes for p in donor.values()))"
    )
    taken, parameters = map(int, tiny.python(code).split())
    assert parameters > 200e6
    assert taken < 0.1 * parameters


@pytest.mark.parametrize(
    ("more", "is_equal"),
    [
        pytest.param(["router=sinkhorn"], True, id="router"),
        pytest.param(["experts=loop"], True, id="experts"),
        pytest.param(["execution=compile"], True, id="execution"),
        pytest.param(["batch=5", "seq_len=3"], True, id="input"),
        pytest.param(["name=x", "measure.max_time_s=9"], True, id="labels"),
        pytest.param(["model.top_k=[1,2]"], True, id="top_k"),
        pytest.param(["model.attention=math"], True, id="attention"),
        pytest.param(["seed=1"], False, id="seed"),
        pytest.param(["dtype=bf16"], False, id="dtype"),
        pytest.param(["model.n_layers=3"], False, id="layers"),
        pytest.param(["model.mlp_hidden_dim=32"], False, id="width"),
        pytest.param(["model.tie_embeddings=true"], False, id="tied"),
    ],
)
def test_keys_are_equal_where_the_parameters_are(more: list[str], is_equal: bool) -> None:
    """And parameters of equal keys are equal."""
    one, other = tiny.decoder_moe(), tiny.decoder_moe(*more)
    assert (build.weights_key(one, CPU) == build.weights_key(other, CPU)) == is_equal
    a, b = (dict(build.build_model(cfg, CPU).named_parameters()) for cfg in (one, other))
    assert (a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)) == is_equal


def test_the_device_is_part_of_the_key() -> None:
    """Tensors are not shared across devices."""
    cfg = tiny.decoder_moe()
    assert build.weights_key(cfg, CPU) != build.weights_key(cfg, torch.device("cuda", 0))


@pytest.mark.parametrize("model", [pytest.param(name, id=name) for name in quick.MODELS])
def test_what_can_run_is_available(model: str) -> None:
    """The device comes back; the default dtype and the random state are as before."""
    state = torch.random.get_rng_state()
    assert build.check_available(tiny.compose(model, "dtype=bf16"))[0] == CPU
    assert torch.equal(torch.random.get_rng_state(), state)


def test_looking_takes_no_memory() -> None:
    """A model of 2.5 TB is looked at; whether there is room for it is another question."""
    cfg = moe_lab.compose(["model=minimal", "model.hidden=800000", "device=cpu"])
    assert build.check_available(cfg)[0] == CPU


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    ("more", "error", "text"),
    [
        pytest.param(["dtype=fp16"], UnavailableError, "dtype=fp16", id="dtype"),
        pytest.param(["execution=cuda_graph"], UnavailableError, "execution=cuda_graph", id="execution"),
        pytest.param(["measure.cache=hot"], UnavailableError, "needs a CUDA graph; use execution=cuda_graph", id="hot"),
        pytest.param(["measure.cache=cold"], UnavailableError, "use device=cuda", id="cold"),
        pytest.param(["router=cuda_ext"], UnavailableError, "router.impl=cuda_ext", id="router"),
        pytest.param(
            ["router=hash"], UnavailableError, "router=hash needs token ids, but model=moe_layer", id="token-ids"
        ),
        pytest.param(
            ["router=top_p", "workload.load=zipf"], UnavailableError, "workload.load=zipf.*router=top_p", id="load"
        ),
        pytest.param(
            ["router=soft", "workload.load=balanced"],
            UnavailableError,
            "workload.load=balanced cannot be used with router=soft",
            id="soft-load",
        ),
        pytest.param(
            ["router=capacity", "router@router.inner=soft"], ValueError, "no capacity to limit", id="soft-capacity"
        ),
        pytest.param(["experts=loop", "execution=compile"], UnavailableError, "experts=loop", id="not-capturable"),
    ],
)
def test_what_cannot_run_names_its_key(more: list[str], error: type[Exception], text: str) -> None:
    """As building it would, and in the same words."""
    cfg = tiny.moe_layer(*more)
    with pytest.raises(error, match=text) as looked:
        build.check_available(cfg)
    with pytest.raises(error) as built:
        tiny.built(cfg)
    assert str(looked.value) == str(built.value)


def test_a_key_that_a_part_refuses_is_a_value_error(tmp_path: Path) -> None:
    """A sweep calls it impossible."""
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "strict.yaml").write_text("_target_: strict_router.Strict\nname: strict\nlevel: 7\n")
    (tmp_path / "strict_router.py").write_text(
        "from moe_lab.routers.softmax_topk import SoftmaxTopK\n"
        "class Strict(SoftmaxTopK):\n"
        "    def __init__(self, n_experts, top_k, level):\n"
        "        raise ValueError(f'router.level={level}: it must be below 7.')\n"
    )
    cfg = moe_lab.compose(quick.overrides("moe_layer", "router=strict"), config_dir=tmp_path)
    with pytest.raises(ValueError, match=r"router\.level=7"):
        build.check_available(cfg)


def test_a_property_that_is_neither_true_nor_false_is_refused(tmp_path: Path) -> None:
    """Before anything is computed."""
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "vague.yaml").write_text("_target_: vague_router.Vague\nname: vague\nimpl: auto\n")
    (tmp_path / "vague_router.py").write_text(
        "from moe_lab.routers.base import Router\nclass Vague(Router):\n    causal = 'no'\n"
    )
    cfg = moe_lab.compose(quick.overrides("moe_layer", "router=vague"), config_dir=tmp_path)
    with pytest.raises(ValueError, match=r"^router: Vague\.causal='no': must be True, False or None"):
        build.check_available(cfg)


def test_a_model_that_makes_its_layers_itself_is_refused_a_layer_of_the_routers_own(tmp_path: Path) -> None:
    """Every token would go to every expert, under the name of a Soft MoE."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: my_model.Mine\nname: mine\nn_experts: 3\ntop_k: 1\n")
    (tmp_path / "my_model.py").write_text(
        "from moe_lab.experts.weights import ExpertWeights\n"
        "from moe_lab.models.moe_layer import MoELayer\n"
        "class Mine(MoELayer):\n"
        "    vocab_size = None\n"
        "    def __init__(self, make_router, experts, n_experts, top_k):\n"
        "        super().__init__(ExpertWeights(n_experts, 8, 4), make_router(n_experts, top_k), experts)\n"
    )
    build.check_available(moe_lab.compose(["model=mine", "device=cpu"], config_dir=tmp_path))
    cfg = moe_lab.compose(["model=mine", "router=soft", "device=cpu"], config_dir=tmp_path)
    with pytest.raises(ValueError, match=r"router=soft.*model=mine.*make_moe_layer"):
        build.check_available(cfg)


def routers_of(model: torch.nn.Module) -> list[Router]:
    return [layer.router for layer in model.modules() if isinstance(layer, MoELayer)]


@pytest.mark.parametrize("router", [pytest.param(name, id=name) for name in ("loss_free", "quantile")])
def test_a_router_is_fitted_as_the_model_is_built(router: str) -> None:
    """On tokens of its own, layer by layer: the same every time, other ones for another seed or workload."""
    cfg = tiny.decoder_moe(f"router={router}")
    biases = [r.bias_E for r in routers_of(build.build_model(cfg, CPU)) if isinstance(r, BalancingBias)]
    assert len(biases) == 2 and all(float(bias_E.abs().max()) > 0 for bias_E in biases)
    again = [r.bias_E for r in routers_of(build.build_model(cfg, CPU)) if isinstance(r, BalancingBias)]
    assert all(torch.equal(a, b) for a, b in zip(biases, again, strict=True))
    fewer = tiny.decoder_moe(f"router={router}", "router.calibration_tokens=64")
    other = [r.bias_E for r in routers_of(build.build_model(fewer, CPU)) if isinstance(r, BalancingBias)]
    assert not torch.equal(biases[0], other[0])


def test_a_fitted_router_has_a_more_even_load_on_the_runs_own_tokens() -> None:
    """Which are not those that it was fitted on."""
    found = {}
    for router in ("torch", "quantile"):
        cfg = tiny.decoder_moe(f"router={router}", "batch=16", "seq_len=64")
        model = build.build_model(cfg, CPU)
        routing = model(build.build_input(cfg, model, CPU)).routings[0]
        counts_E = routing.expert_ids_TK.flatten().bincount()
        found[router] = float(counts_E.max() / counts_E.float().mean())
    assert found["quantile"] < found["torch"]


def test_a_router_may_fix_its_own_k_and_wrap_another() -> None:
    """router.top_k goes before the model's; router@router.inner chooses what has a capacity."""
    assert build.build_router(tiny.decoder_moe("router=switch")).top_k == 1
    assert build.build_router(tiny.decoder_moe("router=torch", "router.top_k=3")).top_k == 3
    capacity = build.build_router(tiny.decoder_moe("router=capacity", "router@router.inner=sinkhorn"))
    assert isinstance(capacity, Capacity)
    assert isinstance(capacity.inner, Sinkhorn)
    assert capacity.inner.top_k == 2


def test_a_wrapped_router_is_fitted_on_the_tokens_that_it_asks_for() -> None:
    """router.inner.calibration_tokens, as router.calibration_tokens of the router alone."""
    biases = []
    for more in ((), ("router.inner.calibration_tokens=64",)):
        cfg = tiny.decoder_moe("router=capacity", "router@router.inner=quantile", *more)
        (router, _) = routers_of(build.build_model(cfg, CPU))
        assert isinstance(router, Capacity) and isinstance(router.inner, BalancingBias)
        biases.append(router.inner.bias_E)
    assert float(biases[0].abs().max()) > 0
    assert not torch.equal(*biases)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint(*more: str) -> DictConfig:
    return tiny.compose("checkpoint", *more)


@pytest.fixture(scope="module")
def native() -> Checkpoint:
    """The repository's checkpoint with its own router."""
    model = build.build_model(checkpoint(), CPU)
    assert isinstance(model, Checkpoint)
    return model


def text_of(cfg: DictConfig, model: nn.Module) -> Tensor:
    return build.build_input(cfg, model, CPU)


def same_routes(one: Routing, other: Routing) -> bool:
    return all(torch.equal(*pair) for pair in zip(one[:2], other[:2], strict=True))


def test_a_checkpoint_has_the_router_that_its_configuration_says() -> None:
    """Its number of experts and slots; its weights add up to less than 1 (norm_topk_prob is false)."""
    router = build.build_router(checkpoint())
    assert (router.n_experts, router.top_k) == (16, 2)
    assert isinstance(router, SoftmaxTopK) and router.renormalize is False
    assert float(router.select(torch.zeros(3, 16)).weights_TK.sum(-1).max()) == pytest.approx(2 / 16)
    assert build.build_router(checkpoint("router=sinkhorn", "router.top_k=3")).top_k == 3
    assert build.build_router(checkpoint(), n_experts=7, top_k=1).n_experts == 7
    assert build.build_router(checkpoint("model.top_k=1")).top_k == 1
    by_layer = checkpoint("model.top_k=[2,1,1,2]")
    with pytest.raises(ValueError, match=r"model.top_k=\[2, 1, 1, 2\].*pass top_k"):
        build.build_router(by_layer)
    assert build.build_router(by_layer, top_k=1).top_k == 1


def test_without_a_checkpoint_there_is_no_native_router() -> None:
    """Alone, inside a capacity, and without being built."""
    for more in (["router=native"], ["router=capacity", "router@router.inner=native"]):
        cfg = tiny.decoder_moe(*more)
        for act in (build.build_router, build.build_model, build.check_available):
            with pytest.raises(ValueError, match="router=native: only for model=checkpoint"):
                act(cfg)


def test_native_routes_are_those_of_the_architecture_by_name(native: Checkpoint) -> None:
    """router=native of an OLMoE is router=olmoe; Mixtral's would weigh them otherwise."""
    x = text_of(checkpoint(), native)
    olmoe, mixtral = (build.build_model(checkpoint(f"router={name}"), CPU)(x) for name in ("olmoe", "mixtral"))
    own = native(x)
    assert torch.equal(olmoe.y, own.y) and all(map(same_routes, olmoe.routings, own.routings))
    assert torch.equal(mixtral.routings[0].expert_ids_TK, own.routings[0].expert_ids_TK)
    assert not torch.equal(mixtral.y, own.y)


def test_a_native_router_may_have_other_slots_and_a_capacity(native: Checkpoint) -> None:
    """router.top_k, and room for all or for few; the weights are those of the probabilities all the same."""
    x = text_of(checkpoint(), native)
    own = native(x)
    three = build.build_model(checkpoint("router.top_k=3"), CPU)(x)
    assert three.routings[0].expert_ids_TK.shape[1] == 3
    assert torch.equal(three.routings[0].weights_TK[:, :2], own.routings[0].weights_TK)
    inner = ("router=capacity", "router@router.inner=native")
    roomy = build.build_model(checkpoint(*inner, "router.factor=16"), CPU)(x)
    assert torch.equal(roomy.y, own.y)
    tight = build.build_model(checkpoint(*inner, "router.factor=0.5"), CPU)(x)
    assert int((tight.routings[0].expert_ids_TK < 0).sum()) > 0


@pytest.mark.parametrize(
    "router", [pytest.param(r, id=r) for r in ("sinkhorn", "deepseek_v3", "loss_free", "capacity", "soft")]
)
@pytest.mark.slow
def test_routers_of_a_checkpoint_share_its_weights_and_read_no_file(
    router: str, native: Checkpoint, tmp_path: Path
) -> None:
    """Given those of another router, the files may be gone; what comes out is what comes out alone."""
    donor = shareable(native)
    alone = build.build_model(checkpoint(f"router={router}"), CPU)
    (tmp_path / "config.json").write_text((quick.TINY_OLMOE / "config.json").read_text())
    cfg = checkpoint(f"router={router}", f"model.path={tmp_path}")
    model = build.build_model(cfg, CPU, donor)
    found = dict(model.named_parameters())
    assert donor.keys() <= found.keys()
    assert all(found[name].data_ptr() == values.data_ptr() for name, values in donor.items())
    x = text_of(cfg, model)
    assert torch.equal(model(x).y, alone(x).y)
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        build.build_model(cfg, CPU)


def test_the_native_router_takes_the_weights_of_another(native: Checkpoint) -> None:
    """Whichever was built first; what is the other router's own is not taken."""
    other = build.build_model(checkpoint("router=deepseek_v3"), CPU)
    donor = shareable(other)
    assert not any("router" in name for name in donor)
    assert any("router.bias_E" in name for name, _ in other.named_parameters())
    model = build.build_model(checkpoint(), CPU, donor)
    assert {name for name, _ in model.named_parameters()} == donor.keys()
    x = text_of(checkpoint(), native)
    assert torch.equal(model(x).y, native(x).y)


def test_the_seed_and_the_router_are_not_in_a_checkpoints_weights(native: Checkpoint) -> None:
    """They are what they were trained to; the key tells folders and dtypes apart."""
    for values, other in zip(
        native.parameters(), build.build_model(checkpoint("seed=5"), CPU).parameters(), strict=True
    ):
        assert torch.equal(values, other)
    key = build.weights_key(checkpoint(), CPU)
    assert build.weights_key(checkpoint("router=sinkhorn", "batch=1"), CPU) == key
    assert build.weights_key(checkpoint("dtype=bf16"), CPU) != key
    assert build.weights_key(checkpoint("model.path=elsewhere"), CPU) != key


@pytest.mark.slow
def test_what_is_not_trained_is_0_and_named(native: Checkpoint) -> None:
    """DeepSeek's selection bias; not what is fitted, and nothing of a router without parameters."""
    for router, untrained in (
        (["router=deepseek_v3"], ["bias_E"]),
        (["router=capacity", "router@router.inner=deepseek_v3"], ["inner.bias_E"]),
        (["router=loss_free"], []),
        (["router=sinkhorn"], []),
    ):
        model = build.build_model(checkpoint(*router), CPU)
        assert isinstance(model, Checkpoint) and model.untrained() == untrained
        own = [values for name, values in model.named_parameters() if name.endswith("bias_E")]
        assert len(own) == (4 if untrained else 0)
        assert not any(values.any() for values in own)
    assert native.untrained() == []


@pytest.mark.slow
def test_a_router_is_fitted_to_the_text(native: Checkpoint, tmp_path: Path) -> None:
    """The same every time, other biases on another text; afterwards the load is more even on the run's own tokens."""
    cfg = checkpoint("router=loss_free", "batch=8", "seq_len=64", "router.calibration_tokens=2048")

    def biases(cfg: DictConfig) -> list[Tensor]:
        return [r.bias_E for r in routers_of(build.build_model(cfg, CPU)) if isinstance(r, BalancingBias)]

    fitted = biases(cfg)
    assert len(fitted) == 4 and all(map(torch.equal, fitted, biases(cfg)))
    other = biases(checkpoint(*cfg.overrides, f"workload.path={quick.TEXTS}/roff.txt"))
    assert not any(map(torch.equal, fitted, other))
    model, x = build.build_model(cfg, CPU), text_of(cfg, native)
    largest = [
        max(int(routing.expert_ids_TK.flatten().bincount(minlength=16).max()) for routing in one(x).routings)
        for one in (model, native)
    ]
    assert largest[0] < 0.8 * largest[1]


def test_too_little_text_to_fit_a_router_names_both_mends(tmp_path: Path) -> None:
    """More text, or fewer tokens to fit to."""
    (tmp_path / "short.txt").write_text("x" * 100)
    cfg = checkpoint("router=loss_free", f"workload.path={tmp_path}")
    with pytest.raises(
        ValueError, match=r"6 windows of seq_len=\d+ tokens, but 256 are needed; lower .*router\.calibration_tokens"
    ):
        build.build_model(cfg, CPU)


# --- phases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "longest", "allowed"),
    [
        pytest.param(["seq_len=1024"], 1024, True, id="forward-full"),
        pytest.param(["seq_len=1025"], 1025, False, id="forward-longer"),
        pytest.param(["workload.phase=prefill", "seq_len=1025"], 1025, False, id="prefill-longer"),
        pytest.param(
            ["workload.phase=decode", "workload.context_len=1000", "seq_len=24"], 1024, True, id="decode-full"
        ),
        pytest.param(
            ["workload.phase=decode", "workload.context_len=1000", "seq_len=25"], 1025, False, id="decode-longer"
        ),
    ],
)
def test_a_sequence_is_no_longer_than_a_checkpoint_is_made_for(
    more: list[str], longest: int, allowed: bool, native: Checkpoint
) -> None:
    """In decode the context counts too; the message names what to lower."""
    cfg = checkpoint("batch=1", *more)
    assert n_positions(cfg) == longest
    if allowed:
        assert build.build_input(cfg, native, CPU).shape == (1, longest)
        return
    with pytest.raises(ValueError, match=rf"^seq_len={cfg.seq_len}: .*{longest} tokens.* 1024; lower seq_len"):
        build.build_input(cfg, native, CPU)


def test_a_model_without_a_longest_sequence_takes_any() -> None:
    """Its positions are computed, not learnt."""
    cfg = tiny.decoder_moe("seq_len=3000", "batch=1")
    assert build.build_input(cfg, build.build_model(cfg, CPU), CPU).shape == (1, 3000)


@pytest.mark.parametrize("model", [pytest.param(name, id=name) for name in ("decoder_moe", "transformer_decoder")])
def test_the_task_is_the_phase(model: str) -> None:
    """The model itself in forward; a prefill or a decode with a cache as long as the sequence gets."""
    for phase, more, kind, length in (
        ("forward", [], TransformerDecoder, 7),
        ("prefill", [], Prefill, 7),
        ("decode", ["workload.context_len=4"], Decode, 11),
    ):
        cfg = tiny.compose(model, f"workload.phase={phase}", *more)
        decoder = build.build_model(cfg, CPU)
        x = build.build_input(cfg, decoder, CPU)
        task, context = build.build_task(cfg, decoder, x)
        assert isinstance(task, kind) and x.shape == (2, length)
        assert decoder.ropes[0].tables_2Nd is not None and decoder.ropes[0].tables_2Nd.shape[1] == length
        assert (context is not None) == (phase == "decode")
        if isinstance(task, Prefill | Decode):
            assert task.cache.length == length
        if isinstance(task, Decode):
            assert (task.context_len, task.n_steps, int(task.position_g)) == (4, 7, 4)
            assert [len(routing.expert_ids_TK) for routing in context or ()] == [8] * (2 if "moe" in model else 0)


@pytest.mark.parametrize("phase", [pytest.param(phase, id=phase) for phase in ("prefill", "decode")])
@pytest.mark.parametrize("model", [pytest.param(model, id=model) for model in ("minimal", "moe_layer")])
def test_a_model_without_a_cache_has_no_phases(model: str, phase: str) -> None:
    """The message says which have."""
    cfg = tiny.compose(model, f"workload.phase={phase}")
    wanted = f"workload.phase={phase} needs a model with a KV cache, which model={model} does not have; use "
    for act in (build.check_available, tiny.built):
        with pytest.raises(UnavailableError, match=wanted):
            act(cfg)


def test_soft_moe_prefills_and_does_not_decode() -> None:
    """A step has one token of a sequence to mix."""
    assert build.check_available(tiny.decoder_moe("router=soft", "workload.phase=prefill"))[0] == CPU
    with pytest.raises(UnavailableError, match=r"router=soft mixes .*use workload\.phase=forward or prefill"):
        build.check_available(tiny.decoder_moe("router=soft", "workload.phase=decode"))


def test_soft_moe_is_not_prefilled_in_chunks() -> None:
    """A chunk has only some of the tokens to mix; one that holds all is the whole."""
    prefill = ("router=soft", "workload.phase=prefill", "seq_len=7")
    assert build.check_available(tiny.decoder_moe(*prefill, "workload.prefill_chunk=7"))[0] == CPU
    with pytest.raises(UnavailableError, match=r"router=soft mixes all .*use workload\.prefill_chunk=null or another"):
        build.check_available(tiny.decoder_moe(*prefill, "workload.prefill_chunk=6"))


def refuse_fp32(experts: Loop, x_TD: Tensor, weights: nn.Module) -> dict[str, str]:
    if x_TD.dtype == torch.float32:
        raise UnavailableError("computes bfloat16 only")
    return {"experts": "loop"}


def test_experts_that_do_not_compute_the_dtype_are_unavailable_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a plan and when built, with their name; another dtype runs."""
    monkeypatch.setattr(Loop, "implementation", refuse_fp32)
    for look in (build.check_available, tiny.built):
        with pytest.raises(UnavailableError, match=r"^experts=loop: computes bfloat16 only$"):
            look(tiny.moe_layer("experts=loop"))
        look(tiny.moe_layer("experts=loop", "dtype=bf16"))
