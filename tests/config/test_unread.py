"""config/unread.py: a key that is only read beside others is refused where it has no effect, and taken where it has."""

from __future__ import annotations

import re

import pytest

import moe_lab
from moe_lab.config.checks import refuse_hydras_keys, refuse_other_keys
from moe_lab.config.unread import _RULES, key_of, refuse_twice, unread
from moe_lab.runs.run import Run
from tests import quick

ELSEWHERE = ("batch=2", "measure.phases=true", "sweep.name=x", "workload.phase=prefill", "export=netron")
ONE_GROUP = ("router=deepseek_v3", "router.n_groups=1", "router.top_groups=1")
DENSE = ("model.n_layers=2", "model.n_dense_layers=2")
CASES = [
    # model, what has no effect, what gives it one
    ("moe_layer", "workload.context_len=5", None),
    ("decoder_moe", "workload.context_len=5", ["workload.phase=decode"]),
    ("decoder_moe", "workload.prefill_chunk=5", ["workload.phase=prefill"]),
    ("transformer_decoder", "workload.prefill_chunk=5", ["workload.phase=decode"]),
    ("minimal", "workload.load=zipf", None),
    ("transformer_decoder", "workload.load=zipf", None),
    ("moe_layer", "workload.zipf_exponent=2", ["workload.load=zipf"]),
    ("moe_layer", "workload.hot_experts=2", ["workload.load=hot"]),
    ("moe_layer", "workload.hot_share=0.9", ["workload.load=hot"]),
    ("moe_layer", "workload.trace=folder", ["workload.load=replay"]),
    ("moe_layer", "workload.fit=dirichlet", ["workload.load=fitted", "workload.trace=folder"]),
    ("moe_layer", "workload.trace_consecutive=true", ["workload.load=replay", "workload.trace=folder"]),
    ("moe_layer", "workload.trace_layer=1", ["workload.load=replay", "workload.trace=folder"]),
    ("minimal", "measure.routing=true", None),
    ("minimal", "measure.record_routing=true", None),
    ("moe_layer", "measure.record_routing=true", []),
    ("moe_layer", "sweep.name=x", None),
    ("moe_layer", "sweep.compare=[router]", None),
    ("moe_layer", "sweep.anchor={router: torch}", None),
    ("moe_layer", "sweep.timeout_s=5", None),
    ("moe_layer", "measure.replicates=2", None),
]


@pytest.mark.parametrize(
    ("model", "override", "beside"), [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in CASES]
)
def test_what_has_no_effect_is_refused_and_what_has_is_taken(
    model: str, override: str, beside: list[str] | None
) -> None:
    """One line with the override and the remedy."""
    if beside != []:
        with pytest.raises(ValueError, match="has no effect; ") as raised:
            moe_lab.compose(quick.overrides(model, override))
        assert str(raised.value).startswith(f"{override}: ") and "\n" not in str(raised.value)
    if beside is not None:
        moe_lab.compose(quick.overrides(model, *beside, override))


def test_a_backend_of_attention_has_no_effect_on_a_pass_of_one_token() -> None:
    """As a decode step is; a forward cell may carry the chunk of another."""
    override = "model.attention=flash"
    for more in (
        ["workload.phase=forward"],
        ["workload.phase=prefill"],
        ["workload.phase=decode", "workload.window=7"],
    ):
        moe_lab.compose(quick.overrides("decoder_moe", *more, override))
    cfg = quick.compose("decoder_moe", override)
    cfg.workload.prefill_chunk = 1
    assert not unread(cfg, [override], in_a_sweep=True)
    for more in (["workload.phase=decode"], ["seq_len=1"], ["workload.phase=prefill", "workload.prefill_chunk=1"]):
        with pytest.raises(
            ValueError, match=r"^model\.attention=flash: has no effect; only used for timed passes over more than one"
        ):
            moe_lab.compose(quick.overrides("decoder_moe", *more, override))


def decoder(*overrides: str) -> list[str]:
    """Without its usual sizes, so that only what is given was asked for."""
    usual = (text for text in quick.overrides("decoder_moe") if not text.startswith(("model.n_experts", "model.top_k")))
    return list({text.split("=", 1)[0]: text for text in (*usual, *overrides)}.values())


@pytest.mark.parametrize(
    ("more", "override"),
    [
        pytest.param(["router=top_p", "router.k_max=2"], "router.top_k=2", id="router-k_max"),
        pytest.param([*ONE_GROUP], "router.group_score=max", id="groups"),
        pytest.param(["router=min_p"], "router.calibration_tokens=64", id="threshold"),
        pytest.param(["router=capacity", "router.policy=dropless"], "router.factor=2", id="dropless"),
        pytest.param([*DENSE], "workload.load=zipf", id="dense-load"),
    ],
)
def test_of_a_decoder(more: list[str], override: str) -> None:
    """A router with a threshold that is given, a model without experts."""
    with pytest.raises(ValueError, match="has no effect; ") as raised:
        moe_lab.compose(decoder(*more, override))
    assert str(raised.value).startswith(f"{override}: ")


@pytest.mark.parametrize(
    ("more", "override"),
    [
        pytest.param(["router=switch"], "model.top_k=2", id="own-k"),
        pytest.param(["router=soft"], "model.top_k=2", id="soft"),
        pytest.param(["router=top_p", "router.k_max=2"], "model.top_k=2", id="k_max"),
        pytest.param(["router=capacity", "router@router.inner=switch"], "model.top_k=2", id="inner-k"),
        pytest.param([*DENSE], "router=sinkhorn", id="dense-router"),
        pytest.param([*DENSE], "experts=loop", id="dense-experts"),
        pytest.param([*DENSE], "model.n_experts=4", id="dense-n_experts"),
        pytest.param([*DENSE], "model.top_k=1", id="dense-top_k"),
        pytest.param([], "model.dense_hidden_dim=9", id="no-dense-layer"),
    ],
)
def test_a_size_that_is_not_used_is_said_in_the_record(more: list[str], override: str) -> None:
    """Who compares routers gives all of them the same sizes, so this is no mistake."""
    record = Run(moe_lab.compose(decoder(*more, override))).record()
    assert [text for text in record.warnings if text.startswith(f"{override}: has no effect; ")]
    record = Run(moe_lab.compose(decoder("model.n_dense_layers=1", "model.n_layers=2", override))).record()
    assert not [text for text in record.warnings if text.startswith(override)]


@pytest.mark.parametrize(
    "override",
    ["model.shape.mlp_hidden_dim=8", "model.shape.d_model=8"],
)  # fmt: skip
def test_of_a_router_alone(override: str) -> None:
    """It has no experts, and a width only with a gate."""
    with pytest.raises(ValueError, match=f"^{override}: has no effect; "):
        moe_lab.compose(["model=router", "device=cpu", override])
    if "d_model" in override:
        moe_lab.compose(["model=router", "device=cpu", "model.gate=true", override])


@pytest.mark.parametrize(
    "override",
    [
        pytest.param(text, id=text)
        for text in (
            "measure.caches=false",
            "measure.record_routing=false",
            "measure.reference_router=null",
            "measure.replicates=1",
            "sweep.report=false",
            "sweep.anchor=null",
            "export.verify=false",
            "workload.load=native",
            "workload.trace=null",
            "sweep.wait=true",
        )
    ],
)
def test_what_is_off_may_be_turned_off(override: str) -> None:
    """That is its effect."""
    cfg = moe_lab.compose(quick.overrides("minimal", override))
    assert unread(cfg, [override], in_a_sweep=False) == {}


SAID = [
    pytest.param("moe_layer", "measure.caches=true", ["execution=cuda_graph"], id="caches"),
    pytest.param("moe_layer", "measure.quality=true", None, id="quality"),
    pytest.param("moe_layer", "measure.quality_tokens=9", None, id="quality_tokens"),
    pytest.param("checkpoint", "measure.quality_tokens=9", [], id="quality_tokens-of-text"),
    pytest.param("moe_layer", "export.dir=folder", ["export=netron"], id="dir"),
    pytest.param("moe_layer", "export.opset=18", ["export=netron"], id="opset"),
    pytest.param("moe_layer", "export.view=flat", ["export=netron"], id="view"),
    pytest.param("moe_layer", "export.overwrite=true", ["export=netron"], id="overwrite"),
]


@pytest.mark.parametrize(("model", "override", "beside"), SAID)
def test_what_asks_for_something_beside_the_result_is_said_in_the_record(
    model: str, override: str, beside: list[str] | None
) -> None:
    """The run goes on, with a warning of one line."""
    expected = f"{override}: has no effect; "
    if beside != []:
        record = Run(moe_lab.compose(quick.overrides(model, override))).record()
        assert [text for text in record.warnings if text.startswith(expected)]
    if beside is not None:
        record = Run(moe_lab.compose(quick.overrides(model, *beside, override))).record()
        assert not [text for text in record.warnings if text.startswith(expected)]


def test_a_layer_whose_router_does_not_run_is_said_to_be_its_experts() -> None:
    """With a forced load both values of `model.timed` are the same."""
    for load, says in (("native", False), ("zipf", True)):
        cfg = moe_lab.compose(quick.overrides("moe_layer", "model.timed=layer", f"workload.load={load}"))
        said = "model.timed=layer: has no effect; with workload.load other than native no router runs, so the experts "
        assert any(text.startswith(said) for text in Run(cfg).warnings) == says


def test_in_a_sweep_it_is_named_and_not_refused() -> None:
    """Another cell may use it; the keys of a sweep are used."""
    cfg = moe_lab.compose(quick.overrides("moe_layer"))
    typed = ["workload.zipf_exponent=2", "+workload.trace=x", "sweep.name=x", "measure.replicates=2", "batch=2"]
    cfg.workload.trace = "x"
    assert list(unread(cfg, typed, in_a_sweep=True)) == ["workload.zipf_exponent", "workload.trace"]
    cfg.workload.load = "zipf"
    assert list(unread(cfg, typed, in_a_sweep=True)) == ["workload.trace"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        pytest.param("batch=1", "batch", id="plain"),
        pytest.param("++a.b=x=y", "a.b", id="added"),
        pytest.param("~a.b", "a.b", id="deleted"),
        pytest.param("router@router.inner=soft", "router.inner", id="package"),
        pytest.param("model/shape=demo", "model.shape", id="nested-group"),
    ],
)
def test_where_an_override_stands(override: str, key: str) -> None:
    """In the configuration."""
    assert key_of(override) == key


@pytest.mark.parametrize(
    ("override", "in_a_sweep"),
    [
        pytest.param("hydra.run.dir=x", True, id="run-dir"),
        pytest.param("hydra.sweep.dir=x", False, id="sweep-dir"),
        pytest.param("hydra.sweep.subdir=x", False, id="subdir"),
        pytest.param("hydra/launcher=basic", False, id="launcher"),
        pytest.param("hydra.launcher.n_jobs=2", False, id="launcher-key"),
        pytest.param("hydra/sweeper=basic", False, id="sweeper"),
        pytest.param("+hydra.sweeper.params.batch=1", False, id="params"),
    ],
)
def test_hydras_own(override: str, in_a_sweep: bool) -> None:
    """Read in the other of the two only."""
    refuse_hydras_keys([override, "hydra.verbose=true"], in_a_sweep=not in_a_sweep)
    with pytest.raises(ValueError, match=r": has no effect; "):
        refuse_hydras_keys([override], in_a_sweep=in_a_sweep)


@pytest.mark.parametrize("override", [pytest.param(text, id=text) for text in ELSEWHERE])
def test_a_command_refuses_what_it_does_not_read(override: str) -> None:
    """`moe-lab generate`, for one."""
    read = ("model.*", "router.*", "seed", "workload", "workload.path")
    refuse_other_keys(["model=x", "model.path=x", "router@router.inner=x", "workload.path=x", "seed=1"], read, "it")
    with pytest.raises(ValueError, match=rf"^{override}: has no effect; it only uses model\.\*, "):
        refuse_other_keys([override], read, "it")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ["seed=0", "seed=3"],
            "seed=3: seed is given twice (seed=0); remove one, or write seed=0,3 with -m for both.",
            id="swept",
        ),
        pytest.param(
            ["hydra.sweeper.seed=0", "hydra.sweeper.seed=3"],
            "hydra.sweeper.seed=3: hydra.sweeper.seed is given twice (hydra.sweeper.seed=0); remove one.",
            id="hydras",
        ),
    ],
)  # fmt: skip
def test_two_values_of_a_key_are_named(words: list[str], message: str) -> None:
    """And -m is a remedy only for a key that can have several: none of Hydra's own."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        refuse_twice(words)


def test_every_rule_names_keys_that_exist() -> None:
    """In some option of the group."""
    composed = [
        moe_lab.compose(["model=decoder_moe", f"router={router}", "device=cpu"])
        for router in ("min_p", "deepseek_v2", "capacity")
    ] + [moe_lab.compose([f"model={model}", "device=cpu"]) for model in ("router", "moe_layer")]
    for rule in _RULES:
        for key in rule.keys.split():
            assert any(part_of(cfg, key) for cfg in composed), key


def part_of(cfg: object, key: str) -> bool:
    for part in key.split("."):
        if part not in cfg:  # type: ignore[operator]
            return False
        cfg = cfg[part]  # type: ignore[index]
    return True
