"""Links between files of the repository, as links between pages of the site.

In the repository a page links to other files: `../conf/router/base.yaml`, `../CONTRIBUTING.md`. On the site each of
those is a page too: a text as it is, a source file as a listing. So a link is never to a place outside the site, and
one to a file that does not exist is left as it is, which MkDocs then refuses.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "outputs/README.md": "outputs.md",
    "benchmarks/README.md": "benchmarks.md",
    "assets/README.md": "assets.md",
}
"""Texts outside docs/ that are pages, and the page of each."""
NOTEBOOK = "examples/notebooks/first_look.ipynb"
_PAGES = {**TEXTS, NOTEBOOK: "first-look.md"}
SOURCE = "source/"
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
_LANGUAGES = {
    ".py": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
    ".cu": "cuda",
    ".cpp": "cpp",
    ".h": "cpp",
    ".md": "md",
}


def page_of(path: str) -> str | None:
    """The page of a file or folder of the repository, relative to the site; None if the file does not exist."""
    path = path.rstrip("/")
    if path in _PAGES:
        return _PAGES[path]
    if path == "docs" or path.startswith("docs/"):
        page = path.removeprefix("docs").strip("/")
        if (ROOT / path).is_dir():
            inside = [name for name in ("index.md", "README.md") if (ROOT / path / name).is_file()]
            return posixpath.join(page, inside[0]) if inside else None
        return page if (ROOT / path).is_file() else None
    inside = (ROOT / path).resolve()
    if path.startswith("..") or not inside.is_relative_to(ROOT) or not inside.exists():
        return None
    readme = f"{path}/README.md"
    return TEXTS.get(readme, f"{SOURCE}{path.lstrip('.')}.md")  # MkDocs leaves out what begins with a dot


def origin_of(page: str) -> str:
    """The file of the repository that a page shows, which its links are relative to."""
    return next((path for path, name in _PAGES.items() if name == page), f"docs/{page}")


def rewritten(markdown: str, page: str) -> str:
    """The text with each link to a file of the repository as one to its page."""

    def to_page(link: re.Match[str]) -> str:
        path, fragment = _split(link[2])
        target = page_of(posixpath.normpath(posixpath.join(posixpath.dirname(origin_of(page)), path))) if path else None
        if target is None:
            return link[0]
        return f"{link[1]}{posixpath.relpath(target, posixpath.dirname(page) or '.')}{fragment}{link[3]}"

    return _outside_code(markdown, lambda line: _LINK.sub(to_page, line))


def sources(markdown: str, page: str) -> Iterator[str]:
    """The files and folders that a text links to and that are shown as listings."""
    found: list[str] = []
    _outside_code(markdown, lambda line: found.extend(link[2] for link in _LINK.finditer(line)) or line)
    for path, _ in map(_split, found):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin_of(page)), path)) if path else ""
        target = page_of(path) if path else None
        if target is not None and target.startswith(SOURCE):
            yield path


def _split(link: str) -> tuple[str, str]:
    """Path and fragment; of an address of the web no path."""
    if re.match(r"[a-z]+:", link):
        return "", link
    path, mark, fragment = link.partition("#")
    return path, mark + fragment


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    lines, fence = [], ""
    for line in markdown.split("\n"):
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and line.strip() == fence:
            fence = ""
        elif not fence:
            line = change(line)
        lines.append(line)
    return "\n".join(lines)


def listing(path: str) -> str:
    """A page with the text of a file, or of every file of a folder."""
    place = ROOT / path
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if _is_source(file))
    parts = [f"# `{path}`"]
    for file in files:
        if place.is_dir():
            parts.append(f"## `{file.relative_to(place)}`")
        text = file.read_text(encoding="utf-8").rstrip("\n")
        parts.append(f"````{_LANGUAGES.get(file.suffix, 'text')}\n{text}\n````")
    return "\n\n".join(parts) + "\n"


def _is_source(file: Path) -> bool:
    inside = file.relative_to(ROOT).parts
    return file.is_file() and file.suffix in _LANGUAGES and not any(part.startswith((".", "__")) for part in inside)
