"""Settings, variants and their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from moe_lab.records import identity, variants
from tests import tiny


def content(*overrides: str, model: str = "moe_layer") -> dict[str, Any]:
    """What of a quick configuration changes the result."""
    return identity.content(tiny.compose(model, *overrides))


def test_a_setting_is_what_is_left_without_what_is_compared() -> None:
    """Router and experts do not change it; batch does, and so does a router that is not compared."""
    base = content()
    assert variants.setting_id(base) == variants.setting_id(content("router=sinkhorn", "experts=loop"))
    assert variants.setting_id(base) != variants.setting_id(content("batch=3"))
    compare = ("experts",)
    assert variants.setting_id(base, compare) != variants.setting_id(content("router=sinkhorn"), compare)
    assert variants.setting_id(base, compare) == variants.setting_id(content("experts=loop"), compare)


CASES = [
    pytest.param([["router=torch"]], ["torch"], id="one"),
    pytest.param([["router=torch"], ["router=sinkhorn"]], ["torch", "sinkhorn"], id="routers"),
    pytest.param([["experts=loop"], ["experts=grouped"]], ["loop", "grouped"], id="experts"),
    pytest.param([["router=torch"], ["router=sinkhorn", "experts=loop"]], ["torch/auto", "sinkhorn/loop"], id="both"),
    pytest.param(
        [["router=sinkhorn", "router.iters=5"], ["router=sinkhorn"], ["router=torch"]],
        ["sinkhorn(iters=5)", "sinkhorn(iters=10)", "torch"],
        id="namesakes",
    ),
    pytest.param([["batch=1"], ["batch=2"]], ["torch", "torch"], id="two-settings"),
]


@pytest.mark.parametrize(("overrides", "names"), CASES)
def test_a_label_names_what_differs_and_no_more(overrides: list[list[str]], names: list[str]) -> None:
    """Options that differ; keys only among namesakes."""
    assert variants.labels([content(*given) for given in overrides]) == names


def test_of_nested_groups_only_what_differs_is_said() -> None:
    """A key of the shape, not the shape; its name where that tells."""
    small, large = content(), content("model.shape.d_model=64")
    assert variants.labels([small, large], ("model",)) == [
        "moe_layer(shape=demo(d_model=32))",
        "moe_layer(shape=demo(d_model=64))",
    ]


def test_a_key_that_a_cell_has_not_is_not_said_of_it() -> None:
    """In prefill there is no context before the sequence."""
    given = [["workload.phase=prefill"], *(["workload.phase=decode", f"workload.context_len={n}"] for n in (3, 5))]
    assert variants.labels([content(*more) for more in given], ("workload",)) == [
        "random(phase=prefill)",
        "random(phase=decode, context_len=3)",
        "random(phase=decode, context_len=5)",
    ]


def test_one_model_with_other_keys_is_called_by_these() -> None:
    """Beside the router's name, which stays where there is nothing else to say."""
    cells: list[dict[str, Any]] = [
        {"router": {"name": router}, "model": {"name": "tiny", "top_k": k}}
        for router, k in (("native", None), ("native", [2, 1]), ("oea", None))
    ]
    assert variants.labels(cells, ("router", "model")) == ["native", "native/top_k=[2, 1]", "oea"]
    assert variants.labels(cells[:2], ("router", "model")) == ["native", "native/top_k=[2, 1]"]
    cells[1]["model"]["name"] = "other"
    assert variants.labels(cells[:2], ("router", "model")) == ["tiny", "other"]


def test_a_null_is_not_said_and_values_are_as_typed() -> None:
    """Beside another value the name alone is the one without; only a cell that has no such key at all is told apart."""
    values = ((None, True), (1, False))
    cells: list[dict[str, Any]] = [
        {"router": {"name": "native", "top_k": k, "plain": plain}, "model": "m"} for k, plain in values
    ]
    assert variants.labels(cells) == ["native(plain=true)", "native(top_k=1, plain=false)"]
    cells[1]["router"]["plain"] = True
    assert variants.labels(cells) == ["native", "native(top_k=1)"]
    cells.append({"router": {"name": "native", "plain": True}, "model": "m"})
    assert variants.labels(cells) == ["native(top_k=null)", "native(top_k=1)", "native"]


def test_checkpoints_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    """By name where that does; the content stays what it is."""
    paths = [tmp_path / "a" / "first", tmp_path / "a" / "second", tmp_path / "b" / "first"]
    configs = [OmegaConf.to_container(tiny.compose("checkpoint", f"model.path={path}")) for path in paths]
    assert all(isinstance(config, dict) for config in configs)
    contents = [identity.content(config) for config in configs]  # type: ignore[arg-type]
    named = [variants.named(*pair) for pair in zip(contents, configs, strict=True)]  # type: ignore[arg-type]
    one, other = variants.labels(named[:2], ("model",))
    assert (one, other) == ("first", "second")
    assert len(set(variants.labels(named, ("model",)))) == 3
    together = variants.all_named(contents, configs)  # type: ignore[arg-type]
    assert variants.labels(together, ("model",)) == ["a/first", "second", "b/first"]
    assert variants.labels(variants.all_named(contents[:2], configs[:2]), ("model",)) == ["first", "second"]  # type: ignore[arg-type]
    assert {content["model"]["name"] for content in contents} == {"checkpoint"}
    assert variants.named(content(), {"model": {}}) == content()


def test_a_replay_is_called_so() -> None:
    """Its ids are those of a trace, wherever its tokens come from."""
    layers = [{**content(), "workload": {"name": "random", "load": "replay", "trace_layer": n}} for n in (0, 3)]
    named = [variants.named(layer, {"model": {}}) for layer in layers]
    assert variants.labels(named, ("workload",)) == ["replay(trace_layer=0)", "replay(trace_layer=3)"]


def test_a_model_that_reads_nothing_of_what_is_compared_is_named_by_itself() -> None:
    """minimal beside two routers of a layer."""
    contents = [content("router=torch"), content("router=sinkhorn"), content(model="minimal")]
    assert variants.labels(contents) == ["torch", "sinkhorn", "minimal"]
    assert variants.labels([]) == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.sampled_from("xy")), min_size=1, max_size=8))
def test_labels_tell_apart_what_differs(cells: list[tuple[str, int, str]]) -> None:
    """Two cells have the same label exactly if what is compared is the same in them."""
    contents = [
        {"router": {"name": name, "iters": iters}, "experts": {"name": experts}, "model": {"name": "m"}}
        for name, iters, experts in cells
    ]
    names = variants.labels(contents, ("router", "experts"))
    for one, its in zip(cells, names, strict=True):
        for other, others in zip(cells, names, strict=True):
            assert (one == other) == (its == others)


PARTIALS = [
    pytest.param({}, True, id="empty"),
    pytest.param({"router": "torch"}, True, id="option"),
    pytest.param({"router": "sinkhorn"}, False, id="other-option"),
    pytest.param({"router": {"renormalize": True}, "batch": 2}, True, id="nested"),
    pytest.param({"batch": 3}, False, id="other-value"),
    pytest.param({"model": {"shape": {"n_experts": 5}}}, True, id="deep"),
    pytest.param({"nothing": 1}, False, id="unknown"),
    pytest.param({"batch": [1, 2]}, True, id="one-of-several"),
    pytest.param({"batch": [1, 3]}, False, id="none-of-several"),
    pytest.param({"router": ["sinkhorn", "torch"]}, True, id="one-of-several-options"),
    pytest.param({"router": "torch", "router.renormalize": True}, True, id="dotted"),
    pytest.param({"router": "torch", "router.renormalize": False}, False, id="dotted-other-value"),
    pytest.param({"router": "sinkhorn", "router.renormalize": True}, False, id="dotted-other-option"),
    pytest.param({"model.shape.n_experts": [4, 5], "batch": 2}, True, id="dotted-deep"),
    pytest.param({"model/shape": "demo"}, True, id="slash"),
    pytest.param({"model/shape": "olmoe_1b_7b"}, False, id="slash-other-option"),
    pytest.param({"model.shape": "demo", "model": {"shape": {"n_experts": 5}}}, True, id="dotted-beside-nested"),
    pytest.param({"model": {"shape.n_experts": 6}}, False, id="dotted-within-nested"),
    pytest.param({"router.nothing": 1}, False, id="dotted-unknown"),
    pytest.param({"router.renormalize.x": 1}, False, id="dotted-below-a-value"),
    pytest.param({"batch.x": 1}, False, id="dotted-below-a-number"),
]


@pytest.mark.parametrize(("partial", "agrees"), PARTIALS)
def test_a_partial_configuration_matches_what_agrees_with_it(partial: dict[str, Any], agrees: bool) -> None:
    """Groups by their option's name or by keys within."""
    assert variants.matches(content(), partial) is agrees
