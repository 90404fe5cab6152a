"""The command line in processes of its own: output, exit codes, what is imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lab.records.store import read_record
from tests import quick

MOE_LAB = [sys.executable, "-m", "moe_lab"]


def moe_lab(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([*MOE_LAB, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


def loaded_modules(arguments: list[str], cwd: Path) -> set[str]:
    """What is in sys.modules after `moe-lab ARGUMENTS`."""
    program = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules))))\n"
        "from moe_lab.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_looking_at_the_configuration_imports_no_torch(tmp_path: Path) -> None:
    """Neither torch nor pandas nor triton, and nothing is written."""
    ways = (["--help"], ["--cfg", "job"], ["--cfg", "job", "--resolve", "router=sinkhorn"], ["--info", "config"])
    program = (
        "import contextlib, io, json, sys; from moe_lab.cli.main import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv[1:] = arguments\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        try:\n"
        "            code = main(arguments)\n"
        "        except SystemExit as left:\n"
        "            code = left.code\n"
        "    found = {'torch', 'pandas', 'triton', 'transformers'} & set(sys.modules)\n"
        "    print(code or 0, len(out.getvalue()) > 1000, sorted(found))"
    )
    command = [sys.executable, "-c", program, json.dumps(ways)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["0 True []"] * len(ways)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_compiler")
def test_help_lists_the_groups_and_their_options(tmp_path: Path) -> None:
    """Every group of conf/ with its options, no schema, and the keys."""
    text = moe_lab("--help", cwd=tmp_path).stdout
    assert re.search(r"^ *router: base, .*cuda_ext, .*sinkhorn, .*torch", text, re.MULTILINE)
    assert "model/shape: deepseek_v2_lite, deepseek_v3, demo" in text
    assert "_schema" not in text and "_base" not in text
    assert "mlp_hidden_dim: 2048" in text


def test_a_run_prints_its_row_and_where_it_lies(tmp_path: Path) -> None:
    """Exit code 0; the table has the promised columns; the file it names is the record.

    Neither pandas nor torch's compiler is imported, which take a second each.
    """
    done = moe_lab(*quick.overrides("decoder_moe", "router=sinkhorn"), cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE))
    assert imported & {"torch", "torch._dynamo", "pandas"} == {"torch"}
    lines = done.stdout.splitlines()
    columns = ["router", "batch", "seq_len", "p50 [interval]", "tokens/s", "load max/mean", "error", "status"]
    positions = [lines[0].index(name) for name in columns]
    assert positions == sorted(positions)
    assert lines[1].split()[0] == "sinkhorn"
    assert re.search(r" ok(, unstable)? *$", lines[1])
    record = read_record(Path(lines[-1]).parent)
    assert record.status == "ok"
    assert record.overrides[-1] == "router=sinkhorn"
    assert Path(lines[-1]).parent.parent == tmp_path / "outputs" / "runs"


@pytest.mark.slow
def test_a_multirun_writes_a_row_per_cell(tmp_path: Path) -> None:
    """Four cells, four folders named by their cells under one sweep, one table."""
    axes = ("router=torch,sinkhorn", "batch=1,3", "sweep.report=false")
    done = moe_lab("-m", *quick.overrides("moe_layer", *axes), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = sorted(tmp_path.glob("outputs/sweep-*/*/result.json"))
    assert len(results) == 4
    assert {read_record(path.parent).cell_id for path in results} == {p.parent.name.split("-")[-1] for p in results}
    assert len(re.findall(r" ok(?:, unstable)? *$", done.stdout, re.M)) == 4


@pytest.mark.slow
def test_a_comparison_with_a_reference_router_is_shown_with_its_floor_and_its_time(tmp_path: Path) -> None:
    """In the table, in the tables of the folder, and as plots and cards of the page."""
    arguments = quick.overrides("moe_layer", "router=torch,sinkhorn", "measure.reference_router=torch", "sweep.name=s")
    done = moe_lab("-m", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "error vs reference (floor)" in done.stdout
    assert re.search(r"^reference: router=torch; the comparison took \d+\.\d\d s$", done.stdout, re.MULTILINE)
    row = next(line for line in done.stdout.splitlines() if line.startswith("torch"))
    assert re.search(r" 0\.0e\+00 \(\de-\d\d\) ok(, unstable)? *$", row)
    folder = tmp_path / "outputs" / "s"
    assert "agreement.floor.pooled.jaccard" in (folder / "runs.csv").read_text().splitlines()[0]
    assert (folder / "coactivation.parquet").exists() and (folder / "plots" / "latency_against_error.png").exists()
    assert '<h2 id="routers">' in (folder / "report.html").read_text()
    assert "comparing" not in moe_lab(*quick.overrides("moe_layer"), cwd=tmp_path).stdout


@pytest.mark.slow
def test_a_path_that_is_none_is_named_though_the_folder_of_the_run_depends_on_it(tmp_path: Path) -> None:
    """Hydra asks for the folder, and so for the cell's identity, before the configuration is checked."""
    done = moe_lab(*quick.overrides("checkpoint", "workload.path=7"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "moe-lab: workload.path=7: must be a file, a folder, or a list of files and folders.\n"
    done = moe_lab("-m", *quick.overrides("checkpoint", "model.path=nowhere", "router=native,torch"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("moe-lab: model.path=nowhere: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.slow
def test_a_multirun_skips_what_is_unavailable_and_goes_on(tmp_path: Path) -> None:
    """cuda_ext is a skipped row with its reason; the exit code stays 0."""
    arguments = quick.overrides("moe_layer", "router=cuda_ext,torch", "sweep.name=mine", "sweep.report=false")
    done = moe_lab("-m", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [read_record(path.parent) for path in tmp_path.glob("outputs/mine/*/result.json")]
    reasons = {record.config["router"]["name"]: (record.status, record.reason) for record in records}
    assert reasons["torch"] == ("ok", None)
    assert reasons["cuda_ext"][0] == "skipped"
    assert str(reasons["cuda_ext"][1]).startswith("unavailable: router=cuda_ext")


MISTAKES = {
    "type": (["batch=abc"], "batch"),
    "heads": (["model.n_heads=7"], "model.n_heads=7"),
    "top-k": (["model.top_k=9"], "model.top_k=9"),
    "key": (["model.n_expert=9"], "model.n_expert"),
    "option": (["router=sinkhrn"], "router=sinkhrn"),
}


def test_a_run_says_what_its_experiment_sets_in_vain(tmp_path: Path) -> None:
    """The person did not ask for it, so the run goes on."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "x.yaml").write_text(
        "# @package _global_\nworkload: {context_len: 64, load: native, zipf_exponent: 1.5}\n"
    )
    done = moe_lab("--config-dir", "mine", "experiment=x", *quick.overrides("moe_layer"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "has no effect" in line]
    assert said == [
        "moe-lab: workload.context_len=64: has no effect; only used with workload.phase=decode.",
        "moe-lab: workload.zipf_exponent=1.5: has no effect; only used with workload.load=zipf.",
    ]


@pytest.mark.slow
def test_a_callback_found_through_a_search_path_is_not_trusted(tmp_path: Path) -> None:
    """Hydra would run it before the application; it is refused before that."""
    (tmp_path / "there" / "experiment").mkdir(parents=True)
    (tmp_path / "there" / "experiment" / "x.yaml").write_text(
        "# @package _global_\nhydra:\n  callbacks:\n    e:\n      _target_: evil.Callback\n"
    )
    (tmp_path / "evil.py").write_text("open('touched', 'w').close()\nclass Callback: pass\n")
    path = f"hydra.searchpath=[file://{tmp_path}/there]"
    done = moe_lab(path, "experiment=x", *quick.overrides("minimal"), cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "evil.Callback" in done.stderr
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("arguments", "names", "multirun"),
    [
        *(  # test_mistakes.py has more of them, in one process
            pytest.param(*mistake, [], id=f"{name}-single", marks=() if name == "type" else pytest.mark.slow)
            for name, mistake in MISTAKES.items()
        ),
        *(
            pytest.param(*mistake, ["-m"], id=f"{name}-multirun", marks=() if name == "top-k" else pytest.mark.slow)
            for name, mistake in MISTAKES.items()
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], names: str, multirun: list[str], tmp_path: Path
) -> None:
    """Nothing on stdout, one line on stderr, no traceback, no run left behind."""
    done = moe_lab(*multirun, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("moe-lab: ")
    assert names in done.stderr
    assert not list(tmp_path.glob("outputs/**/result.json"))
    assert not list(tmp_path.glob("outputs/runs/*"))


@pytest.mark.slow
def test_hydra_full_error_shows_the_traceback(tmp_path: Path) -> None:
    """The variable that Hydra's users know works for mistakes found while composing and while checking."""
    for mistake in ("batch=abc", "model.n_heads=7"):
        done = moe_lab(mistake, cwd=tmp_path, HYDRA_FULL_ERROR="1")
        assert done.returncode == 2
        assert "Traceback" in done.stderr


@pytest.mark.slow
def test_a_device_that_is_not_there_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """CUDA_VISIBLE_DEVICES hides the device where there is one; no folder is left."""
    done = moe_lab("device=cuda", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "moe-lab: device=cuda: no CUDA device found; use device=cpu or device=auto"
    ]
    assert not list(tmp_path.glob("outputs/runs/*"))


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    ("combination", "mend"),
    [
        pytest.param("dtype=fp16", "bf16 or fp32", id="half-on-cpu", marks=pytest.mark.slow),
        pytest.param("execution=cuda_graph", "eager or compile", id="graph-on-cpu", marks=pytest.mark.slow),
        pytest.param("router=cuda_ext", "router=torch", id="no-extension"),
    ],
)
@pytest.mark.slow
def test_what_does_not_go_together_is_one_line_alone_and_a_skip_in_a_sweep(
    combination: str, mend: str, tmp_path: Path
) -> None:
    """Exit code 2 for one run; in a multirun a row with the reason, and 2 too where no cell could run."""
    done = moe_lab(*quick.overrides("moe_layer", combination), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert combination in done.stderr
    assert mend in done.stderr
    axes = (combination, "batch=1,2", "sweep.report=false")
    sweep = moe_lab("-m", *quick.overrides("moe_layer", *axes), cwd=tmp_path)
    assert sweep.returncode == 2
    assert sweep.stderr.splitlines()[-1] == "moe-lab: no cell could run (see moe-lab doctor)"
    assert "skipped (2 cells): unavailable" in sweep.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        pytest.param("hydra.run.dir=/proc/nowhere", id="not-a-place"),
        pytest.param("hydra.run.dir=file/below", id="below-a-file"),
        pytest.param("hydra.run.dir=file", id="a-file"),
        pytest.param("hydra.sweep.dir=file/below", id="of-a-sweep"),
    ],
)
def test_an_output_directory_that_cannot_be_written_is_one_line(target: str, tmp_path: Path) -> None:
    """Exit code 2 before anything is computed; the line has the key and the remedy."""
    (tmp_path / "file").write_text("")
    more = ["-m"] if "sweep" in target else []
    done = moe_lab(*more, *quick.overrides("minimal"), target, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"moe-lab: {target}: ") and line.endswith("; choose another folder for the results.")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_directory_is_one_line(tmp_path: Path) -> None:
    """Exit code 2 and the folder's name."""
    (tmp_path / "outputs").mkdir(mode=0o500)
    done = moe_lab(*quick.overrides("minimal"), cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_failed_run_has_exit_code_1(tmp_path: Path) -> None:
    """A plug-in router that breaks the contract is a failed row naming the clause."""
    (tmp_path / "mine" / "router").mkdir(parents=True)
    (tmp_path / "mine" / "router" / "twice.yaml").write_text("_target_: twice_router.Twice\nname: twice\n")
    (tmp_path / "mine" / "twice_router.py").write_text(
        "import torch\n"
        "from moe_lab.routers.base import Router, Routing\n"
        "class Twice(Router):\n"
        "    def select(self, logits_TE, ctx=None):\n"
        "        T, K = logits_TE.shape[0], self.top_k\n"
        "        return Routing(torch.zeros(T, K, dtype=torch.int32), torch.full((T, K), 0.5), scores_TE=logits_TE)\n"
    )
    done = moe_lab("--config-dir", "mine", *quick.overrides("moe_layer", "router=twice"), cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "failed: mismatch: route" in done.stdout
    assert "a token uses the same expert twice" in done.stdout


def test_a_target_outside_the_trusted_folders_is_refused(tmp_path: Path) -> None:
    """A module in the current directory is not trusted because it is importable."""
    (tmp_path / "evil.py").write_text("open('touched', 'w').close()\n")
    done = moe_lab("router._target_=evil.Router", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "--config-dir" in done.stderr
    assert not (tmp_path / "touched").exists()
