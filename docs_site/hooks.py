"""What MkDocs calls when it builds the site: adds the pages that are generated, and makes links lead to pages."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import configuration
import gallery
import links
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import moe_lab
from moe_lab.cli.commands import COMMANDS

_MODULES = {
    "Functions": [f"moe_lab.{name}" for name in moe_lab.__all__],
    "A router of your own": ["moe_lab.routers.base.Router", "moe_lab.routers.base.Routing"],
    "Experts of your own": ["moe_lab.experts.base.Experts"],
    "Figures": ["moe_lab.results.plots"],
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the texts outside docs/, the reference, the notebook, the gallery, and each source file that is linked."""
    generated = {name: (links.ROOT / path).read_text(encoding="utf-8") for path, name in links.TEXTS.items()}
    generated["reference/configuration.md"] = configuration.page(links.ROOT / "conf")
    generated["reference/commands.md"] = _commands()
    generated["reference/python.md"] = _python()
    generated["first-look.md"] = _notebook()
    files.append(File.generated(config, "first_look.ipynb", abs_src_path=str(links.ROOT / links.NOTEBOOK)))
    folder = config.extra["gallery"]
    if folder == "none":
        generated["gallery.md"] = "# Gallery\n\nThis site was built without it.\n"
    else:
        place = (links.ROOT / folder).resolve()
        gallery.run(place)
        generated["gallery.md"] = gallery.page()
        for name, options in _gallery(place).items():
            files.append(File.generated(config, f"gallery/{name}", **options))
    texts = {file.src_uri: Path(str(file.abs_src_path)).read_text("utf-8") for file in files.documentation_pages()}
    for name, text in {**texts, **generated}.items():
        for path in links.sources(text, name):
            generated[links.page_of(path) or ""] = links.listing(path)
    for name, text in generated.items():
        files.append(File.generated(config, name, content=text))
    return files


def _gallery(place: Path) -> dict[str, dict[str, str]]:
    """The files of the gallery by name, each as it is or with its content."""
    shown = gallery.files(place)
    names = {path.relative_to(place).as_posix(): {"abs_src_path": str(path)} for path in shown}
    pages = {(place / name / piece.page).parent for name, piece in gallery.PIECES.items()}
    for folder in {path.parent for path in shown} - pages:
        inside = [path.name for path in shown if path.parent == folder]
        names[f"{folder.relative_to(place).as_posix()}/index.html"] = {"content": gallery.index(folder, inside)}
    return names


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository lead to their pages."""
    return links.rewritten(markdown, page.file.src_uri)


def _commands() -> str:
    """`moe-lab --help` and that of each command."""
    parts = [
        "# Commands",
        "`moe-lab --help` prints this, and every key with its value.",
        _fence(_help(["--help"], "Groups")),
    ]
    for word in COMMANDS:
        parts.append(f"## moe-lab {word}\n\n{_fence(_help([word, '--help']))}")
    return "\n\n".join(parts) + "\n"


def _help(words: list[str], until: str | None = None) -> str:
    from moe_lab.cli.main import main

    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        main(words)
    text = written.getvalue()
    return (text if until is None else text[: text.index(f"\n{until}")]).rstrip()


def _fence(text: str) -> str:
    return f"````text\n{text}\n````"


def _python() -> str:
    """What mkdocstrings makes of the docstrings."""
    parts = [
        "# Python",
        "This page is made from the docstrings. [Python](../python.md) has an example of each function.",
    ]
    for title, names in _MODULES.items():
        parts += [f"## {title}", *(f"::: {name}" for name in names)]
    return "\n\n".join(parts) + "\n"


def _notebook() -> str:
    """The cells of the notebook, without outputs."""
    cells = json.loads((links.ROOT / links.NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    written = [
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    ]
    return "\n\n".join([written[0], "[Download the notebook](first_look.ipynb).", *written[1:]]) + "\n"
