"""models/parameters.py: parameters from the hash, and the reference twin that shares them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import moe_lab
from moe_lab.experts.loop import Loop
from moe_lab.models.layers import AddRMSNorm, Embedding
from moe_lab.models.moe_layer import MoELayer
from moe_lab.models.parameters import adopt, initialize, parameter_bytes, reference_twin, shared_copy, without_storage
from tests import quick, tiny

DIGESTS = """
import hashlib, json, sys
import torch, moe_lab
model = moe_lab.build_model(moe_lab.compose(sys.argv[1:]))
bytes_of = {name: values.view(torch.uint8).numpy().tobytes() for name, values in model.named_parameters()}
print(json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in bytes_of.items()}))
"""


def parameters(cfg: DictConfig) -> dict[str, Tensor]:
    return dict(moe_lab.build_model(cfg).named_parameters())


def digests(model: nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, values in model.named_parameters()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Odd(nn.Module):
    """A module with a vector that is no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(4096), requires_grad=False)
        self.norm = nn.Parameter(torch.empty(4096), requires_grad=False)


@pytest.mark.parametrize("model", [pytest.param(name, id=name) for name in quick.MODELS])
def test_bf16_parameters_are_the_fp32_ones_rounded(model: str) -> None:
    """One model for every dtype."""
    wide, narrow = (parameters(tiny.compose(model, f"dtype={dtype}")) for dtype in ("fp32", "bf16"))
    assert same({name: values.bfloat16() for name, values in wide.items()}, narrow)
    assert {values.dtype for values in narrow.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_parameters_are_the_same_in_another_process() -> None:
    """Bit for bit, whatever its hash seed: no random generator is involved."""
    overrides = quick.overrides("decoder_moe", "seed=3", "dtype=bf16")
    torch.manual_seed(123)
    mine = digests(moe_lab.build_model(moe_lab.compose(overrides)))
    assert json.loads(tiny.python(DIGESTS, *overrides, env={"PYTHONHASHSEED": "7"})) == mine


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["router=sinkhorn"], id="router"),
        pytest.param(["experts=loop"], id="experts"),
        pytest.param(["device=auto"], id="device"),
        pytest.param(["batch=5", "seq_len=3"], id="input"),
        pytest.param(["model.top_k=1"], id="top_k"),
        pytest.param(["model.implementation=torch"], id="implementation"),
        pytest.param(["execution=compile", "experts=grouped"], id="execution"),
    ],
)
def test_parameters_do_not_depend_on_what_is_compared(overrides: list[str]) -> None:
    """The cells of a group compute the same model."""
    if "device=auto" in overrides and torch.cuda.is_available():
        pytest.skip("auto is CUDA here; see the gpu test")
    assert same(parameters(tiny.decoder_moe()), parameters(tiny.decoder_moe(*overrides)))


def test_another_seed_gives_other_parameters_everywhere() -> None:
    """Each tensor differs, not just some."""
    one, other = parameters(tiny.decoder_moe("seed=0")), parameters(tiny.decoder_moe("seed=1"))
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_no_two_tensors_and_no_two_experts_are_alike() -> None:
    """Layers, projections and experts each have a stream of their own."""
    found = parameters(tiny.decoder_moe())
    rows = {tuple(values.flatten()[:8].tolist()) for values in found.values()}
    assert len(rows) == len(found)
    w_gate_up_E2FD = found["layers.0.mlp.weights.w_gate_up_E2FD"]
    assert len({tuple(expert.flatten()[:8].tolist()) for expert in w_gate_up_E2FD}) == tiny.E


def test_an_experts_weights_do_not_depend_on_how_many_there_are() -> None:
    """Expert e of 3 is expert e of 7, its gate row included: a sweep over n_experts adds experts."""
    few, many = (parameters(tiny.moe_layer(n_experts=n)) for n in (3, 7))
    for name, values in few.items():
        assert torch.equal(values, many[name][:3]), name


def test_deeper_models_begin_with_the_layers_of_shallower_ones() -> None:
    """A layer's parameters depend on its name alone."""
    shallow, deep = (parameters(tiny.decoder_moe(f"model.n_layers={n}")) for n in (1, 3))
    assert all(torch.equal(values, deep[name]) for name, values in shallow.items())


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        pytest.param("layers.0.attention.q.weight", 1 / math.sqrt(128), id="projection"),
        pytest.param("layers.0.mlp.weights.w_gate_up_E2FD", 1 / math.sqrt(128), id="gate_up"),
        pytest.param("layers.0.mlp.weights.w_down_EDF", 1 / math.sqrt(96), id="down"),
        pytest.param("layers.0.mlp.weights.gate_ED", 1 / math.sqrt(128), id="gate"),
        pytest.param("embed.weight", 1.0, id="embedding"),
        pytest.param("head.weight", 1 / math.sqrt(128), id="head"),
    ],
)
def test_standard_deviations_are_as_documented(name: str, deviation: float) -> None:
    """1 / sqrt(in) for matrices, 1 for the embedding, and no value beyond the bound of a uniform distribution."""
    cfg = tiny.decoder_moe(
        "model.d_model=128", "model.mlp_hidden_dim=96", "model.n_experts=32", "model.vocab_size=211", "model.n_layers=1"
    )
    values = parameters(cfg)[name]
    assert float(values.std()) == pytest.approx(deviation, rel=0.03)
    assert abs(float(values.mean())) < 5 * deviation / math.sqrt(values.numel())
    assert 0.98 < float(values.abs().max()) / (deviation * math.sqrt(3)) <= 1 + 1e-6


def test_norms_lie_around_one_and_other_vectors_around_zero() -> None:
    """+-0.1, so that a kernel that forgets one of them is found out."""
    module = Odd()
    initialize(module, seed=0)
    for values, centre in ((module.norm, 1.0), (module.bias, 0.0)):
        assert float((values - centre).abs().max()) <= 0.1 + 1e-6
        assert float((values - centre).abs().max()) > 0.099
        assert float(values.mean()) == pytest.approx(centre, abs=0.005)


def test_every_parameter_is_filled() -> None:
    """None keeps what the memory held: two builds agree although the memory between them was poisoned."""
    cfg = tiny.decoder_moe("model.shared_expert_hidden_dim=8", "model.shared_expert_gate=true", "model.qk_norm=head")
    one = parameters(cfg)
    for values in one.values():
        assert values.isfinite().all()
    poisoned = moe_lab.build_model(cfg)
    for values in poisoned.parameters():
        values.fill_(float("nan"))
    initialize(poisoned, cfg.seed)
    assert same(one, dict(poisoned.named_parameters()))


def test_tied_weights_are_one_tensor_filled_once() -> None:
    """The head is the embedding, with the embedding's deviation."""
    tied = moe_lab.build_model(tiny.decoder_moe("model.tie_embeddings=true"))
    untied = moe_lab.build_model(tiny.decoder_moe())
    assert tied.head.weight is tied.embed.weight
    assert torch.equal(tied.embed.weight, untied.embed.weight)
    assert parameter_bytes(untied) - parameter_bytes(tied) == 4 * tiny.VOCAB * tiny.D


@pytest.mark.parametrize("make", [pytest.param(f, id=f.__name__) for f in (shared_copy, reference_twin)])
def test_a_copy_shares_every_parameter_and_nothing_else(make: Callable[[nn.Module], nn.Module]) -> None:
    """The same storage, not equal storage: no second copy of the weights is held."""
    model = moe_lab.build_model(tiny.decoder_moe("dtype=bf16", "model.tie_embeddings=true"))
    twin = make(model)
    mine, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine)
    assert twin.head.weight is twin.embed.weight
    assert not {id(module) for module in model.modules()} & {id(module) for module in twin.modules()}


def test_the_twin_of_a_model_that_ran_has_no_tensor_of_its_own() -> None:
    """Nothing that a pass leaves in a module is copied, in parameters, buffers or attributes."""
    model = moe_lab.build_model(tiny.decoder_moe("dtype=bf16"))
    cache, ids_BS = model.make_cache(1, 3), torch.zeros(1, 1, dtype=torch.int64)
    model(ids_BS, cache=cache, position_S=torch.tensor([0]))
    assert storages(model) == storages(reference_twin(model))


def storages(model: nn.Module) -> set[int]:
    """Of all tensors that the modules hold, in lists, tuples and dicts too."""
    found: set[int] = set()

    def look(value: object) -> None:
        if isinstance(value, Tensor):
            found.add(value.untyped_storage().data_ptr())
        elif isinstance(value, list | tuple):
            for each in value:
                look(each)
        elif isinstance(value, dict):
            look(list(value.values()))

    for module in model.modules():
        look(vars(module))
    return found


def test_the_twin_computes_by_the_references() -> None:
    """One expert at a time, the router in plain torch, the norms in plain torch, everything in fp32."""
    twin = reference_twin(moe_lab.build_model(tiny.decoder_moe("dtype=bf16", "router=sinkhorn")))
    layers = [module for module in twin.modules() if isinstance(module, MoELayer)]
    assert len(layers) == tiny.LAYERS
    assert all(isinstance(layer.experts, Loop) and layer.router.impl == "torch" for layer in layers)
    assert {module.implementation for module in twin.modules() if isinstance(module, AddRMSNorm)} == {"torch"}
    assert {module.dtype for module in twin.modules() if isinstance(module, Embedding)} == {torch.float32}
    output = twin(torch.zeros(1, 3, dtype=torch.int64))
    assert output.y.dtype == torch.float32
    assert {routing.weights_TK.dtype for routing in output.routings} == {torch.float32}


def test_making_a_twin_leaves_the_model_as_it_was() -> None:
    """The run keeps its own implementation."""
    run = tiny.built(tiny.decoder_moe("dtype=bf16", "experts=grouped"))
    assert not isinstance(run.built.model.layers[0].mlp.experts, Loop)
    assert run.built.model(run.built.x).y.dtype == torch.bfloat16
    assert run.built.model.embed.dtype is None


def test_a_change_of_the_model_is_seen_by_its_twin() -> None:
    """A checkpoint loaded later is in both."""
    run = tiny.built(tiny.minimal())
    run.built.model.linear.weight.zero_()
    assert not run.built.twin.linear.weight.any()


@pytest.mark.parametrize("model", [pytest.param(name, id=name) for name in quick.MODELS])
def test_parameter_bytes_follow_the_dtype(model: str) -> None:
    """Two bytes instead of four."""
    wide, narrow = (moe_lab.build_model(tiny.compose(model, f"dtype={dtype}")) for dtype in ("fp32", "bf16"))
    assert parameter_bytes(wide) == 2 * parameter_bytes(narrow) == 4 * sum(p.numel() for p in wide.parameters())


class Tied(nn.Module):
    """Two names for one matrix, a vector, a submodule's norm, and a buffer that is no parameter."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.one = nn.Linear(width, width, bias=False)
        self.other = nn.Linear(width, width, bias=False)
        self.other.weight = self.one.weight
        self.inner = nn.LayerNorm(width)
        self.register_buffer("table", torch.arange(3))
        self.register_parameter("absent", None)


def test_modules_made_without_storage_have_sizes_and_ties() -> None:
    """Nothing is kept of a parameter; a buffer is as ever, for no donor has it."""
    with without_storage():
        model = Tied()
    assert all(values.is_meta for values in model.parameters())
    assert model.one.weight is model.other.weight
    assert {name: values.shape for name, values in model.named_parameters()} == {
        name: values.shape for name, values in Tied().named_parameters()
    }
    assert model.absent is None
    assert model.table.tolist() == [0, 1, 2]


def test_without_storage_ends_with_its_block() -> None:
    """Also when making a module failed inside."""
    with pytest.raises(RuntimeError, match="planted"), without_storage():
        raise RuntimeError("planted")
    assert not any(values.is_meta for values in Tied().parameters())


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda values: None, id="missing"),
        pytest.param(lambda values: values[:-1], id="size"),
        pytest.param(lambda values: values.double(), id="dtype"),
    ],
)
def test_what_a_donor_has_is_adopted_and_the_rest_is_filled(spoil: Callable[[Tensor], Tensor | None]) -> None:
    """A donor's tensor of another size or dtype is none; ties stay ties, and the model is whole."""
    alone = Tied().requires_grad_(False)
    initialize(alone, 5)
    donor: dict[str, Tensor] = dict(alone.named_parameters())
    spoilt = spoil(donor.pop("inner.weight"))
    if spoilt is not None:
        donor["inner.weight"] = spoilt
    with without_storage():
        model = Tied()
    adopt(model, donor, torch.device("cpu"), 5)
    found = dict(model.named_parameters())
    assert {name for name in found if found[name] is donor.get(name)} == {"one.weight", "inner.bias"}
    assert same(found, dict(alone.named_parameters()))
    assert model.other.weight is model.one.weight
    assert not found["inner.weight"].requires_grad
    assert torch.equal(model.inner(torch.ones(6)), alone.inner(torch.ones(6)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=dtype) for dtype in ("fp32", "bf16")])
def test_parameters_on_cuda_are_those_on_the_cpu_bit_for_bit(dtype: str) -> None:
    """The hash is integer arithmetic, and one fp32 rounding."""
    on_cpu, on_cuda = (parameters(tiny.decoder_moe(f"device={d}", f"dtype={dtype}")) for d in ("cpu", "cuda"))
    assert all(values.is_cuda for values in on_cuda.values())
    assert same(on_cpu, {name: values.cpu() for name, values in on_cuda.items()})
