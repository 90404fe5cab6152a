"""`moe-lab list [GROUP]`: the options of the groups, each with the first comment of its YAML. Imports no torch."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from moe_lab.cli.json_output import print_json
from moe_lab.errors import nearest
from moe_lab.records import files
from moe_lab.terminal import Console


def folders(config_dir: str | None) -> list[Path]:
    """Where YAML files of options lie: the package's own, and the person's."""
    own = Path(str(importlib.resources.files("moe_lab.conf")))
    return [own, *([Path(config_dir)] if config_dir else [])]


def groups(config_dir: str | None) -> dict[str, list[Path]]:
    """Every group with its YAML files, `model/shape` under that name."""
    by_group: dict[str, list[Path]] = {}
    for folder in folders(config_dir):
        for path in sorted(folder.rglob("*.yaml")):
            group = path.parent.relative_to(folder).as_posix()
            # _: what the files of options share; analysis: groups of another root, conf/analyze.yaml
            if group != "." and not group.startswith(("hydra", "_", "analysis")):
                by_group.setdefault(group, []).append(path)
    return dict(sorted(by_group.items()))


def show(names: list[str], config_dir: str | None, *, json: bool = False) -> None:
    """Print the groups of `names` (`routers` is `router`), or all. Raises `ValueError` for one that is not there."""
    known = groups(config_dir)
    chosen = []
    for name in names or known:
        group = name if name in known else name.removesuffix("s")
        if group not in known:
            raise ValueError(f"{name}: unknown group; choose one of {', '.join(known)}.{nearest(name, known)}")
        chosen.append(group)
    if json:
        options = {group: [{"name": path.stem, "about": about(path)} for path in known[group]] for group in chosen}
        print_json({"groups": options})
        return
    console = Console(soft_wrap=True, highlight=False)
    for group in chosen:
        console.print(group, style="bold", markup=False)
        width = max(len(path.stem) for path in known[group])
        for path in known[group]:
            console.print(f"  {path.stem:{width}}  {about(path)}", markup=False)


def about(path: Path) -> str:
    """The first comment, but for Hydra's own that says where the content goes."""
    lines = files.read_text(path).splitlines()
    comments = [line.lstrip("# ") for line in lines if line.startswith("#") and not line.startswith("# @")]
    return comments[0] if comments else ""
