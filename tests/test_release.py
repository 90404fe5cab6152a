"""What a release consists of: one version, metadata, a citation, a workflow, images, the oldest packages, a wheel."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import moe_lab
from tests.test_packaging import ROOT, checkout, packages_in_tree, run

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
oldest = runpy.run_path(str(ROOT / "scripts" / "oldest.py"))["oldest"]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())


def test_the_version_is_said_once() -> None:
    """In pyproject.toml; the changelog has it as its newest release, and the package reads what is installed."""
    newest = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert newest == PROJECT["version"] == moe_lab.__version__
    assert "version" not in CITATION
    said = re.compile(rf"(__version__|version)\s*[=:]\s*[\"']?{re.escape(PROJECT['version'])}")
    files = [*(ROOT / "moe_lab").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml"), *ROOT.glob("Dockerfile*")]
    assert [path for path in files if said.search(path.read_text())] == []


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        pytest.param("vendor.citation-file-format", "CITATION.cff", id="citation"),
        pytest.param("vendor.github-workflows", ".github/workflows/tests.yml", id="workflow"),
        pytest.param("custom.github-workflows-require-timeout", ".github/workflows/tests.yml", id="timeouts"),
    ],
)
@pytest.mark.slow
def test_a_file_is_as_its_schema_says(schema: str, file: str) -> None:
    """The schemas come with check-jsonschema."""
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed (pip install '.[release]')")
    run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, ROOT / file, cwd=ROOT)


def test_the_citation_and_the_package_agree() -> None:
    """License and authors; what the format requires is there."""
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys()
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["authors"] == PROJECT["authors"]


def test_the_workflow_calls_what_there_is() -> None:
    """Targets of the Makefile, extras, and the Pythons that the package says it supports."""
    commands = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {target for command in commands for target in re.findall(r"\bmake ([a-z-]+)", command)}
    assert {"lint", "test-quick", "test-oldest", "docs"} == called and called <= targets
    extras = {
        name for command in commands for part in re.findall(r"\.\[([^]]+)\]", command) for name in part.split(",")
    }
    assert extras and extras <= PROJECT["optional-dependencies"].keys()
    tested = [
        f"Programming Language :: Python :: {one}" for one in WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]["python"]
    ]
    assert tested == [one for one in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", one)]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_an_image_has_what_the_package_is_built_from(name: str) -> None:
    """.dockerignore lets every folder of the package through, and what is copied exists. Only CI builds images."""
    text = (ROOT / name).read_text()
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_through = {line.removeprefix("!") for line in lines if line.startswith("!")}
    folders = {"conf", "kernels", "assets"} | {package.split(".")[0] for package in packages_in_tree()}
    assert lines[0] == "*" and folders | {"pyproject.toml", "README.md", "LICENSE"} <= let_through
    assert all((ROOT / one).exists() for one in let_through)
    copied = set(re.findall(r"^COPY (\S+) ", text, re.MULTILINE))
    assert copied == {".", "constraints.txt"} and "constraints.txt" in let_through
    extras = set(re.findall(r"^ARG EXTRAS=(\S+)", text, re.MULTILINE)[0].split(","))
    assert extras <= PROJECT["optional-dependencies"].keys()


def test_the_oldest_versions_are_the_bounds() -> None:
    """Of each dependency, of export and of dev; torch, and what has no bound, are those of constraints.txt."""
    project = {
        "dependencies": [
            "numpy>=1.26",
            "hydra-core>=1.3.8,<1.5",
            "torch>=2.11",
            "triton>=3.6; platform_system == 'Linux'",
        ],
        "optional-dependencies": {
            "dev": ["pytest", "clang-format==23.1.5", "transformers>=5", "numpy>=2"],
            "export": ["a"],
        },
    }
    constraints = "# said\ntorch==2.13.0\npytest==9.2.0\nnumpy==2.4.6\nray==2.60.0\n"
    expected = ["a", "clang-format==23.1.5", "hydra-core==1.3.8", "numpy==1.26", "pytest==9.2.0", "torch==2.13.0"]
    assert oldest(project, constraints) == [*expected, project["dependencies"][-1]]
    lines = oldest(PROJECT, (ROOT / "constraints.txt").read_text())
    assert {line for line in lines if "==" not in line.split(";")[0]} == {"pillow", PROJECT["dependencies"][-1]}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, and the wheel that is built from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("release")
    tree = checkout(folder / "tree")
    run(sys.executable, "-m", "build", "--no-isolation", "-o", folder / "dist", tree, cwd=folder)
    return folder / "dist"


@pytest.mark.slow
def test_an_index_accepts_the_metadata(dist: Path) -> None:
    """As twine says before an upload."""
    pytest.importorskip("twine", reason="twine is not installed (pip install '.[release]')")
    checked = run(sys.executable, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()), cwd=dist)
    assert checked.count("PASSED") == 2


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(dist: Path) -> None:
    """Also those that are no Python; nothing of the tests, the benchmarks or the site."""
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    tracked = {name for name in listing.split("\0") if name.split("/")[0] in ("moe_lab", "conf", "kernels", "assets")}
    tracked -= {"assets/README.md"}
    installed = {
        name if name.startswith("moe_lab/") else f"moe_lab/{name}" for name in tracked if (ROOT / name).exists()
    }
    assert installed - names == set()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"moe_lab", "hydra_plugins"}
    with tarfile.open(source) as archive:
        assert any(name.endswith("/pyproject.toml") for name in archive.getnames())


def uv_settings() -> dict[str, str]:
    """uv asks where pip is configured to look, beside the public index."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found = dict(re.findall(r"\.(find-links|extra-index-url|cert)='([^']*)'", listed.replace("\\n", " ")))
    names = {"find-links": "UV_FIND_LINKS", "extra-index-url": "UV_INDEX", "cert": "SSL_CERT_FILE"}
    return {"UV_INDEX_STRATEGY": "unsafe-best-match", **{names[key]: value for key, value in found.items()}}


@pytest.mark.parametrize("tool", ["uvx", "pipx"])
@pytest.mark.slow
def test_it_runs_from_a_wheel_without_an_environment(tool: str, dist: Path, tmp_path: Path) -> None:
    """In a clean home, under constraints.txt: help, a list, a small run whose record lies in the current folder."""
    program = Path(sys.executable).with_name(tool)
    if not program.exists():
        pytest.skip(f"{tool} is not installed (pip install '.[release]')")
    (wheel,) = dist.glob("*.whl")
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "UV_", "PIPX_"))}
    environment |= {"HOME": str(home), "PIPX_HOME": str(home / "pipx"), "PIPX_BIN_DIR": str(home / "bin")}
    constraints = ROOT / "constraints.txt"
    if tool == "uvx":
        environment |= uv_settings()
        command = [program, "--python", sys.executable, "--constraints", constraints, "--from", wheel, "moe-lab"]
    else:
        if (configured := Path.home() / ".config" / "pip" / "pip.conf").is_file():
            environment["PIP_CONFIG_FILE"] = str(configured)
        install = [program, "install", "--python", sys.executable, "--pip-args", f"-c {constraints}", wheel]
        subprocess.run([*map(str, install)], cwd=here, env=environment, check=True, capture_output=True, timeout=900)
        command = [home / "bin" / "moe-lab"]

    def call(*words: str) -> str:
        done = subprocess.run(
            [*map(str, command), *words], cwd=here, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "moe-lab card DIR" in call("--help")
    assert "sinkhorn" in call("list", "routers")
    call("model=minimal", "model.hidden=37", "batch=2", "device=cpu", "measure.max_time_s=0.1", "measure.warmup_s=0")
    (record,) = here.glob("outputs/runs/*/result.json")
    assert json.loads(record.read_text())["status"] == "ok"
