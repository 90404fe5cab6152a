"""build.py: models that share a donor's parameters, and what can run here without being built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moe_lab
from moe_lab import build
from moe_lab.errors import UnavailableError
from moe_lab.measure import memory
from moe_lab.models.moe_layer import MoELayer
from moe_lab.routers.balancing_bias import BalancingBias
from moe_lab.routers.base import Router
from moe_lab.routers.capacity import Capacity
from moe_lab.routers.sinkhorn import Sinkhorn
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


def test_a_model_with_a_donor_takes_no_memory_for_its_parameters() -> None:
    """Sweeps hold many variants of one model."""
    if memory.resident_peak_bytes() is None:
        pytest.skip("this kernel does not tell a process's memory")
    code = (
        "import torch, moe_lab; from moe_lab import build; from moe_lab.measure import memory\n"
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
    assert build.check_available(tiny.compose(model, "dtype=bf16")) == CPU
    assert torch.equal(torch.random.get_rng_state(), state)


def test_looking_takes_no_memory() -> None:
    """A model of 2.5 TB is looked at; whether there is room for it is another question."""
    cfg = moe_lab.compose(["model=minimal", "model.hidden=800000", "device=cpu"])
    assert build.check_available(cfg) == CPU


@pytest.mark.parametrize(
    ("more", "error", "text"),
    [
        pytest.param(["dtype=fp16"], UnavailableError, "dtype=fp16", id="dtype"),
        pytest.param(["execution=cuda_graph"], UnavailableError, "execution=cuda_graph", id="execution"),
        pytest.param(["router=cuda_ext"], UnavailableError, "router.impl=cuda_ext", id="router"),
        pytest.param(["router=hash"], UnavailableError, "router=hash reads the tokens", id="token-ids"),
        pytest.param(
            ["router=top_p", "workload.load=zipf"], UnavailableError, "workload.load=zipf.*router=top_p", id="load"
        ),
        pytest.param(
            ["router=soft", "workload.load=balanced"],
            UnavailableError,
            "workload.load=balanced.*router=soft.*no choice to replace",
            id="soft-load",
        ),
        pytest.param(["router=capacity", "router@router.inner=soft"], ValueError, "room to limit", id="soft-capacity"),
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


def test_a_forced_load_gives_the_counts_that_were_asked_for() -> None:
    """In every layer; the weights are those of the native pass."""
    cfg = tiny.decoder_moe("workload.load=balanced", "batch=4", "seq_len=25")
    model = build.build_model(cfg, CPU)
    x = build.build_input(cfg, model, CPU)
    forced = build.force_load(cfg, model, x)
    assert forced is not None and len(forced) == 2
    for routing, native in zip(forced, model(x).routings, strict=True):
        counts_E = routing.expert_ids_TK.flatten().bincount(minlength=5)
        assert counts_E.tolist() == [40] * 5
        assert torch.equal(routing.weights_TK, native.weights_TK)
    assert build.load_difference(cfg, model, forced) == pytest.approx(0.0)
    assert build.force_load(tiny.decoder_moe(), model, x) is None
