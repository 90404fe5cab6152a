"""What travels to the nodes of a cluster: this package as it is installed, and the plug-in folders. Imports no torch.

A node needs an environment with what moe-lab needs, not moe-lab itself. `lacking` runs there, before anything else is
imported, so this file imports the standard library only.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

PLUGINS = "moe_lab_plugins"
"""The module beside the package whose folders 0, 1, ... are the plug-in folders."""


def pack(folder: Path, plugins: Sequence[str]) -> list[Path]:
    """Lay it out below `folder`; returns the modules to send. Raises `OSError` if a file cannot be copied."""
    from moe_lab.records.identity import MAPPED  # here: nodes may lack what it imports

    package = folder / "moe_lab"
    shutil.copytree(Path(__file__).parents[1], package, ignore=_left_out)
    for name in MAPPED:
        (place, *_) = importlib.import_module(f"moe_lab.{name}").__path__
        shutil.copytree(place, package / name, ignore=_left_out, dirs_exist_ok=True)
    sent = folder / PLUGINS
    sent.mkdir()
    (sent / "__init__.py").touch()
    for number, plugin in enumerate(plugins):
        shutil.copytree(plugin, sent / str(number), ignore=_left_out)
    return [package, sent]


def _left_out(_: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith(".") or name == "__pycache__"}


def plugins_here(n: int) -> tuple[str, ...]:
    """Where the plug-in folders are on a node."""
    if not n:
        return ()
    root = Path(importlib.import_module(PLUGINS).__path__[0])
    return tuple(str(root / str(number)) for number in range(n))


def requirements() -> list[str]:
    """What moe-lab needs, as its package says."""
    return [line for line in importlib.metadata.requires("moe-lab") or [] if "extra ==" not in line]


def lacking(needed: Sequence[str]) -> list[str]:
    """What of it this environment has not, or in a version that does not do."""
    from packaging.requirements import Requirement  # the nodes have it: ray needs it

    found = []
    for requirement in map(Requirement, needed):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{requirement.name} (missing)")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version} (needs {requirement.specifier})")
    return found
