"""entries.py: what an entry of `sweep.variants` becomes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from moe_lab.config import entries

WRITTEN = [
    pytest.param(
        {"router": "sinkhorn", "router.temperature": 0.25}, ["router=sinkhorn", "router.temperature=0.25"], id="option"
    ),
    pytest.param({"router.iters": 5, "router": "sinkhorn"}, ["router.iters=5", "router=sinkhorn"], id="key-first"),
    pytest.param(
        {"model/shape": "demo", "+a.b": 1, "++c": True}, ["model/shape=demo", "+a.b=1", "++c=True"], id="added"
    ),
    pytest.param({"router@router.inner": "switch"}, ["router@router.inner=switch"], id="package"),
    pytest.param({"router.top_k": None}, ["router.top_k=null"], id="null"),
    pytest.param({"workload.path": ["a b", "c,d"]}, ["workload.path=[a\\ b,c\\,d]"], id="list"),
    pytest.param({}, [], id="empty"),
]


@pytest.mark.parametrize(("entry", "overrides"), WRITTEN)
def test_an_entry_is_what_would_be_typed_in_its_order(entry: dict[str, Any], overrides: list[str]) -> None:
    """A group's option, keys of it, keys that are added, null, lists, and nothing."""
    assert entries.overrides_of(OmegaConf.create([entry])) == [overrides]


VALUES: list[Any] = [
    "a, b",
    " a ",
    "it's",
    'say "x"',
    "null",
    "true",
    "1",
    "1e3",
    "nan",
    "a=b",
    "[1]",
    "{a: b}",
    "a\\b",
]
VALUES += ["", "ü", "a#b", "${batch}", "choice", "/a/b_c-d.txt", 1, 1.0, 1e-9, True, None, ["1", "x, y", 2.5, None]]


@pytest.mark.parametrize("value", [pytest.param(value, id=repr(value)) for value in VALUES])
def test_hydra_reads_the_value_that_stood_there(value: Any) -> None:
    """With its type: the text '1' is not the number."""
    ((override,),) = entries.overrides_of(OmegaConf.create([{"name": value}]))
    parsed = OverridesParser.create().parse_override(override)
    assert not parsed.is_sweep_override()
    assert repr(parsed.value()) == repr(value)


MISTAKES = [
    pytest.param({"router": "torch"}, "sweep.variants={router: torch}: must be a list of entries", id="mapping"),
    pytest.param("torch", "sweep.variants=torch: must be a list of entries", id="text"),
    pytest.param(["torch"], "sweep.variants=[torch]: must be a list of entries", id="list-of-text"),
    pytest.param([{"router": "torch"}, None], "[{router: torch}, null]: must be a list of entries", id="null-entry"),
    pytest.param(
        [{"router": {"name": "sinkhorn", "temperature": 0.25}}],
        "write dotted keys: {router: sinkhorn, router.temperature: 0.25}.",
        id="nested",
    ),
    pytest.param([{"model": {"shape": {"top_k": 3}}}], "write dotted keys: {model.shape.top_k: 3}.", id="nested-deep"),
    pytest.param([{"router": {}}], "router: {}: write dotted keys: {router.KEY: VALUE}.", id="nested-empty"),
    pytest.param(
        [{"router": ["torch", "hash"]}], "router: [torch, hash]: an entry has one value", id="list-of-options"
    ),
    pytest.param([{"batch": [1, 8]}], "batch: [1, 8]: an entry has one value", id="list-of-numbers"),
    pytest.param([{"router.temperature": [1, 2]}], "temperature: [1, 2]: an entry has one value", id="list-of-schema"),
    pytest.param([{"router": "torch,hash"}], "router: torch,hash: an entry has one value", id="comma"),
    pytest.param([{"batch": "1,8"}], "batch: 1,8: an entry has one value", id="comma-of-numbers"),
    pytest.param([{"batch": "choice(1,8)"}], "batch: choice(1,8): an entry has one value", id="choice"),
    pytest.param([{"router": "glob(s*)"}], "router: glob(s*): an entry has one value", id="glob"),
    pytest.param([{"batch": "range(1,8)"}], "make it an axis", id="range"),
    pytest.param([{"sweep.name": "x"}], "sweep.name: sweep.* holds for the whole sweep", id="sweep"),
    pytest.param([{"+sweep": "x"}], "+sweep: sweep.* holds for the whole sweep", id="sweep-whole"),
    pytest.param([{"hydra.sweep.dir": "x"}], "hydra.sweep.dir: hydra.* holds for the whole sweep", id="hydra"),
    pytest.param([{"hydra/launcher": "basic"}], "hydra/launcher: hydra.* holds for the whole sweep", id="launcher"),
    pytest.param([{"~router.top_k": None}], "~router.top_k: an entry sets keys and deletes none", id="deletion"),
    pytest.param([{"a b": 1}], "a b is not a key; write entries such as [{", id="blank"),
    pytest.param([{1: 2}], "1 is not a key", id="number"),
    pytest.param([{"router=torch": 2}], "router=torch is not a key", id="equal-sign"),
    pytest.param([{"seed": 1, "++seed": 2}], "seed stands twice in {seed: 1, ++seed: 2}; remove one.", id="twice"),
    pytest.param([{"model/shape": "demo", "model.shape": "demo"}], "model.shape stands twice", id="twice-by-slash"),
]


@pytest.mark.parametrize(("variants", "says"), MISTAKES)
def test_a_mistake_is_one_line_that_names_the_key_and_the_mend(variants: Any, says: str) -> None:
    """ValueError, from a typed list and from a YAML file alike."""
    node = OmegaConf.create({"variants": variants}).variants
    with pytest.raises(ValueError, match=r"^sweep\.variants") as refused:
        entries.overrides_of(node)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("nothing", [pytest.param(None, id="null"), pytest.param([], id="empty")])
def test_no_variants_are_no_entries(nothing: Any) -> None:
    """The default, and what takes back those of an experiment."""
    assert entries.overrides_of(OmegaConf.create({"variants": nothing}).variants) == []


@pytest.mark.parametrize(
    ("other", "says"),
    [
        pytest.param("router=a,b", "router is an axis of the sweep too (router=a,b); remove that", id="axis"),
        pytest.param("router=a", "router is set for all cells too (router=a); remove that", id="typed"),
        pytest.param("+router.top_k=1", "router.top_k is set for all cells too", id="added"),
        pytest.param("model/shape=demo", "take model.shape out of the entries", id="slash"),
        pytest.param("router.temperature=1", None, id="key-of-the-group"),
        pytest.param("batch=1,8", None, id="other-key"),
    ],
)
def test_a_key_is_set_in_one_place(other: str, says: str | None) -> None:
    """Not in an entry and beside it."""
    made = entries.overrides_of([{"router": "torch"}, {"++router.top_k": 2, "model/shape": "demo"}])
    others = OverridesParser.create().parse_overrides([other])
    if says is None:
        entries.refuse_keys_given_twice(made, others)
    else:
        with pytest.raises(ValueError, match=r"^sweep\.variants: ") as refused:
            entries.refuse_keys_given_twice(made, others)
        assert says in str(refused.value)
