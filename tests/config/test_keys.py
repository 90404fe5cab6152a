"""config/checks.py and targets.py: in every group, a key that nothing reads is refused in one line."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import moe_lab
from moe_lab.runs import build
from tests import quick

OPTIONS = {
    "model": ("minimal", "transformer_decoder", "decoder_moe", "moe_layer", "router", "checkpoint"),
    "router": ("torch", "sinkhorn", "deepseek_v3", "min_p", "capacity", "native"),
    "experts": ("auto", "grouped", "loop"),
    "workload": ("random", "text"),
    "device": ("cpu", "auto"),
    "dtype": ("fp32", "bf16"),
    "execution": ("eager", "compile"),
    "measure": ("default",),
    "export": ("none", "netron"),
}
CASES = [(group, option, sign) for group, names in OPTIONS.items() for option in names for sign in ("+", "++")]
NESTED = [("moe_layer", "model.shape"), ("router", "model.shape"), ("decoder_moe", "sweep")]


def look(overrides: list[str]) -> None:
    """Make everything that has keys."""
    cfg = moe_lab.compose(overrides)
    build.build_input(cfg, build.build_model(cfg), build.resolve_device(cfg))


@pytest.mark.parametrize(
    ("group", "option", "sign"),
    [pytest.param(*case, id="-".join(case), marks=pytest.mark.slow if case[2] == "++" else ()) for case in CASES],
)
def test_a_key_that_the_option_does_not_have_is_refused(group: str, option: str, sign: str) -> None:
    """By the group's schema, or by the arguments of its target; `+` adds what a schema would refuse."""
    model = {"model": option, "router": "checkpoint" if option == "native" else "moe_layer"}.get(group, "moe_layer")
    if option == "text":
        model = "checkpoint"
    if model == "router":
        more = ["model=router", "model.shape.n_experts=8", "model.shape.top_k=2", "device=cpu"]
    else:
        more = quick.overrides(model)
    if group != "model":
        more = [text for text in more if not text.startswith(f"{group}=")] + [f"{group}={option}"]
    if group == "execution":
        more = [*more, "experts=grouped"]
    with pytest.raises(ValueError, match=rf"^{group}\.foo: unknown key; .*(takes|has)") as raised:
        look([*more, f"{sign}{group}.foo=1"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("model", "node"), [pytest.param(*case, id="-".join(case)) for case in NESTED])
def test_nor_does_a_node_inside_have_it(model: str, node: str) -> None:
    """Keys that are no argument of a target."""
    with pytest.raises(ValueError, match=rf"^{node}\.foo: unknown key; {node} has "):
        moe_lab.compose([f"model={model}", "device=cpu", f"+{node}.foo=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("+foo=1", r"^foo: unknown key", id="top"),
        pytest.param("+sead=1", r"^sead: unknown key.*seed", id="top-typo"),
        pytest.param("+experiment.x=1", r"^experiment\.x: unknown key; .*# @package _global_", id="experiment"),
        pytest.param("+debug.x=1", r"^debug\.x: unknown key; .*# @package _global_", id="debug"),
        pytest.param("++hydra.foo=1", r"^hydra\.foo: unknown key; hydra has .*launcher", id="hydra"),
        pytest.param("++hydra.job.nam=x", r"^hydra\.job\.nam: unknown key; .*Did you mean name", id="hydra-job"),
        pytest.param("++hydra.run.folder=x", r"^hydra\.run\.folder: unknown key; hydra\.run has dir", id="hydra-run"),
        pytest.param("router.foo=1", r"^router\.foo: unknown key; router has .*renormalize", id="schema"),
    ],
)
def test_a_key_of_no_group_is_refused(override: str, message: str) -> None:
    """Wherever it stands."""
    with pytest.raises(ValueError, match=message):
        moe_lab.compose([override, "device=cpu"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param(["+router.inner.foo=1"], r"^router\.inner\.foo: unknown key; router\.inner has ", id="inner"),
        pytest.param(["+router.calibration_tokens=5"], r"^router\.calibration_tokens: unknown key; ", id="outer"),
        pytest.param(["router.inner.top_k=1", "router.top_k=2"], r"^router\.top_k=2: .*router\.inner\.top_k=1", id="k"),
    ],
)
def test_keys_of_a_router_inside_another(more: list[str], message: str) -> None:
    """The line says which of the two is meant."""
    with pytest.raises(ValueError, match=message):
        look(quick.overrides("moe_layer", "router=capacity", *more))


@pytest.mark.parametrize(
    ("router", "message"),
    [
        pytest.param("torch", "router=torch is not calibrated; remove it", id="torch"),
        pytest.param("capacity", r".*set router\.inner\.calibration_tokens", id="capacity"),
    ],
)
def test_a_router_that_is_not_calibrated_takes_no_tokens_for_it(router: str, message: str) -> None:
    """Where no schema refuses the key, as in a YAML of a person's own."""
    cfg = moe_lab.compose(quick.overrides("moe_layer", f"router={router}"))
    cfg.router = OmegaConf.create({**OmegaConf.to_container(cfg.router, resolve=True), "calibration_tokens": 5})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=rf"^router\.calibration_tokens: {message}"):
        build.build_model(cfg)


def test_an_experiment_without_its_package_is_refused(tmp_path: Path) -> None:
    """All that it sets would stand under `experiment` and do nothing."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text("batch: 3\n")
    with pytest.raises(ValueError, match=r"^experiment\.batch: unknown key; .*# @package _global_"):
        moe_lab.compose(["experiment=own"], config_dir=tmp_path)
    (tmp_path / "experiment" / "own.yaml").write_text("# @package _global_\nbatch: 3\n")
    assert moe_lab.compose(["experiment=own"], config_dir=tmp_path).batch == 3


def test_every_group_is_tried() -> None:
    """Those of config.yaml."""
    cfg = moe_lab.compose([])
    groups = {key for key in cfg if key not in ("batch", "seq_len", "seed", "name", "overrides")}
    assert groups - {"experiment", "debug", "sweep", "tracker"} == set(OPTIONS)  # tracker: test_trackers.py
    assert set(itertools.chain.from_iterable(NESTED)) >= {"sweep", "model.shape"}
