"""build.py: models that share a donor's parameters, and what can run here without being built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moe_lab
from moe_lab import build
from moe_lab.errors import UnavailableError
from moe_lab.measure import memory
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
        pytest.param(["router=cuda_ext"], UnavailableError, "router=cuda_ext", id="router"),
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
