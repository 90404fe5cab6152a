"""A default stands in one place, the YAML: neither a schema nor a class has another one."""

from __future__ import annotations

import dataclasses
import importlib.resources
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import moe_lab
from moe_lab.config import schemas, targets
from moe_lab.routers.softmax_topk import SoftmaxTopK
from moe_lab.runs import build
from tests import quick
from tests.config.test_options import CALLED, CONF, EIGHT, OPTIONS, choose

SCHEMAS = {kind for group in schemas.SCHEMAS.values() for kind in group.values()} | {schemas.Config, schemas.Sweep}
called = pytest.mark.parametrize("option", [pytest.param(option, id=option.replace("/", "-")) for option in CALLED])


@pytest.mark.parametrize("schema", [pytest.param(kind, id=kind.__name__) for kind in sorted(SCHEMAS, key=str)])
def test_a_schema_has_names_and_types_only(schema: type) -> None:
    """Of its base classes too. A key that no YAML gives has no value, and such a configuration does not run."""
    for field in dataclasses.fields(schema):
        assert field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING, field.name


@called
def test_what_an_option_names_has_no_default_for_its_keys(option: str) -> None:
    """Called without one of them, it says which is missing."""
    group, _, name = option.partition("/")
    node = moe_lab.compose(choose(option))[group]
    assert node.name == name
    parameters = inspect.signature(targets.locate(node._target_)).parameters
    keys = [str(key) for key in node if key in parameters and key != "top_k"]  # of a router it is passed on otherwise
    assert keys
    for key in keys:
        assert parameters[key].default is inspect.Parameter.empty, key
        assert parameters[key].kind is inspect.Parameter.KEYWORD_ONLY, key


@pytest.mark.parametrize(
    "option",
    [
        pytest.param(
            option,
            id=option.replace("/", "-"),
            marks=pytest.mark.slow if option.startswith("router/") else (),  # test_options.py runs with each router
        )
        for option in CALLED
    ],
)
def test_an_option_gives_all_that_its_class_asks_for(option: str) -> None:
    """The model of a small run is made with it, and its input."""
    group, _, name = option.partition("/")
    model = name if group == "model" and name in quick.MODELS else "decoder_moe"
    if option in ("router/native", "workload/text"):
        model = "checkpoint"
    eight = [EIGHT[model]] if name in ("deepseek_v2", "deepseek_v3") else []
    cfg = moe_lab.compose(quick.overrides(model, *choose(option), *eight))
    made = build.build_model(cfg)
    assert type(made) is targets.locate(cfg.model._target_)
    assert len(build.build_input(cfg, made, torch.device("cpu"))) > 0


def read(file: Path) -> tuple[list[Path], dict[str, Any]]:
    """(the bases that a YAML starts from, its own values)."""
    content = yaml.safe_load(file.read_text())
    entries = [entry for entry in content.pop("defaults", []) if str(entry).startswith("/_base/")]
    return [CONF / f"{entry.removesuffix('@_here_')[1:]}.yaml" for entry in entries], content


def given(file: Path) -> dict[str, Any]:
    """What a YAML and its bases say."""
    above, own = read(file)
    return {key: value for base in above for key, value in given(base).items()} | own


FILES = sorted(CONF.rglob("*.yaml"))


def test_an_option_does_not_repeat_its_base() -> None:
    """It says its name and what differs."""
    for file in FILES:
        above, own = read(file)
        for base in above:
            assert not [key for key, value in given(base).items() if key in own and own[key] == value], file


def test_a_base_is_shared() -> None:
    """What only one option has stands in that option."""
    used = [base for file in FILES for base in read(file)[0]]
    for base in sorted((CONF / "_base").rglob("*.yaml")):
        assert used.count(base) >= 2, base


def test_the_bases_are_in_the_package_and_not_among_the_options() -> None:
    """As the schemas are: a group whose name starts with _ is for other YAML files."""
    installed = Path(str(importlib.resources.files("moe_lab.conf._base.router")))
    assert (installed / "softmax_topk.yaml").is_file()
    assert not any(option.startswith("_") for option in OPTIONS)
    with pytest.raises(ValueError, match="_base"):
        moe_lab.compose(["_base/router=softmax_topk"])


def test_an_option_of_ones_own_may_start_from_a_base(tmp_path: Path) -> None:
    """With its name and what differs. Without the base, the key that is missing is named."""
    (tmp_path / "router").mkdir()
    own = "_target_: moe_lab.routers.softmax_topk.SoftmaxTopK\nname: own\nimpl: auto\nrenormalize: false\n"
    (tmp_path / "router" / "own.yaml").write_text(own)
    (tmp_path / "router" / "from_base.yaml").write_text(
        "defaults:\n  - /_base/router/softmax_topk@_here_\n\nname: from_base\nrenormalize: false\n"
    )
    router = moe_lab.build_router(moe_lab.compose(["router=from_base"], config_dir=tmp_path))
    assert isinstance(router, SoftmaxTopK) and not router.renormalize
    with pytest.raises(ValueError, match="gate_bias"):
        moe_lab.build_router(moe_lab.compose(["router=own"], config_dir=tmp_path))


@pytest.mark.parametrize(
    ("group", "base"),
    [
        pytest.param("measure", "/measure/default", id="measure"),
        pytest.param("export", "/_base/export/export", id="export"),
    ],
)
def test_what_every_run_reads_has_a_value_in_an_option_of_ones_own(group: str, base: str, tmp_path: Path) -> None:
    """By the file that has it; without that one line says so."""
    (tmp_path / group).mkdir()
    (tmp_path / group / "whole.yaml").write_text(f"defaults:\n  - {base}@_here_\n\nname: none\n")
    (tmp_path / group / "part.yaml").write_text("name: none\n")
    cfg, usual = moe_lab.compose([f"{group}=whole"], config_dir=tmp_path), moe_lab.compose([])
    assert {**cfg[group], "name": None} == {**usual[group], "name": None}
    with pytest.raises(ValueError, match=rf"^{group}\.\w+ has no value: .*{base}@_here_"):
        moe_lab.compose([f"{group}=part"], config_dir=tmp_path)
