"""build.build_experts: a class or a function of one's own, its keys, and real runs with them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import moe_lab
from moe_lab.config import targets
from moe_lab.errors import UnavailableError
from moe_lab.experts.base import FunctionExperts
from moe_lab.experts.grouped import Grouped
from moe_lab.models.moe_layer import moe_layers
from moe_lab.runs import build
from tests import quick, tiny

MODULE = """
from moe_lab.errors import UnavailableError
from moe_lab.experts.base import Experts
from moe_lab.experts.loop import Loop
from moe_lab.ops.dispatch import dispatch
from moe_lab.routers.base import NO_CONTEXT
from moe_lab.routers.softmax_topk import SoftmaxTopK

ran = []  # (block, whether the router had sorted) of each call

class Mine(Experts):
    def __init__(self, *, block=64):
        self.block = block

    def compute_on(self, device, *, load=True):
        if self.block < 0:
            raise UnavailableError(f"no kernel on {device.type}")

    def __call__(self, x_TD, routing, weights, *, scale="output"):
        ran.append((self.block, routing.dispatch is not None))
        return Loop()(x_TD, routing, weights, scale=scale)

    def implementation(self, x_TD, weights):
        return {"experts": f"mine:{self.block}", "gemm": str(len(x_TD))}

class Sorting(Mine):
    graph_safe = True

    def reads_dispatch(self, x_TD):
        return len(x_TD) > 7

def function(x_TD, routing, weights, *, scale="output", block=64):
    ran.append((block, routing.dispatch is not None))
    return Loop()(x_TD, routing, weights, scale=scale)

def any_keys(x_TD, routing, weights, scale, **keys):
    return function(x_TD, routing, weights, scale=scale, **keys)

def named(x_TD, routing, weights, block=64, scale="output"):
    return function(x_TD, routing, weights, scale=scale, block=block)

class Other:
    def __init__(self, block):
        ran.append("made")

made = Mine()

class Router(SoftmaxTopK):
    def __init__(self, n_experts, top_k):
        super().__init__(n_experts, top_k, impl="auto", renormalize=True, gate_bias=False)

    def select(self, logits_TE, ctx=NO_CONTEXT):
        routing = super().select(logits_TE, ctx)
        if not ctx.want_dispatch:
            return routing
        return routing._replace(dispatch=dispatch(routing.expert_ids_TK, self.n_experts))
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Any:
    """A folder with experts=mine, sorting, function, other, made, and router=sorts; the module's `ran` is empty."""
    (tmp_path / "experts").mkdir()
    (tmp_path / "own_experts.py").write_text(MODULE)
    functions = [(name, name) for name in ("function", "any_keys", "named")]
    for name, target in (("mine", "Mine"), ("sorting", "Sorting"), ("other", "Other"), *functions):
        text = f"_target_: own_experts.{target}\nname: {name}\nblock: 16\n"
        (tmp_path / "experts" / f"{name}.yaml").write_text(text)
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "sorts.yaml").write_text("_target_: own_experts.Router\nname: sorts\n")
    (tmp_path / "experts" / "made.yaml").write_text("_target_: own_experts.made\nname: made\n")
    yield tmp_path
    sys.modules.pop("own_experts", None)
    targets._trusted.remove(tmp_path)


def compose(plugin: Path, *more: str, model: str = "moe_layer") -> Any:
    return moe_lab.compose(quick.overrides(model, *more), config_dir=plugin)


@pytest.mark.parametrize(
    ("experts", "more", "block", "ran"),
    [
        pytest.param("mine", [], 16, {"experts": "mine:16", "gemm": "14"}, id="class-yaml"),
        pytest.param(
            "mine", ["experts.block=32"], 32, {"experts": "mine:32", "gemm": "14"}, id="class", marks=pytest.mark.slow
        ),
        pytest.param("mine", ["~experts.block"], 64, {"experts": "mine:64", "gemm": "14"}, id="class-default"),
        pytest.param("function", [], 16, {"experts": "function"}, id="function-yaml"),
        pytest.param(
            "function", ["experts.block=32"], 32, {"experts": "function"}, id="function", marks=pytest.mark.slow
        ),
        pytest.param(
            "function", ["~experts.block"], 64, {"experts": "function"}, id="function-default", marks=pytest.mark.slow
        ),
        pytest.param("any_keys", ["experts.block=32"], 32, {"experts": "any_keys"}, id="function-any-keys"),
        pytest.param("named", ["experts.block=32"], 32, {"experts": "named"}, id="function-by-name-or-place"),
    ],
)
def test_a_key_reaches_what_runs(
    experts: str, more: list[str], block: int, ran: dict[str, str], plugin: Path, tmp_path: Path
) -> None:
    """A verified run, each call with that block; the record has what the class says of itself."""
    record = moe_lab.run(compose(plugin, f"experts={experts}", *more), tmp_path / "run")
    assert (record.status, record.reason) == ("ok", None)
    assert record.check is not None and record.check.passed
    assert record.implementation == {"router": "torch", **ran}
    assert record.config["experts"].get("block", block) == block
    assert {entry[0] for entry in sys.modules["own_experts"].ran} == {block}


@pytest.mark.parametrize(
    ("experts", "seq_len", "is_sorted"),
    [
        pytest.param("sorting", 7, True, id="sorted"),
        pytest.param("sorting", 3, False, id="few-tokens"),
        pytest.param("mine", 7, False, id="by-default"),
        pytest.param("function", 7, False, id="function"),
    ],
)
def test_slots_are_sorted_for_who_asks(experts: str, seq_len: int, is_sorted: bool, plugin: Path) -> None:
    """The router is told by `want_dispatch`."""
    run = tiny.built(compose(plugin, f"experts={experts}", "router=sorts", f"seq_len={seq_len}"))
    run.built.step()
    assert {entry[1] for entry in sys.modules["own_experts"].ran} == {is_sorted}


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        pytest.param("mine", r"^experts\.blok: unknown key; own_experts\.Mine takes .*block", id="class"),
        pytest.param(
            "function", r"^experts\.blok: unknown key; own_experts\.function takes block\. Did you", id="function"
        ),
    ],
)
def test_a_key_that_nothing_takes_is_a_mistake(experts: str, message: str, plugin: Path, tmp_path: Path) -> None:
    """Looking and running say the same."""
    cfg = compose(plugin, f"experts={experts}", "+experts.blok=1")
    with pytest.raises(ValueError, match=message):
        build.check_available(cfg)
    with pytest.raises(ValueError, match=message):
        moe_lab.run(cfg, tmp_path / "run")


def test_a_key_that_our_own_have_not_is_a_mistake_before_anything_is_built(plugin: Path) -> None:
    """Their schema says so."""
    with pytest.raises(ValueError, match=r"^experts\.blok: unknown key; experts has name"):
        compose(plugin, "experts=grouped", "+experts.blok=1")


@pytest.mark.parametrize("experts", [pytest.param(name, id=name) for name in ("other", "made")])
def test_what_is_neither_such_a_class_nor_a_function_is_refused(experts: str, plugin: Path) -> None:
    """By the name of the class to derive from; nothing of it is called."""
    with pytest.raises(
        ValueError, match=r"^experts: own_experts\.\w+ must be a subclass of moe_lab\.experts\.base\.Experts"
    ):
        build.build_experts(compose(plugin, f"experts={experts}"))
    assert sys.modules["own_experts"].ran == []


def test_who_cannot_run_here_says_so(plugin: Path, tmp_path: Path) -> None:
    """The reason begins with the option; the class is told the device of the run."""
    cfg = compose(plugin, "experts=mine", "experts.block=-1")
    for act in (build.check_available, build.build_model, lambda cfg: moe_lab.run(cfg, tmp_path / "run")):
        with pytest.raises(UnavailableError, match=r"^experts=mine: no kernel on cpu$"):
            act(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [pytest.param(name, id=name) for name in ("mine", "function", "loop")])
def test_who_does_not_declare_it_is_not_captured(experts: str, plugin: Path) -> None:
    """A class by default, and every function."""
    with pytest.raises(UnavailableError, match=rf"^experts={experts} .*cannot be captured by execution=compile"):
        build.check_available(compose(plugin, f"experts={experts}", "execution=compile"))


def test_who_declares_it_may_be_captured(plugin: Path) -> None:
    """`graph_safe = True` of one's own class, and of ours."""
    for experts in ("sorting", "grouped"):
        assert build.check_available(compose(plugin, f"experts={experts}", "execution=compile"))[0].type == "cpu"
    assert Grouped.graph_safe and not FunctionExperts.graph_safe


def test_layers_share_one_object(plugin: Path) -> None:
    """It keeps no state."""
    model = build.build_model(compose(plugin, "experts=mine", model="decoder_moe"))
    assert len({id(layer.experts) for layer in moe_layers(model)}) == 1 < len(moe_layers(model))
