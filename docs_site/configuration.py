"""The reference of the configuration: every option of `conf/` with its keys, their defaults and their comments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

_BASE = re.compile(r"/(_base/.+)@_here_")


def page(conf: Path) -> str:
    """The text of the page, a part for each group."""
    parts = ["# Configuration", _HEAD, _keys_of(conf, conf / "config.yaml", skip={"hydra"})]
    groups = sorted({file.parent.relative_to(conf) for file in conf.rglob("*.yaml")} - {Path(".")})
    for group in groups:
        if not str(group).startswith(("_base", "analysis")):
            parts.append(f"## {group}")
            parts += [_option(conf, file) for file in sorted((conf / group).glob("*.yaml"))]
    parts.append("## Keys of moe-lab analyze")
    parts += [_option(conf, file) for file in sorted((conf / "analysis").rglob("default.yaml"))]
    return "\n\n".join(parts) + "\n"


_HEAD = """\
`moe-lab GROUP=OPTION KEY=VALUE` chooses options and sets keys. `moe-lab --help` prints every key with its value for
what you chose, and `moe-lab list GROUP` the options. This page is made from the files in `conf/` and their comments.
`???` has to be set.

## All runs"""


def _option(conf: Path, file: Path) -> str:
    name = (
        f"{file.parent.name}"
        if file.parent.parent.name == "analysis"
        else f"{file.parent.relative_to(conf)}={file.stem}"
    )
    text = file.read_text(encoding="utf-8")
    lines = [line.removeprefix("#").strip() for line in re.match(r"(?:#.*\n)*", text)[0].splitlines()]
    about = [line for line in lines if not line.startswith("@package")]
    if file.parent.name == "experiment":
        return f"### {name}\n\n{_paragraphs(about)}\n\n````yaml\n{text.rstrip()}\n````"
    return f"### {name}\n\n{_paragraphs(about)}\n\n{_keys_of(conf, file)}".rstrip()


def _paragraphs(lines: list[str]) -> str:
    """Commands in a block of their own; the rest is text."""
    written = [f"\n    {line}\n" if line.startswith("moe-lab ") else _escaped(line) for line in lines]
    return "\n".join(written)


def _escaped(text: str) -> str:
    return re.sub(r"([*_<|])", r"\\\1", text)


def _keys_of(conf: Path, file: Path, skip: frozenset[str] | set[str] = frozenset()) -> str:
    rows = dict(_keys(conf, file))
    shown = [row for key, row in rows.items() if key.split(".")[0] not in skip]
    return "\n".join(["| key | default | |", "|---|---|---|", *shown]) if shown else ""


def _keys(conf: Path, file: Path) -> Iterator[tuple[str, str]]:
    """(key, its row) of the files that an option extends, then of its own."""
    text = file.read_text(encoding="utf-8")
    content = yaml.safe_load(text) or {}
    for default in content.get("defaults") or ():
        base = _BASE.fullmatch(default) if isinstance(default, str) else None
        if base is not None:
            yield from _keys(conf, conf / f"{base[1]}.yaml")
        if isinstance(default, dict):  # `/router@inner: torch # to wrap another`: an option as the value of a key
            ((group, option),) = default.items()
            if group.startswith("/") and "@" in group:
                comment = re.search(rf"- {re.escape(group)}:[^#\n]*# (.*)", text)
                about = _escaped(comment[1]) if comment else ""
                yield group.split("@")[1], f"| `{group.split('@')[1]}` | `{option or 'null'}` | {about} |"
    node = yaml.compose(text)
    if node is not None:
        yield from _rows(node, text.splitlines(), "")


def _rows(node: yaml.MappingNode, lines: list[str], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in node.value:
        name = prefix + key.value
        if name in ("defaults", "_target_", "name", "ignores"):
            continue
        line = lines[value.end_mark.line if value.end_mark.column else key.start_mark.line]
        is_nested = isinstance(value, yaml.MappingNode) and not value.flow_style and bool(value.value)
        if is_nested:
            comment = lines[key.start_mark.line].partition(" #")[2]
            if comment:
                yield name, f"| `{name}` | | {_escaped(comment.strip())} |"
            yield from _rows(value, lines, f"{name}.")
            continue
        comment = line[value.end_mark.column :].partition("#")[2].strip() if value.end_mark.column else ""
        written = "\n".join(lines)[value.start_mark.index : value.end_mark.index].strip().replace("|", "\\|")
        yield name, f"| `{name}` | `{written or 'null'}` | {_escaped(comment)} |"
