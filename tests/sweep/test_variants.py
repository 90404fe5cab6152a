"""`sweep.variants`: its cells are those that the same overrides typed alone have, whoever expands it."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig

import moe_lab
from moe_lab.cli import main as cli
from moe_lab.config.compose import composing_multirun, name_sweep
from moe_lab.config.hydra_patches import SWEEP_NAME
from moe_lab.records import identity
from moe_lab.sweep import multirun, plan
from moe_lab.sweep.in_process import InProcess
from moe_lab.sweep.plan import Plan
from tests import quick

START = [text for text in quick.overrides("moe_layer") if text not in ("batch=2", "seq_len=7")]
TWO = "sweep.variants=[{router: switch}, {router.temperature: 0.25, router: sinkhorn}]"
CELLS = [
    ["router=switch", "batch=1"],
    ["router=switch", "batch=8"],
    ["router.temperature=0.25", "router=sinkhorn", "batch=1"],
    ["router.temperature=0.25", "router=sinkhorn", "batch=8"],
]


def overrides_of(tmp_path: Path, *more: str) -> list[str]:
    """Those of a quick sweep into `tmp_path`, free in batch and seq_len."""
    return [*START, *more, f"hydra.sweep.dir={tmp_path}/s", "sweep.report=false"]


def alone(*more: str) -> DictConfig:
    """The configuration of a single run."""
    return moe_lab.compose([*START, *more])


def make(tmp_path: Path, *more: str, config_dir: Path | None = None) -> Plan:
    """The plan of a quick multirun."""
    with composing_multirun(overrides_of(tmp_path, *more), config_dir) as (loader, config):
        composer = multirun.JobComposer(loader, config)
        jobs = composer.jobs(multirun.expand(loader, config))
        return plan.make(jobs, tmp_path / "s", InProcess(), ["moe-lab"], composer.typed)


def experiment(tmp_path: Path, content: str, name: str = "x") -> Path:
    """A folder for `--config-dir` with an experiment."""
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(f"# @package _global_\n{content}\n")
    return folder.parent


@pytest.mark.slow
def test_a_cell_is_the_one_that_the_same_overrides_typed_alone_have(tmp_path: Path) -> None:
    """cell_id, folder and the overrides in the record; a group's option holds wherever it stands in the entry."""
    made = make(tmp_path, TWO, "batch=1,8")
    for cell, typed in zip(made.cells, CELLS, strict=True):
        cfg = alone(*typed)
        assert cell.cell_id == identity.cell_id(cfg)
        assert cell.directory.name == f"{identity.slug(cfg)}-{cell.cell_id}"
        (typed_alone,) = make(tmp_path, *typed).cells
        assert set(cell.config["overrides"]) == set(typed_alone.config["overrides"])
        assert cell.config["overrides"][: len(typed) - 1] == typed[:-1]
    assert [cell.variant for cell in made.cells] == ["switch", "switch", "sinkhorn", "sinkhorn"]
    assert len({cell.setting_id for cell in made.cells}) == 2


@pytest.mark.slow
def test_an_experiment_may_have_them_and_what_is_typed_holds(tmp_path: Path) -> None:
    """In --config-dir; its axes stay axes; `sweep.variants=null` takes its entries back."""
    mine = experiment(
        tmp_path,
        "sweep:\n  variants:\n    - router: switch\n    - router.temperature: 0.25\n      router: sinkhorn\n"
        "hydra: {sweeper: {params: {batch: '1,8'}}}",
    )
    made = make(tmp_path, "experiment=x", config_dir=mine)
    ids = [identity.cell_id(alone(*typed)) for typed in CELLS]
    assert sorted(cell.cell_id for cell in made.cells) == sorted(ids)
    other = make(tmp_path, "experiment=x", "sweep.variants=[{router: olmoe}]", "batch=2", config_dir=mine)
    assert [cell.variant for cell in other.cells] == ["olmoe"]
    none = make(tmp_path, "experiment=x", "sweep.variants=null", config_dir=mine)
    assert [(cell.variant, cell.content["batch"]) for cell in none.cells] == [("torch", 1), ("torch", 8)]


@pytest.mark.slow
def test_what_all_typed_entries_set_takes_the_place_of_an_experiments_axis(tmp_path: Path) -> None:
    """As a typed value does; a key of some entries only, or entries and an axis in one file, are a contradiction."""
    mine = experiment(tmp_path, "hydra: {sweeper: {params: {router: 'torch,olmoe', batch: '1,8'}}}")
    made = make(tmp_path, "experiment=x", TWO, "sweep.max_cells=4", config_dir=mine)
    assert [cell.cell_id for cell in made.cells] == [identity.cell_id(alone(*typed)) for typed in CELLS]
    more = make(tmp_path, "experiment=x", "sweep.variants=[{router: sinkhorn}]", "router.iters=5", config_dir=mine)
    assert [cell.content["router"]["iters"] for cell in more.cells] == [5, 5]
    with pytest.raises(
        ValueError, match=r"^sweep\.variants: router is an axis of the sweep too \(router=torch,olmoe\)"
    ):
        make(tmp_path, "experiment=x", "sweep.variants=[{router: switch}, {}]", config_dir=mine)
    both = experiment(tmp_path, "sweep: {variants: [{batch: 2}]}\nhydra: {sweeper: {params: {batch: '1,8'}}}", "y")
    with pytest.raises(ValueError, match=r"^sweep\.variants: batch is an axis of the sweep too"):
        make(tmp_path, "experiment=y", config_dir=both)


@pytest.mark.slow
def test_a_typed_key_of_all_entries_takes_the_place_of_an_experiments_variants(tmp_path: Path) -> None:
    """An axis or one value; a key that only some of them set is an error, as it is not said which of the two holds."""
    mine = experiment(tmp_path, f"sweep: {{variants: {TWO.partition('=')[2]}}}")
    made = make(tmp_path, "experiment=x", "router=olmoe,oea,hash", "batch=1", config_dir=mine)
    assert [cell.variant for cell in made.cells] == ["olmoe", "oea", "hash"]
    assert [cell.variant for cell in make(tmp_path, "experiment=x", "router=oea", config_dir=mine).cells] == ["oea"]
    with pytest.raises(ValueError, match=r"router\.temperature: .*in the entries"):
        make(tmp_path, "experiment=x", "router.temperature=1", config_dir=mine)


def test_a_typed_value_takes_the_place_of_an_experiments_axis_in_the_limit_too(tmp_path: Path) -> None:
    """Two cells, not four."""
    mine = experiment(tmp_path, "hydra: {sweeper: {params: {batch: '1,8'}}}")
    assert len(make(tmp_path, "experiment=x", "batch=2,3", "sweep.max_cells=2", config_dir=mine).cells) == 2


def test_an_option_and_its_keys_as_a_mapping_are_two_overrides(tmp_path: Path) -> None:
    """`model/shape=` and `model.shape=` are the same place, but not the same override."""
    made = make(tmp_path, "model/shape=demo", "model.shape={top_k: 3}", "sweep.variants=[{router: switch}]")
    (shape,) = (cell.content["model"]["shape"] for cell in made.cells)
    assert (shape["name"], shape["top_k"]) == ("demo", 3)


def test_entries_may_be_empty_equal_and_uneven(tmp_path: Path) -> None:
    """{} is the configuration as it is; equal entries are one cell; a key may stand in one entry only."""
    made = make(tmp_path, "sweep.variants=[{}, {router: switch, dtype: bf16}, {seq_len: 4}, {router: torch}]")
    seen = [(c.content["router"]["name"], c.content["dtype"]["name"], c.content["seq_len"]) for c in made.cells]
    assert seen == [("torch", "fp32", 128), ("switch", "bf16", 128), ("torch", "fp32", 4)]
    assert made.n_equal == 1
    assert len({cell.setting_id for cell in made.cells}) == 3, "dtype and seq_len are not compared: other settings"
    compared = make(tmp_path, "sweep.variants=[{}, {router: switch, dtype: bf16}]", "sweep.compare=[router,dtype]")
    assert len({cell.setting_id for cell in compared.cells}) == 1
    assert [cell.variant for cell in compared.cells] == ["torch/fp32", "switch/bf16"]


def test_variants_are_named_by_what_differs(tmp_path: Path) -> None:
    """Two of one router by their keys, the other by its name."""
    entries = (
        "{router: switch}, {router: sinkhorn, router.temperature: 0.25}, {router: sinkhorn, router.temperature: 0.5}"
    )
    made = make(tmp_path, f"sweep.variants=[{entries}]")
    assert [cell.variant for cell in made.cells] == [
        "switch",
        "sinkhorn(temperature=0.25)",
        "sinkhorn(temperature=0.5)",
    ]


def test_anchor_and_exclude_take_the_same_keys(tmp_path: Path) -> None:
    """Dotted beside nested; the anchor of each setting, and one cell left out."""
    made = make(
        tmp_path,
        TWO,
        "batch=1,8",
        "sweep.anchor={router: sinkhorn, router.temperature: [0.25, 0.5]}",
        "sweep.exclude=[{router: switch, router.impl: auto, batch: 8, model.shape.n_experts: 5}]",
    )
    assert [cell.status for cell in made.cells] == ["to do", "excluded", "to do", "to do"]
    for setting in {cell.setting_id for cell in made.cells}:
        anchor = made.anchor_of(setting)
        assert anchor is not None and anchor.variant == "sinkhorn"
    with pytest.raises(ValueError, match=r"^sweep\.anchor=.*no cell of the sweep is like this"):
        make(tmp_path, TWO, "sweep.anchor={router: sinkhorn, router.temperature: 0.5}")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        pytest.param(
            [TWO, "router=torch"], "sweep.variants: router is set for all cells too (router=torch)", id="typed"
        ),
        pytest.param([TWO, "router=torch,olmoe"], "sweep.variants: router is an axis of the sweep too", id="axis"),
        pytest.param(
            [TWO, "batch=1,2,3", "sweep.max_cells=5"], "6 cells (2 of sweep.variants * 3 of batch)", id="many"
        ),
        pytest.param([f"{TWO},[{{router: torch}}]"], "not an axis; type one list of entries", id="axis-of-lists"),
        pytest.param([TWO, "hydra/sweeper=basic"], "sweep.variants: only hydra/sweeper=moe_lab", id="other-sweeper"),
        pytest.param(
            ["sweep.variants=[{router: choice(torch,switch)}]"],
            "choice(), range() and glob() make an axis",
            id="choice",
        ),
        pytest.param(["sweep.variants=[{batch: 0}]"], "batch=0: must be a number >= 1", id="value"),
        pytest.param(["sweep.variants=[{router: hahs}]"], "router=hahs: unknown option", id="option"),
        pytest.param(["sweep.variants=[{rooter: hash}]"], "rooter: unknown key", id="key"),
        pytest.param(
            ["sweep.variants=[{router: switch, router.iters: 5}]"],
            "router.iters: router=switch has no such key; router=sinkhorn has it.",
            id="key-of-another",
        ),
        pytest.param(
            ["router=olmoe", "router.iters=5,6"], "router=olmoe has no such key; router=sinkhorn", id="no-axis"
        ),
        pytest.param(["sweep.variants=[{router.name: hash}]"], "router.name labels the option", id="label"),
        pytest.param(
            ["sweep.variants=[{router: switch}, {router: top_p, router.threshold: 0.5, router.calibration_tokens: 9}]"],
            "router.calibration_tokens=9: has no effect",
            id="without-effect-where-it-is-set",
        ),
    ],
)
@pytest.mark.slow
def test_a_mistake_is_one_line(more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From `plan` as from the sweep; nothing is left behind."""
    for words in (["plan"], ["-m", "sweep.worker=false"]):
        assert cli.main([*words, *overrides_of(tmp_path, *more)]) == 2
        captured = capsys.readouterr()
        assert says in captured.err
        assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "s").exists()


def test_in_a_single_run_it_has_no_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the other keys of a sweep."""
    assert cli.main([*START, TWO, f"hydra.run.dir={tmp_path}/r"]) == 2
    assert "has no effect; only used in a sweep (-m)." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(
            "sweep: {variants: [{export.dir: /tmp/x}]}", "sweep.variants.export.dir: a YAML must not", id="place"
        ),
        pytest.param("sweep: {variants: [{sweep: {name: x}}]}", "sweep.variants.sweep: a YAML must not", id="above"),
        pytest.param("sweep: {variants: [{hydra/launcher: basic}]}", "a YAML must not sweep over it", id="hydra"),
        pytest.param("sweep: {variants: {router: switch}}", "must be a list of entries", id="mapping"),
        pytest.param(
            "hydra: {sweeper: {params: {sweep.variants: '[{router: switch}]'}}}", "write it in a YAML file", id="params"
        ),
    ],
)
def test_a_yaml_may_not_say_where_files_go(content: str, says: str, tmp_path: Path) -> None:
    """An entry becomes what a person types, so it is looked at as the axes of a YAML are."""
    with pytest.raises(ValueError) as refused:
        make(tmp_path, "experiment=x", config_dir=experiment(tmp_path, content))
    assert says in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        pytest.param("sweep: {variants: [{router: switch}]}", id="variants"),
        pytest.param("sweep: {exclude: [{router: switch}]}", id="exclude"),
        pytest.param("hydra: {sweeper: {params: {batch: '1,8'}}}", id="axes"),
    ],
)
def test_an_experiment_of_some_cells_says_nothing_of_the_sweep(content: str, tmp_path: Path) -> None:
    """It would be read nowhere. One that sets other keys only may be an axis, and stand in an entry."""
    mine = experiment(tmp_path, content)
    experiment(tmp_path, "router: {top_k: 3}", "y")
    axes = ["experiment=y,x", "sweep.variants=[{experiment: y}, {experiment: x}]"]
    for more in axes[: 1 if "variants" in content else 2]:  # what is typed holds
        with pytest.raises(ValueError, match=r"has no effect in an experiment that only some cells have.*experiment=x"):
            make(tmp_path, more, config_dir=mine)
    made = make(tmp_path, "sweep.variants=[{}, {experiment: y}]", config_dir=mine)
    assert [cell.content["router"]["top_k"] for cell in made.cells] == [None, 3]


PAGE = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text()
COMMANDS = [shlex.split(line, comments=True)[2:] for line in re.findall(r"^moe-lab -m .+$", PAGE, re.MULTILINE)]


@pytest.mark.parametrize("words", [pytest.param(words, id=words[0][:40]) for words in COMMANDS])
@pytest.mark.slow
def test_the_commands_of_the_page_are_sweeps(words: list[str], tmp_path: Path) -> None:
    """The page's first one has the number of cells that it says; an anchor and an exclude match cells."""
    with composing_multirun([*words, "device=cpu", f"hydra.sweep.dir={tmp_path}/s"], None) as (loader, config):
        composer = multirun.JobComposer(loader, config)
        jobs = composer.jobs(multirun.expand(loader, config))
        made = plan.make(jobs, tmp_path / "s", InProcess(), ["moe-lab"], composer.typed)
    assert made.without_effect == []
    numbers = {"sweep.variants": 6, "experiment": 8, "router": 4, "model": 2}  # by the first key, or the first word
    numbers |= {"experiment=quality_speed": 30}
    assert len(made.cells) == (numbers.get(words[0]) or numbers[words[0].partition("=")[0]])
    assert ("excluded" in {cell.status for cell in made.cells}) == ("exclude" in words[-1])


@pytest.mark.slow
def test_the_yaml_of_the_page_is_a_sweep(tmp_path: Path) -> None:
    """Three entries, the last of which changes nothing."""
    (content,) = re.findall(r"```yaml\n# @package _global_\n(.*?)```", PAGE, re.DOTALL)
    made = make(tmp_path, "experiment=x", config_dir=experiment(tmp_path, content))
    assert [cell.variant for cell in made.cells] == ["torch", "sinkhorn"]
    assert made.n_equal == 1


@pytest.fixture
def _name() -> Iterator[None]:
    before = os.environ.get(SWEEP_NAME)
    yield
    os.environ.pop(SWEEP_NAME, None)
    if before is not None:
        os.environ[SWEEP_NAME] = before


@pytest.mark.usefixtures("_name")
def test_other_variants_are_another_sweep() -> None:
    """Its name is a hash of what was typed; of the sweep's other keys it is free."""
    names = []
    for words in ([TWO], [TWO, "sweep.max_cells=5"], ["sweep.variants=[{router: switch}]"], []):
        name_sweep(["batch=1,8", *words])
        names.append(os.environ[SWEEP_NAME])
    assert names[0] == names[1]
    assert len(set(names)) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [pytest.param("moe_lab", id="moe_lab"), pytest.param("basic", id="basic", marks=pytest.mark.slow)],
)
def test_a_sweep_runs_resumes_and_says_its_command(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With our launcher from a YAML file, with one of Hydra's as typed: the same cells, and nothing is done twice."""
    monkeypatch.chdir(tmp_path)
    mine = experiment(tmp_path, f"sweep: {{variants: {TWO.partition('=')[2]}}}")
    ours = ["--config-dir", str(mine), "experiment=x", "sweep.worker=false"]
    words = ["-m", *(ours if launcher == "moe_lab" else [TWO]), *overrides_of(tmp_path, "batch=1,8")]
    words += [f"hydra/launcher={launcher}"]
    monkeypatch.setattr("sys.argv", ["moe-lab", *words])
    assert cli.main(words) == 0
    content = json.loads((tmp_path / "s" / "plan.json").read_text())
    wanted = [identity.cell_id(alone(*typed)) for typed in CELLS]
    assert [cell["cell_id"] for cell in content["cells"]] == wanted
    assert content["commands"] == [["moe-lab", *words]]
    records = {json.loads(path.read_text())["cell_id"] for path in (tmp_path / "s").glob("*/result.json")}
    assert records == set(wanted)
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "0 to run" in capsys.readouterr().err
