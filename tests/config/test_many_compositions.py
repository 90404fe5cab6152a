"""Compositions that share what they have in common are those that Hydra makes one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import moe_lab
from moe_lab.config import hydra_patches, many_compositions
from moe_lab.config.compose import composing_multirun

JOBS = (
    ["batch=1"],
    ["batch=2"],
    ["batch=2", "seq_len=8"],
    ["router=sinkhorn", "batch=2"],
    ["router=sinkhorn", "router.n_iter=3", "batch=1"],
    ["router=softmax_topk", "batch=2"],
    ["experts=loop", "model.n_layers=3"],
    ["model=decoder_moe", "router@measure.reference_router=torch"],
    ["model=decoder_moe", "router@measure.reference_router=sinkhorn", "batch=2"],
    ["model=moe_layer", "model/shape=tiny"],
    ["model=moe_layer", "+model.shape.note=a", "batch=2"],
    ["+extra={a: [1, 2]}"],
    ["+extra={a: [1, 3]}"],
    ["~measure.roofline"],
    ["hydra.job.name=x", "batch=1"],
    ["experiment=router_swap", "batch=1"],
    ["experiment=router_swap", "batch=3", "name='a b=c'"],
    ["batch=1"],
)


class HydrasOwn(ConfigLoaderImpl):
    """Remembers nothing."""

    load_configuration = hydra_patches._load_configuration


def _composed(loader: ConfigLoader, master: DictConfig, overrides: list[str]) -> tuple[str, object]:
    """The configuration with its flags and interpolations, or the error."""
    try:
        cfg = loader.load_sweep_config(master, list(overrides))
    except HydraException as error:
        return f"{type(error).__name__}: {error}", None
    flags = [OmegaConf.is_struct(cfg[key]) for key in cfg if OmegaConf.is_dict(cfg[key])]
    types = [OmegaConf.get_type(cfg, str(key)) for key in cfg]
    return OmegaConf.to_yaml(cfg), (flags, types, OmegaConf.is_struct(cfg), cfg.hydra.runtime.choices)


@pytest.mark.parametrize(
    "typed",
    [
        pytest.param([], id="plain", marks=pytest.mark.slow),
        pytest.param(["model=decoder_moe"], id="option", marks=pytest.mark.slow),
    ],
)
def test_equal_to_hydras_own(typed: list[str]) -> None:
    """In any order, and again after a job was changed."""
    with composing_multirun(typed, None) as (loader, master):
        hydras = HydrasOwn(loader.get_search_path())
        alone = [_composed(hydras, master, job) for job in JOBS]
        for in_a_sweep in (False, True):
            many_compositions.remember(loader, in_a_sweep)
            for _ in range(2):
                assert [_composed(loader, master, job) for job in JOBS] == alone
        assert sum(known is not None for _, known in alone) >= 14
        changed = loader.load_sweep_config(master, ["batch=1"])
        changed.router.name, changed.hydra.job.name = "changed", "changed"
        changed.overrides = ["changed"]
        assert _composed(loader, master, ["batch=1"]) == alone[0]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        pytest.param(["router=nothing"], "Could not find 'router/nothing'", id="option"),
        pytest.param(["nothing=1"], "Could not override 'nothing'", id="key"),
        pytest.param(["batch=[1"], "no viable alternative", id="grammar"),
        pytest.param(["+router@x.y=torch", "x.y.z=1"], "Key 'x' not in", id="added"),
    ],
)
def test_a_mistake_is_raised_each_time(job: list[str], message: str) -> None:
    """Nothing of it is remembered."""
    with composing_multirun([], None) as (loader, master):
        many_compositions.remember(loader, in_a_sweep=True)
        for _ in range(2):
            with pytest.raises(HydraException, match=message):
                loader.load_sweep_config(master, job)


def test_a_search_path_of_its_own(tmp_path: Path) -> None:
    """A job that searches in another folder finds its options there, the next one does not."""
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "mine.yaml").write_text("name: mine\n_target_: moe_lab.routers.sinkhorn.Sinkhorn\n")
    with composing_multirun([], None) as (loader, master):
        many_compositions.remember(loader, in_a_sweep=True)
        loader.load_sweep_config(master, ["router=sinkhorn"])
        found = loader.load_sweep_config(master, [f"hydra.searchpath=[file://{tmp_path}]", "router=mine"])
        assert found.router.name == "mine"
        with pytest.raises(HydraException):
            loader.load_sweep_config(master, ["router=mine"])


@pytest.mark.slow
def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was forgotten is composed again."""
    monkeypatch.setattr(many_compositions, "_MOST", 1)
    monkeypatch.setattr(many_compositions, "_of_packages", many_compositions._Known())
    jobs = [["router=sinkhorn"], ["router=torch"], ["router=sinkhorn"]]
    with composing_multirun([], None) as (loader, master):
        many_compositions.remember(loader, in_a_sweep=True)
        assert [loader.load_sweep_config(master, job).router.name for job in jobs] == ["sinkhorn", "torch", "sinkhorn"]
        known = many_compositions.known_of_packages()
        assert len(known.defaults) == len(known.merged) == 1


def test_a_persons_own_files_are_read_again(tmp_path: Path) -> None:
    """What he edits between two compositions counts, and another folder has other options."""
    option = tmp_path / "one" / "router" / "mine.yaml"
    for folder in ("one", "other"):
        (tmp_path / folder / "router").mkdir(parents=True)
    for iters in (3, 4):
        option.write_text(f"defaults: [sinkhorn]\niters: {iters}\nname: mine\n")
        assert moe_lab.compose(["router=mine"], config_dir=option.parent.parent).router.iters == iters
    with pytest.raises(ValueError, match="router=mine"):
        moe_lab.compose(["router=mine"], config_dir=tmp_path / "other")
    with pytest.raises(ValueError, match="router=mine"):
        moe_lab.compose(["router=mine"])


def test_an_entry_may_name_another_choice(tmp_path: Path) -> None:
    """Hydra is not asked for the choices in vain, but here it is."""
    for option, content in {
        "router/mine": "defaults: [sinkhorn, /_mine/of@_here_: '${experts}']\nname: mine\n",
        "_mine/of/grouped": "iters: 3\n",
        "_mine/of/loop": "iters: 4\n",
    }.items():
        (tmp_path / option).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{option}.yaml").write_text(content)
    for experts, iters in (("grouped", 3), ("loop", 4)):
        cfg = moe_lab.compose(["router=mine", f"experts={experts}"], config_dir=tmp_path)
        assert cfg.router.iters == iters


def test_what_is_stored_in_a_program_counts_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra's ConfigStore: an option that was not there, and then another one under its name."""
    monkeypatch.setattr(ConfigStore.instance(), "repo", dict(ConfigStore.instance().repo))
    with pytest.raises(ValueError, match="debug=mine"):
        moe_lab.compose(["debug=mine"])
    for batch in (3, 4):
        ConfigStore.instance().store(group="debug", name="mine", node={"batch": batch}, package="_global_")
        assert moe_lab.compose(["debug=mine"]).batch == batch
    with composing_multirun([], None) as (loader, _):
        for batch in (5, 6):
            ConfigStore.instance().store(group="debug", name="mine", node={"batch": batch}, package="_global_")
            assert loader.load_configuration("config", ["debug=mine"], RunMode.RUN).batch == batch
