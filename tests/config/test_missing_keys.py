"""missing_keys.py: the message names the option without the key and those that have it, alone and in a sweep."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import moe_lab
from moe_lab.config.compose import composing_multirun
from moe_lab.sweep import multirun

ALONE = [
    pytest.param(
        ["router=torch", "router.temperature=0.5"],
        "router.temperature: router=torch has no such key; router=sinkhorn has it.",
        id="router",
    ),
    pytest.param(
        ["model=moe_layer", "model.n_layers=2"],
        "model.n_layers: model=moe_layer has no such key; model=decoder_moe, transformer_decoder have it.",
        id="model",
    ),
    pytest.param(
        ["workload.path=x"], "workload.path: workload=random has no such key; workload=text has it.", id="default"
    ),
    pytest.param(
        ["model=minimal", "model.path=x"], "model=minimal has no such key; model=checkpoint has it.", id="value-missing"
    ),
    pytest.param(
        ["measure.reference_router=torch", "measure.reference_router.iters=3"],
        "measure.reference_router=torch has no such key; measure.reference_router=sinkhorn has it.",
        id="reference",
    ),
    pytest.param(
        ["router=capacity", "router.inner.iters=3"],
        "router@router.inner=torch has no such key; router@router.inner=sinkhorn has it.",
        id="inner",
    ),
    pytest.param(["model.shape.top_k=3"], "model.shape: model=decoder_moe has no such key; model=moe_layer", id="node"),
    pytest.param(
        ["router.iters=1", "router.factor=2"],
        "router.iters: router=torch has no such key",
        id="two",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        ["router.temprature=1"],
        "router.temprature: unknown key. Did you mean router.temperature? router=torch has no such key; router=sink",
        id="misspelt",
    ),
    pytest.param(
        ["router.renormalise=1"], "Did you mean renormalize?", id="misspelt-of-its-own", marks=pytest.mark.slow
    ),
    pytest.param(["router.foo=1"], "router.foo: unknown key; router has ", id="of-no-router", marks=pytest.mark.slow),
    pytest.param(["batchh=1"], "batchh: unknown key", id="of-no-group"),
]


@pytest.mark.parametrize(("overrides", "says"), ALONE)
def test_the_message_names_the_option_and_who_has_the_key(overrides: list[str], says: str) -> None:
    """For every group, and within one; what nobody has is an unknown key as before."""
    with pytest.raises(ValueError) as refused:
        moe_lab.compose(overrides)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def own(folder: Path) -> Path:
    """A folder for `--config-dir` with two routers, one of which has a key of its own, and a broken one."""
    (folder / "router").mkdir(parents=True)
    target = "_target_: moe_lab.routers.softmax_topk.SoftmaxTopK\n"
    (folder / "router" / "plain.yaml").write_text(f"{target}name: plain\n")
    (folder / "router" / "mine.yaml").write_text(f"{target}name: mine\nstrength: 1\n")
    (folder / "router" / "broken.yaml").write_text("defaults: [/nothing/like_it]\nstrength: 1\n")
    (folder / "experiment").mkdir()
    return folder


def test_an_option_of_ones_own_is_among_them(tmp_path: Path) -> None:
    """Found in --config-dir; a file that cannot be composed is left out."""
    with pytest.raises(ValueError, match=r"^router\.strength: router=plain has no such key; router=mine has it\.$"):
        moe_lab.compose(["router=plain", "router.strength=2"], config_dir=own(tmp_path / "mine"))


def expanded(overrides: list[str], config_dir: Path | None = None) -> list[list[str]]:
    """The jobs of a multirun."""
    with composing_multirun(overrides, config_dir) as (loader, config):
        return multirun.expand(loader, config)


SWEPT = [
    pytest.param(
        ["router=sinkhorn,oea", "router.temperature=0.5"],
        "router.temperature: router=oea has no such key; router=sinkhorn has it. In place of router=sinkhorn,oea and "
        "router.temperature=0.5 write 'sweep.variants=[{router: sinkhorn, router.temperature: 0.5}, {router: oea}]'.",
        id="value",
    ),
    pytest.param(
        ["router=torch,sinkhorn", "router.iters=5,10"],
        "write 'sweep.variants=[{router: torch}, {router: sinkhorn, router.iters: 5}, {router: sinkhorn, "
        "router.iters: 10}]'.",
        id="axis",
    ),
    pytest.param(
        ["model=decoder_moe,minimal", "model.tie_embeddings=true"],
        "model.tie_embeddings: model=minimal has no such key; model=decoder_moe, transformer_decoder have it.",
        id="of-the-default",
    ),
    pytest.param(
        ["router=oea,torch", "router.iters=5"],
        "router=oea, torch have no such key; router=sinkhorn",
        id="none",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        ["router=glob(s*)", "router.iters=5"],
        "router=soft, sparse_mixer, switch have no such key",
        id="glob",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        ["sweep.variants=[{router: torch}, {router: sinkhorn, router.temperature: 0.25}]", "router.iters=5"],
        "Write it in the entries of router=sinkhorn in place of router.iters=5.",
        id="variants",
    ),
    pytest.param(
        ["sweep.variants=[{}, {router: sinkhorn}]", "router.iters=5"],
        "router.iters: router=torch has no such key; router=sinkhorn has it. Write it in the entries",
        id="empty-entry",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("overrides", "says"), SWEPT)
def test_in_a_sweep_the_remedy_is_an_entry(overrides: list[str], says: str) -> None:
    """Before a job is composed; the remedy is a sweep."""
    with pytest.raises(ValueError) as refused:
        expanded(overrides)
    assert says in str(refused.value)
    if "write 'sweep" in says:
        assert len(expanded([str(refused.value).split("'")[1]])) >= 2


@pytest.mark.parametrize(
    ("overrides", "n_jobs"),
    [
        pytest.param(["router=capacity,expert_choice", "router.factor=1.5"], 2, id="value"),
        pytest.param(["router=capacity,expert_choice", "router.factor=1.5", "++router.foo=1"], 2, id="and-added"),
        pytest.param(["router=capacity,expert_choice", "router.factor=1.5,2"], 4, id="axis"),
        pytest.param(["sweep.variants=[{router: sinkhorn}]", "router.iters=5", "router.tolerance=0"], 1, id="variants"),
    ],
)
def test_a_key_that_all_of_the_axis_have_is_set_in_each(overrides: list[str], n_jobs: int) -> None:
    """Though the group's default, with which Hydra composes the master configuration, has it not."""
    jobs = expanded(overrides)
    assert len(jobs) == n_jobs
    assert all(any(text.startswith("router.factor=") or text == "router.iters=5" for text in job) for job in jobs)


@pytest.mark.slow
def test_an_experiments_axes_count_too(tmp_path: Path) -> None:
    """Its `hydra.sweeper.params` and its entries."""
    folder = own(tmp_path / "mine")
    for number, content in enumerate(
        ("hydra: {sweeper: {params: {router: 'mine,plain'}}}", "sweep: {variants: [{router: mine}, {router: plain}]}")
    ):
        (folder / "experiment" / f"e{number}.yaml").write_text(f"# @package _global_\n{content}\n")
        with pytest.raises(ValueError, match=r"^router\.strength: router=plain has no such key; router=mine has it\. "):
            expanded([f"experiment=e{number}", "router.strength=2"], folder)


def test_a_single_run_reads_no_entries(tmp_path: Path) -> None:
    """An experiment may have them; the key is missing all the same."""
    (tmp_path / "experiment").mkdir()
    content = "# @package _global_\nsweep: {variants: [{router: sinkhorn}]}\n"
    (tmp_path / "experiment" / "x.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"^router\.iters: router=torch has no such key; router=sinkhorn has it\.$"):
        moe_lab.compose(["experiment=x", "router.iters=5"], config_dir=tmp_path)


@pytest.mark.slow
def test_the_answer_needs_no_torch() -> None:
    """From the command line, where a run would import it."""
    code = (
        "import sys; from moe_lab.cli.main import main; "
        "assert main(['router=torch', 'router.temperature=0.5']) == 2; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "moe-lab: router.temperature: router=torch has no such key; router=sinkhorn has it.\n"
