"""The tree: its rooms, the length of files and functions, no circle of imports, and a test for every module."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moe_lab"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = {"analyses", "api", "cli", "config", "runs", "sweep", "records", "results", "measure", "workloads"}
ROOMS |= {"models", "routers", "experts", "ops", "export", "trackers"}
LOOSE = {"__init__.py", "__main__.py", "errors.py", "intervals.py", "marks.py", "py.typed", "terminal.py"}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 500, 60

TESTED_IN = {
    "analyses/findings.py": "analyses/test_analyze.py",
    "analyses/guesses.py": "analyses/test_specialisation.py",
    "analyses/page.py": "analyses/test_analyze.py",
    "analyses/parquet.py": "analyses/test_exporters.py",
    "api/html_table.py": "api/test_shown.py",
    "api/notebook.py": "test_notebooks.py",
    "cli/foreign.py": "sweep/test_session.py",
    "cli/reporter.py": "cli/test_progress.py",
    "config/analyses.py": "analyses/test_analyze.py",
    "config/checks.py": "config/test_compose.py",
    "config/hydra_patches.py": "config/test_compose.py",
    "config/mistakes.py": "config/test_compose.py",
    "config/remedies.py": "cli/test_mistakes.py",
    "config/router_options.py": "config/test_compose.py",
    "config/schemas.py": "config/test_compose.py",
    "config/weight_changes.py": "records/test_weight_changes.py",
    "experts/exported.py": "ops/test_onnx_bodies.py",
    "models/attend.py": "models/test_attention.py",
    "models/checkpoint_layouts.py": "models/test_checkpoint_weights.py",
    "models/checkpoint_plain.py": "models/test_checkpoint_config.py",
    "models/mixers.py": "models/test_gated_delta_net.py",
    "experts/peers/deepgemm.py": "experts/test_peers.py",
    "experts/peers/deepgemm_triton.py": "experts/test_peers.py",
    "experts/peers/flashinfer.py": "experts/test_peers.py",
    "experts/peers/flashinfer_low.py": "experts/test_peers.py",
    "experts/peers/flashinfer_triton.py": "experts/test_peers.py",
    "experts/peers/peer.py": "experts/test_peers.py",
    "experts/peers/sonic.py": "experts/test_peers.py",
    "experts/peers/transformers.py": "experts/test_peers.py",
    "experts/peers/tuning.py": "experts/test_peers.py",
    "experts/peers/vllm.py": "experts/test_peers.py",
    "export/form.py": "export/test_export.py",
    "export/outline.py": "export/test_export.py",
    "export/parity.py": "export/test_export.py",
    "export/simplify.py": "export/test_export.py",
    "export/trace.py": "export/test_export.py",
    "models/checkpoint_names.py": "models/test_checkpoint_weights.py",
    "models/checkpoint_router.py": "models/test_checkpoint_latent.py",
    "models/checkpoint_effect.py": "models/test_checkpoint_config.py",
    "models/checkpoint_sizes.py": "models/test_checkpoint_config.py",
    "models/checkpoint_windows.py": "models/test_checkpoint_variants.py",
    "models/layer_kinds.py": "models/test_soft_moe.py",
    "ops/capacity.py": "ops/test_onnx_bodies.py",
    "ops/onnx_function.py": "ops/test_onnx_bodies.py",
    "ops/selection.py": "ops/test_route.py",
    "results/columns.py": "results/test_aggregate.py",
    "results/doubts.py": "results/test_answers.py",
    "results/figures.py": "results/test_plots.py",
    "results/gate.py": "api/test_compare.py",
    "results/kept.py": "results/test_aggregate.py",
    "results/look.py": "cli/test_plot.py",
    "results/outputs.py": "cli/test_report.py",
    "results/style.py": "results/test_plots.py",
    "results/summary.py": "results/test_aggregate.py",
    "results/xy.py": "cli/test_plot.py",
    "routers/native.py": "runs/test_build.py",
    "runs/export.py": "export/test_export.py",
    "sweep/expected.py": "sweep/test_plan.py",
    "sweep/in_process.py": "sweep/test_engine.py",
    "sweep/multirun.py": "sweep/test_plan.py",
    "sweep/ray_cluster.py": "sweep/test_ray_pool.py",
    "sweep/ray_variables.py": "sweep/test_places.py",
    "sweep/slurm_asker.py": "sweep/test_slurm_pool.py",
    "sweep/slurm_job.py": "sweep/test_slurm_pool.py",
    "sweep/slurm_left.py": "sweep/test_status.py",
    "sweep/tasks.py": "sweep/test_host.py",
    "sweep/worker.py": "sweep/test_engine.py",
    "trackers/mlflow.py": "trackers/test_tracker.py",
    "trackers/tensorboard.py": "trackers/test_tracker.py",
    "trackers/trackio.py": "trackers/test_tracker.py",
    "trackers/wandb.py": "trackers/test_tracker.py",
}
"""Where a module is tested, if not in tests/ROOM/test_NAME.py."""


def name_of(path: Path) -> str:
    """moe_lab/ops/route.py as ops/route.py."""
    return path.relative_to(PACKAGE).as_posix()


def imported_by(path: Path) -> set[Path]:
    """The files of the package that a file imports: at its head, in a function, or under TYPE_CHECKING."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names += [(node.module or "", alias.name) for alias in node.names]
    files = set()
    for module, attribute in names:
        place = ROOT / module.replace(".", "/")
        candidates = [place / f"{attribute}.py", place / str(attribute) / "__init__.py"] if attribute else []
        candidates += [place.with_suffix(".py"), place / "__init__.py"]
        files |= {next((file for file in candidates if file.is_file()), path)}
    return {file for file in files if PACKAGE in file.parents} - {path}


def test_the_package_has_these_rooms() -> None:
    """A new one needs a line here, and its place in the import contracts of pyproject.toml."""
    assert {path.name for path in PACKAGE.iterdir()} - {"__pycache__"} == {*ROOMS, *LOOSE}


def test_files_and_functions_are_short() -> None:
    """A file is read in one go, a function is seen at once."""
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= MOST_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno + 1 <= MOST_LINES_OF_A_FUNCTION, f"{path}: {node.name}"
    sources = [path for path in (ROOT / "kernels").iterdir() if path.is_file()]
    assert len(sources) > 40
    for path in sources:
        assert len(path.read_text().splitlines()) <= MOST_LINES, path


def test_no_files_import_each_other_in_a_circle() -> None:
    """Also where an import is put off until a function is called."""
    try:
        TopologicalSorter({path: imported_by(path) for path in FILES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(map(name_of, error.args[1])))


def test_every_module_has_its_test() -> None:
    """Under its own name; a Triton kernel under its op's; a body in ONNX with the others; else see `TESTED_IN`."""
    for path in FILES:
        if path.parent != PACKAGE and path.name != "__init__.py":
            assert_has_its_test(path)


def assert_has_its_test(path: Path) -> None:
    room, name = path.parent.name, path.stem
    mirrored = ROOT / "tests" / room / f"test_{name.removesuffix('_triton')}.py"
    if name.endswith("_onnx"):
        mirrored = ROOT / "tests" / "ops" / "test_onnx_bodies.py"
    if mirrored.is_file():
        assert name_of(path) not in TESTED_IN, f"it is tested in {mirrored}; remove its entry"
        return
    assert name_of(path) in TESTED_IN, f"there is no {mirrored.relative_to(ROOT)} and no entry in TESTED_IN"
    test = ROOT / "tests" / TESTED_IN[name_of(path)]
    assert path in imported_by(test) or name_of(path) in test.read_text(), f"{test} does not mention {name_of(path)}"


def test_the_table_names_modules_that_exist() -> None:
    """Else it is out of date."""
    assert {name for name in TESTED_IN if not (PACKAGE / name).is_file()} == set()
