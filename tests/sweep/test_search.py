"""sweep/search.py: searches through plan, lock, worker and records, over a number that is a function of the keys.

`memory.parameters_mb` of `model=minimal` is that of its matrix, so what a search finds can be known: no time is in it.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import moe_lab
from moe_lab.cli.main import main
from moe_lab.config.compose import composing_multirun
from moe_lab.records import search as searches
from moe_lab.records.search import FILE, Search
from moe_lab.sweep import search
from tests import quick
from tests.sweep import faulty

pytestmark = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="pip install 'moe-lab[search]'")
SEARCH = ["hydra/sweeper=moe_lab_optuna", "sweep.report=false", "measure.max_time_s=0.001"]
SEARCH += ["sweep.compare=[router,model]"]
ALONE = "sweep.interleave=false"  # in rounds a cell takes half a second
FOR = "hydra.sweeper.objectives"
SIZE, SPACE = f"{FOR}=[maximize parameters_mb]", "model.hidden=range(8,56,8)"


def words(*more: str, worker: bool = False) -> list[str]:
    base = [text for text in quick.overrides("minimal", *SEARCH) if not text.startswith("model.hidden=")]
    return [*base, f"sweep.worker={str(worker).lower()}", *more]


def journal(folder: Path) -> Search:
    found = searches.read(folder)
    assert found is not None
    return found


def hidden(record: Any) -> int:
    return int(record.config["model"]["hidden"])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_search_finds_the_largest_and_ends_when_the_space_is_exhausted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six sizes are six trials, however many are asked for; again, nothing is measured. A larger number goes on."""
    asked = words(SIZE, SPACE, ALONE, "sweep.name=s")
    some = moe_lab.multirun([*asked, "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2"])
    assert len(some) == 4 and {record.status for record in some} == {"ok"}
    assert [trial.batch for trial in journal(some.directory).trials] == [0, 0, 1]
    found = moe_lab.multirun([*asked, "hydra.sweeper.n_trials=99"])
    printed = capsys.readouterr().err
    assert (
        "the space is exhausted, no combination is left beside the 6 tried" in printed
        and "trials 4 to 6 of 99" in printed
    )
    assert "outputs/s: 4 cells, 3 done; 1 to run, trial 3 of 3" in printed
    assert {hidden(record) for record in found} == {*range(8, 56, 8), 1024}  # that of the default
    trials = journal(found.directory).trials
    assert len(trials) == 6 and [trial.cell_id for trial in trials[:3]] == [
        trial.cell_id for trial in journal(some.directory).trials[:3]
    ]
    started = {record.cell_id: record.started for record in found}
    again = moe_lab.multirun([*asked, "hydra.sweeper.n_trials=99"])
    assert {record.cell_id: record.started for record in again} == started


@pytest.mark.slow
def test_trials_are_ordinary_cells_beside_the_default(tmp_path: Path) -> None:
    """The cell_ids of the same words typed alone; each has a ratio to the default, which runs along in all batches."""
    found = moe_lab.multirun(words(SIZE, SPACE, "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2"))
    asked = journal(found.directory)
    records = {record.cell_id: record for record in found}
    for trial in asked.trials:
        alone = moe_lab.compose([*quick.overrides("minimal", "measure.max_time_s=0.001", *trial.overrides)])
        record = records[str(trial.cell_id)]
        assert hidden(record) == alone.model.hidden
        assert record.ratio_to_anchor is not None and record.ratio_to_anchor.anchor == asked.default
    assert records[str(asked.default)].ratio_to_anchor is None
    plan = json.loads((found.directory / "plan.json").read_text())
    assert [cell["cell_id"] for cell in plan["cells"]] == [asked.default, *(trial.cell_id for trial in asked.trials)]
    assert len({cell["variant"] for cell in plan["cells"]}) == 5  # named together, not batch by batch


@pytest.mark.slow
def test_a_cell_that_two_trials_have_is_timed_once(tmp_path: Path) -> None:
    """A key that a cell does not read makes another choice and no other cell."""
    space = [SPACE.replace("56", "24"), "seq_len=1,2,3,4,5"]  # model=minimal does not read seq_len
    found = moe_lab.multirun(words(SIZE, *space, ALONE, "hydra.sweeper.n_trials=99", "sweep.name=twice"))
    asked = journal(found.directory)
    assert len(asked.trials) == 10 and len({trial.cell_id for trial in asked.trials}) == 2
    assert len(found) == 3


def test_a_failed_trial_is_a_row_and_so_is_one_that_cannot_run(tmp_path: Path) -> None:
    """The search goes on to the end of the space."""
    plugin = faulty.plugin(tmp_path / "mine")
    start = quick.overrides("moe_layer", *SEARCH, "sweep.worker=false", "sweep.name=f", ALONE)
    entries = "sweep.variants=[{router: raise}, {router: torch, router.top_k: 'range(2,10,7)'}]"
    found = moe_lab.multirun([*start, SIZE, entries], config_dir=plugin)
    asked = journal(found.directory)
    rows = {record.cell_id: searches.row_of(record) for record in found}
    states = {" ".join(trial.overrides): asked.outcome(rows[str(trial.cell_id)]) for trial in asked.trials}
    assert {name: outcome.state for name, outcome in states.items()} == {
        "router=raise": "failed",
        "router=torch router.top_k=2": "ok",
        "router=torch router.top_k=9": "pruned",
    }
    assert "planted" in str(states["router=raise"].reason)
    assert "router.top_k" in str(states["router=torch router.top_k=9"].reason)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        pytest.param([SPACE, f"{FOR}=[minimize latancy_ms]"], "Did you mean latency_ms?", id="column"),
        pytest.param([SPACE, f"{FOR}=[minimise latency_ms]"], "must be minimize or maximize", id="direction"),
        pytest.param([SPACE, f"{FOR}=[latency_ms]"], "must be minimize or maximize", id="no-direction"),
        pytest.param([SPACE, f"{FOR}=[]"], "write one or two", id="no-objective"),
        pytest.param([SPACE, f"{FOR}=[minimize peak_mb,maximize peak_mb]"], "stands twice", id="twice"),
        pytest.param(["model.hidden=interval(9,1)"], "the first end must be less", id="axis"),
        pytest.param(["batch=interval(1.0,8.5)"], "batch=interval(1.0,8.5): batch is a whole number", id="no-whole"),
        pytest.param(["model.hidden=interval(1.5,8)"], "write int(interval(1,8)).", id="whole"),
        pytest.param(["model.hidden=8"], "nothing is searched", id="no-axis"),
        pytest.param([SPACE, "hydra.sweeper.sampler=nsga3"], "Did you mean nsga2?", id="sampler"),
        pytest.param([SPACE, "hydra.sweeper.n_jobs=0"], "hydra.sweeper.n_jobs=0: must be", id="jobs"),
        pytest.param([SPACE, "hydra.sweeper.constraints={peak_mb: 3}"], "must be limits", id="limit"),
        pytest.param([SPACE, "hydra.sweeper.constraints={peak_mb: {most: 3}}"], "must be limits", id="end"),
        pytest.param([SPACE, "hydra.sweeper.constraints={peak: {max: 3}}"], "not a column of numbers", id="of-nothing"),
        pytest.param([SPACE, "hydra.sweeper.constraints={peak_mb: {max: nan}}"], "must be limits", id="nan"),
        pytest.param([SPACE, "hydra.sweeper.constraints={peak_mb: {min: -inf}}"], "must be limits", id="infinite"),
        pytest.param(
            [SPACE, "hydra.sweeper.constraints={peak_mb: {min: 5, max: 1}}"], "min must not be more", id="no-value"
        ),
        pytest.param(
            [SPACE, "hydra.sweeper.constraints={peak_mb: {max: 5}, memory.peak_mb: {min: 1}}"],
            "constraints: memory.peak_mb stands twice",
            id="limits-twice",
        ),
        pytest.param([SPACE, "tracker=mlflow,tensorboard"], "several trackers are tracker=[A,B]", id="trackers"),
        pytest.param([SPACE, "sweep.max_cells=5"], "these are up to 6 trials", id="cells"),
        pytest.param(
            ["model.norm_eps=interval(0.1,0.9)", "sweep.max_cells=39"],
            "sweep.max_cells=40.",
            id="cells-of-an-interval",
        ),
        pytest.param([SPACE, "sweep.anchor={router: torch}"], "has no effect in a search", id="anchor"),
        pytest.param(
            [SPACE, f"{FOR}=[minimize ratio_to_anchor]", "sweep.compare=[router]"],
            "set sweep.compare=[router,model]",
            id="not-compared",
        ),
        pytest.param(
            [f"{FOR}=[minimize ratio_to_anchor]", "seed=0,37", "batch=2"],
            "seed is searched and not compared, so trials are not timed beside the default; give seed one value, or "
            "use latency_ms. hydra.sweeper.seed is that of the sampler.",
            id="seeds",
        ),
    ],
)
def test_a_mistake_is_a_line(more: Sequence[str], says: str) -> None:
    """It names the key and the remedy."""
    with pytest.raises(ValueError) as error, composing_multirun(words(*more), None) as (loader, config):
        search.read(loader, config)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_entry_may_search_a_key_that_the_default_lacks() -> None:
    """`router.threshold` is one of `router=top_p` only."""
    typed = quick.overrides(
        "moe_layer", *SEARCH, "sweep.variants=[{router: top_p, router.threshold: 'interval(0.1,0.9)'}]"
    )
    with composing_multirun(typed, None) as (loader, config):
        assert search.read(loader, config).space.searched() == {"router", "router.threshold"}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([f"{FOR}=[minimize latancy_ms]"], id="column"),
        pytest.param(["model.hiden=range(1,9)"], id="key"),
        pytest.param(["hydra/launcher=basic"], id="launcher"),
    ],
)
def test_a_mistake_leaves_nothing(more: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, as for every mistake."""
    assert main(["-m", *words(SPACE, *more)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_another_search_in_the_folder_is_refused(tmp_path: Path) -> None:
    """What it asked for stays; a fixed key that changes the default is another search, too."""
    asked = words(SIZE, ALONE, "sweep.name=s", "hydra.sweeper.n_trials=1")
    moe_lab.multirun([*asked, SPACE])
    before = (tmp_path / "outputs/s" / FILE).read_bytes()
    for more, how in (
        (["hydra.sweeper.seed=1", SPACE], r"has hydra\.sweeper\.seed=0, this one 1"),
        (["hydra.sweeper.sampler=random", SPACE], r"has hydra\.sweeper\.sampler=tpe, this one random"),
        (["model.hidden=range(8,64,8)"], "differs in space"),
        ([SPACE, "dtype=bf16"], "differs in default"),
    ):
        with pytest.raises(ValueError, match=f"the search there {how}, and .*sweep.name=NAME"):
            moe_lab.multirun([*asked, *more])
    assert (tmp_path / "outputs/s" / FILE).read_bytes() == before


@pytest.mark.slow
def test_an_objective_that_nothing_records_ends_the_search_at_once(tmp_path: Path) -> None:
    """After the first batch; then it can be begun again with another."""
    asked = words(SPACE, ALONE, "sweep.name=s", "hydra.sweeper.n_trials=2")
    with pytest.raises(ValueError, match=r"no trial has recorded quality\.bits_per_byte; needs workload=text"):
        moe_lab.multirun([*asked, "hydra.sweeper.objectives=[minimize bits_per_byte]"])
    assert len(moe_lab.multirun([*asked, SIZE])) == 3


@pytest.mark.slow
def test_a_default_that_is_excluded_is_the_reason_why_no_trial_has_a_ratio(tmp_path: Path) -> None:
    """The line has the remedy, and comes before trials are timed; without the exclusion the same search runs."""
    asked = words(SPACE, f"{FOR}=[minimize ratio_to_anchor]", "sweep.name=s", "hydra.sweeper.n_trials=2")
    with pytest.raises(ValueError, match=r"the default has no result \(excluded\); leave it out of sweep\.exclude"):
        moe_lab.multirun([*asked, "sweep.exclude=[{model.hidden: 1024}]"])
    assert [record.status for record in faulty.records_list(tmp_path)] == ["skipped"]
    assert len(moe_lab.multirun(asked)) == 3


@pytest.mark.slow
def test_trials_that_were_timed_without_the_default_have_no_ratio(tmp_path: Path) -> None:
    """Then a name of its own is the remedy."""
    asked = words(SPACE, f"{FOR}=[minimize ratio_to_anchor]", "sweep.name=s")
    typed = [word for word in asked if not word.startswith(("hydra/sweeper", "hydra.sweeper"))]
    moe_lab.multirun(typed)
    with pytest.raises(ValueError, match=r"timed without the default; use another sweep\.name"):
        moe_lab.multirun(asked)


@pytest.mark.slow
def test_plan_shows_the_first_batch_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trials that the search then asks for."""
    asked = words(SIZE, SPACE, ALONE, "sweep.name=s", "hydra.sweeper.n_trials=3")
    assert main(["plan", *asked]) == 0
    output = capsys.readouterr().out
    assert "a search: the default and 3 of 3 trials, from 6 combinations" in output
    assert not (tmp_path / "outputs").exists()
    moe_lab.multirun(asked)
    assert all(str(trial.cell_id) in output for trial in journal(tmp_path / "outputs/s").trials)


@pytest.mark.slow
def test_without_optuna_it_says_what_to_install(tmp_path: Path) -> None:
    """In a process whose Optuna is hidden; an ordinary sweep needs none."""
    code = (
        "import importlib.util, sys; real = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'optuna' else real(name, *rest);"
        "from moe_lab.cli.main import main; sys.exit(main())"
    )
    done = subprocess.run(
        [faulty.MOE_LAB[0], "-c", code, "-m", *words(SPACE)], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr == "moe-lab: hydra/sweeper=moe_lab_optuna needs Optuna; run pip install 'moe-lab[search]'.\n"
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"seed-{seed}") for seed in range(2)])
def test_a_killed_search_goes_on_as_one_that_was_not(seed: int, tmp_path: Path) -> None:
    """kill -9 of a real process at some points: the same trials, no cell twice, and none that was ok runs again."""
    asked = [
        SIZE,
        "model.hidden=int(interval(8,400))",
        ALONE,
        "hydra.sweeper.n_trials=8",
        f"hydra.sweeper.seed={seed}",
    ]
    moe_lab.multirun(words(*asked, "sweep.name=whole"))
    whole = journal(tmp_path / "outputs/whole")
    typed = [*faulty.MOE_LAB, "-m", *words(*asked, "sweep.name=s", worker=True)]
    kills, done = 0, {}
    while True:
        process = subprocess.Popen(typed, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kills < 2:
            wait_for(tmp_path / "outputs/s", process, 2 + 4 * kills)
            time.sleep(0.05 * seed)
            process.send_signal(signal.SIGKILL)
        process.wait(timeout=300)
        kills += process.returncode == -signal.SIGKILL
        for record in faulty.records_list(tmp_path):
            assert done.setdefault(record.cell_id, record.started) == record.started, "a cell that was ok ran again"
        if process.returncode == 0:
            break
    found = journal(tmp_path / "outputs/s")
    assert kills >= 2 and found == whole
    assert sorted(done) == sorted({str(found.default), *(str(trial.cell_id) for trial in found.trials)})


def wait_for(folder: Path, process: subprocess.Popen[bytes], n: int) -> None:
    """Until there are n results, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and len(list(folder.glob("*/result.json"))) < n:
        time.sleep(0.005)


@pytest.mark.slow
def test_the_command_line_searches_as_python_does(tmp_path: Path) -> None:
    """`-m hydra/sweeper=moe_lab_optuna`; slots too."""
    asked = [SIZE, SPACE, ALONE, "hydra.sweeper.n_trials=5"]
    moe_lab.multirun(words(*asked, "sweep.name=python"))
    typed = words(*asked, "sweep.name=typed", "sweep.slots.cpu=1", worker=True)
    done = subprocess.run([*faulty.MOE_LAB, "-m", *typed], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    python, typed_ = (journal(tmp_path / "outputs" / name) for name in ("python", "typed"))
    assert python == typed_


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param("slurm", id="slurm"), pytest.param("ray", id="ray")])
def test_batches_run_on_a_cluster(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One after the other through the same pool, to the end of the space."""
    pytest.importorskip({"slurm": "submitit", "ray": "ray"}[engine])
    request.getfixturevalue(f"{engine}_cluster")
    asked = [SIZE, SPACE, ALONE, "hydra.sweeper.n_jobs=3", "sweep.slots.cpu=1", f"sweep.engine={engine}"]
    typed = [*faulty.MOE_LAB, "-m", *words(*asked, "sweep.name=s", worker=True)]
    done = subprocess.run(typed, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(journal(tmp_path / "outputs/s").trials) == 6
    assert len(faulty.records_list(tmp_path)) == 7
