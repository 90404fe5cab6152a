"""docs_site/ and mkdocs.yml: the site builds strictly, every link of it leads somewhere, and a broken one fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import moe_lab
from moe_lab.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs_site"))  # as MkDocs finds what the hooks import

import configuration  # noqa: E402
import links  # noqa: E402


@pytest.mark.parametrize(
    ("text", "page", "expected"),
    [
        pytest.param("[a](../CONTRIBUTING.md#x)", "architecture.md", "[a](contributing.md#x)", id="text"),
        pytest.param("[a](../../README.md)", "for/ci.md", "[a](../readme.md)", id="from-a-folder"),
        pytest.param("[a](docs/results)", "readme.md", "[a](results/README.md)", id="folder-of-docs"),
        pytest.param("![a](docs/netron.png)", "readme.md", "![a](netron.png)", id="image"),
        pytest.param("[a](../examples/my_router)", "python.md", "[a](source/examples/my_router.md)", id="folder"),
        pytest.param("[a](sweeps.md), [b](#c)", "python.md", "[a](sweeps.md), [b](#c)", id="stays"),
        pytest.param("[a](https://a.b/c)", "python.md", "[a](https://a.b/c)", id="web"),
        pytest.param("[a](../nowhere.py)", "python.md", "[a](../nowhere.py)", id="broken-stays-broken"),
        pytest.param("[a](../../../etc/hosts)", "python.md", "[a](../../../etc/hosts)", id="outside-the-repository"),
        pytest.param("```\n[a](../README.md)\n```", "a.md", "```\n[a](../README.md)\n```", id="in-code"),
    ],
)
def test_a_link_to_a_file_is_one_to_its_page(text: str, page: str, expected: str) -> None:
    """One to a file that does not exist is left to MkDocs, which refuses it."""
    assert links.rewritten(text, page) == expected


def test_the_configuration_page_has_every_option_and_its_keys() -> None:
    """Own keys and those of the bases that an option extends, with the comments beside them."""
    page = configuration.page(ROOT / "conf")
    for file in (ROOT / "conf").rglob("*.yaml"):
        group = file.parent.relative_to(ROOT / "conf")
        if str(group) != "." and not str(group).startswith(("_base", "analysis")):
            assert f"\n### {group}={file.stem}\n" in page
    sinkhorn = page.split("### router=sinkhorn\n")[1].split("\n### ")[0]
    assert "| `temperature` | `1.0` | the plan starts from exp(logits / temperature) |" in sinkhorn
    assert "| `impl` |" in sinkhorn  # of conf/_base/router/router.yaml
    assert '| `sweep.slurm.time` | `"01:00:00"` | limit of a job;' in page
    assert "\n### placement\n" in page
    assert "| `inner` | `torch` | to wrap another router: router@router.inner=sinkhorn |" in page


class Page(HTMLParser):
    """The addresses that a page names, and the places in it that can be linked to."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.addresses.append(value)
            elif name in ("id", "name") and value:
                self.ids.add(value)


def build(tree: Path, site: Path, gallery: str) -> subprocess.CompletedProcess[str]:
    """`mkdocs build --strict` of a checkout."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason=f"{name} is not installed (pip install '.[docs]')")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(site)]
    environment = {**os.environ, "MOE_LAB_GALLERY": gallery, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of this checkout, with the gallery's sweeps, which take a minute."""
    folder = tmp_path_factory.mktemp("docs")
    done = build(ROOT, folder / "site", str(folder / "gallery"))
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder / "site"


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    """Also those in the report pages of the gallery, which MkDocs does not read. No page loads from the web."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 40
    broken = []
    for path, page in pages.items():
        for address in page.addresses:
            parts = urlsplit(address)
            if parts.scheme or address.startswith("//"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() and site in target.parents else target
            if not target.exists() or site not in target.parents:
                broken.append(f"{path.relative_to(site)}: {address}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                broken.append(f"{path.relative_to(site)}: {address} (no such place)")
    assert broken == [], "\n".join(broken)
    loaded = re.compile(
        r"<(?:script|img)[^>]+src=\"(?:https?:)?//|<link[^>]+rel=\"stylesheet\"[^>]+href=\"(?:https?:)?//"
    )
    assert [path for path in pages if loaded.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.slow
def test_the_reference_has_all_there_is(site: Path) -> None:
    """Every command and every function; the pages of the gallery are whole, and that of the trace is small."""
    commands, python = ((site / "reference" / f"{name}.html").read_text() for name in ("commands", "python"))
    assert all(f'id="moe-lab-{word}"' in commands for word in COMMANDS)
    assert all(f'id="moe_lab.{name}"' in python for name in moe_lab.__all__)
    for name in ("router_swap", "loads"):
        assert "<h1" in (site / "gallery" / name / "report.html").read_text()
        assert (site / "gallery" / name / "plotly.min.js").stat().st_size > 1e6
    trace = site / "gallery" / "trace" / "olmoe.analysis"
    assert "experts a layer holds" in (trace / "analysis.html").read_text()
    assert not list(trace.parent.glob("*.trace")) and sum(path.stat().st_size for path in trace.iterdir()) < 4e6


@pytest.mark.parametrize(
    ("where", "text", "said"),
    [
        pytest.param("docs/sweeps.md", "[x](nowhere.md)", "'nowhere.md'", id="page"),
        pytest.param("docs/sweeps.md", "[x](../conf/nowhere.yaml)", "'../conf/nowhere.yaml'", id="file-outside-docs"),
        pytest.param("README.md", "[x](docs/sweeps.md#nowhere)", "#nowhere", id="place-in-a-page"),
        pytest.param("docs/unlisted.md", "# A page", "unlisted.md", id="page-not-in-the-navigation"),
    ],
)
@pytest.mark.slow
def test_a_broken_link_fails_the_build(where: str, text: str, said: str, tmp_path: Path) -> None:
    """In docs/, and in a text outside it that is a page."""
    shown = ("docs", "docs_site", "conf", "moe_lab", "examples", "outputs/README.md", "benchmarks", "assets", ".github")
    tree = tmp_path / "tree"
    for name in (*shown, "mkdocs.yml", "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "kernels"):
        source, place = ROOT / name, tree / name
        place.parent.mkdir(parents=True, exist_ok=True)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, place, ignore=ignore) if source.is_dir() else shutil.copy(source, place)
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    with (tree / where).open("a") as file:
        file.write(f"\n{text}\n")
    done = build(tree, tmp_path / "site", "none")
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
