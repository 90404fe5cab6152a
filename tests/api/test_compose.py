"""api/compose.py: what is refused tells a caller in Python what to call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

import moe_lab

CASES = [
    pytest.param(["batch=1,8"], "batch=1,8: several values need a sweep: call moe_lab.multirun.", id="an-axis"),
    pytest.param(["batch=[1,8]"], "write batch=1,8 with moe_lab.multirun.", id="a-list"),
    pytest.param(["sweep.name=x"], "only used in a sweep (moe_lab.multirun).", id="a-key-of-a-sweep"),
    pytest.param(["-m", "batch=1"], "-m: an option of the command line; in Python -m is moe_lab.multirun", id="option"),
    pytest.param(
        ["batch=1", "router=sinkhorn", "batch=2"],
        "batch=2: batch is given twice (batch=1); remove one, or write batch=1,2 with moe_lab.multirun for both.",
        id="twice",
    ),
    pytest.param(
        ["model/shape=demo", "model.shape=x"], "model.shape is given twice (model/shape=demo); rem", id="node"
    ),
    pytest.param(["dtype=fp32", "+dtype=fp32"], "dtype is given twice (dtype=fp32); remove one.", id="the-same-twice"),
    pytest.param("batch=1", "must be a list of overrides, such as ['batch=1'].", id="a-text"),
]


@pytest.mark.parametrize(("overrides", "line"), CASES)
@pytest.mark.parametrize("function", [pytest.param("compose", id="compose"), pytest.param("run", id="run")])
def test_a_message_names_what_to_call(function: str, overrides: Sequence[str], line: str) -> None:
    """And no option of the command line."""
    with pytest.raises(ValueError) as raised:
        getattr(moe_lab, function)(overrides)
    assert line in str(raised.value) and "add -m" not in str(raised.value)


@pytest.mark.parametrize(
    "function", [pytest.param("build_router", id="router"), pytest.param("build_model", id="model")]
)
@pytest.mark.parametrize("given", [pytest.param(["router=torch"], id="overrides"), pytest.param("x", id="a-text")])
def test_what_is_built_needs_a_configuration(function: str, given: Any) -> None:
    """Which moe_lab.compose makes of overrides."""
    with pytest.raises(ValueError, match=r"give moe_lab\.compose\(\[\.\.\.\]\)"):
        getattr(moe_lab, function)(given)


def test_a_name_of_the_hub_is_told_apart() -> None:
    """As on the command line."""
    with pytest.raises(ValueError, match="hf download allenai/OLMoE"):
        moe_lab.run(["model=checkpoint", "router=native", "model.path=allenai/OLMoE"])
