"""`moe-lab list routers` and `moe-lab list experts`: each option, what it declares, and what computes it here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_lab.cli.json_output import print_json
from moe_lab.cli.listing import about, folders, groups
from moe_lab.config.compose import compose
from moe_lab.records import files, identity
from moe_lab.sweep import plan as planning
from moe_lab.sweep.engine import Worker
from moe_lab.sweep.remembered import kept
from moe_lab.terminal import Console

GROUPS = {"router": "router", "routers": "router", "experts": "experts"}
"""The words for the groups that are described here."""


def show(group: str, config_dir: str | None, *, json: bool = False) -> None:
    """Print a block per option: its name, its comment, and its properties or why it cannot run here."""
    found = described(group, config_dir)
    if json:
        options = [
            {"name": path.stem, "about": about(path), "runs": option["skip"] is None, "reason": option["skip"]}
            | {key: option[key] for key in ("properties", "undeclared", "implementations")}
            | {"used_here": option["chosen"]}
            for path, option in found
        ]
        print_json({"groups": {group: options}})
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(group, style="bold", markup=False)
    width = max(len(path.stem) for path, _ in found)
    for path, option in found:
        console.print(f"  {path.stem:{width}}  {about(path)}", markup=False)
        words = [", ".join(option["properties"]), "implementations: " + ", ".join(option["implementations"])]
        if option["undeclared"]:
            words.append("not declared: " + ", ".join(option["undeclared"]))
        if option["chosen"] is not None and len(option["implementations"]) > 1:
            words.append(f"used here: {option['chosen']}")
        text = option["skip"] or "; ".join(word for word in words if word)
        console.print(f"  {'':{width}}  {text}", style="dim", markup=False)


def described(group: str, config_dir: str | None) -> list[tuple[Path, dict[str, Any]]]:
    """Each option's YAML file, and what the worker says of it (`Bench.describe`).

    The options are made in a process of its own, for the sizes of model=decoder_moe, unless the answer was kept.
    """
    paths = groups(config_dir)[group]
    names = [path.stem for path in paths]
    options = kept(["list", group, _content(config_dir)], lambda: _describe(group, names, config_dir))
    return list(zip(paths, options, strict=True))


def _describe(group: str, names: Sequence[str], config_dir: str | None) -> list[dict[str, Any]]:
    worker = Worker()
    try:
        worker.start()
        configs = [compose(["model=decoder_moe", f"{group}={name}"], config_dir=config_dir) for name in names]
        return list(worker.call("describe", group, [planning.plain(cfg) for cfg in configs]))
    finally:
        worker.close()


def _content(config_dir: str | None) -> list[str]:
    """The code and the YAML files that decide what an option is."""
    hashed = hashlib.sha256()
    for folder in folders(config_dir):
        for path in sorted(folder.rglob("*.yaml")):
            hashed.update(f"{path}\0".encode() + files.read_bytes(path) + b"\0")
    return [hashed.hexdigest(), identity.code_id([Path(config_dir).resolve()] if config_dir else [])]
