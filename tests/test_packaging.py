"""The package as users install it: a wheel, an editable checkout, and the list of packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from tests import quick

ROOT = Path(__file__).parent.parent


def packages_in_tree() -> set[str]:
    """Every folder with an __init__.py, under the name it is installed as."""
    found = set()
    installed_as = {
        "moe_lab": "moe_lab",
        "assets": "moe_lab.assets",
        "conf": "moe_lab.conf",
        "kernels": "moe_lab.kernels",
        "hydra_plugins": "hydra_plugins",
    }
    for top, name in installed_as.items():
        for init in (ROOT / top).rglob("__init__.py"):
            found.add(".".join((name, *init.parent.relative_to(ROOT / top).parts)))
    return found


def test_pyproject_lists_every_package() -> None:
    """The explicit list equals the tree, and every folder of YAML files is a package."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == packages_in_tree()
    assert len(listed) == len(set(listed))
    assert all((path.parent / "__init__.py").exists() for path in (ROOT / "conf").rglob("*.yaml"))


def checkout(destination: Path) -> Path:
    """A copy of the tree as a clone would have it."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, destination / name)
    return destination


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "editable", [pytest.param(False, id="wheel"), pytest.param(True, id="editable", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "own_dependencies",
    [
        pytest.param(False, id="dependencies-of-this-environment"),
        pytest.param(True, id="dependencies-installed", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_an_installation_works_from_another_directory(editable: bool, own_dependencies: bool, tmp_path: Path) -> None:
    """In a new virtual environment `moe-lab --help`, a tiny run, and moe_lab.kernels work away from the checkout."""
    tree = checkout(tmp_path / "a checkout")
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q"]
    source = ["-e", tree] if editable else [tree]
    if own_dependencies:
        install += ["-c", tree / "constraints.txt"]
    else:
        # The project alone is installed; what it depends on is borrowed from the environment of the tests.
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (site,) = environment.glob("lib/python*/site-packages")
        (site / "borrowed.pth").write_text("\n".join(paths))
        install += ["--no-deps", "--no-build-isolation", "--no-index"]
    run(*install, *source, cwd=tmp_path)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = run(python, "-c", "import moe_lab; print(moe_lab.__file__)", cwd=elsewhere).strip()
    assert Path(where).is_relative_to(tree if editable else environment)
    assert "sinkhorn" in run(environment / "bin" / "moe-lab", "--help", cwd=elsewhere)
    run(environment / "bin" / "moe-lab", *quick.overrides("minimal"), cwd=elsewhere)
    assert len(list(elsewhere.glob("outputs/runs/*/result.json"))) == 1
    assert "sinkhorn" in run(environment / "bin" / "moe-lab", "plan", "-m", "experiment=router_swap", cwd=elsewhere)
    listing = "import sys, importlib.resources as r; print(*(p.name for p in r.files(sys.argv[1]).iterdir()))"
    assert "__init__.py" in run(python, "-c", listing, "moe_lab.kernels", cwd=elsewhere).split()
    page = {"report.html.jinja", "report.css", "report.js"}
    assert page <= set(run(python, "-c", listing, "moe_lab.results", cwd=elsewhere).split())
