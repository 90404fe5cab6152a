"""Print requirements with the oldest versions that pyproject.toml allows, for `make test-oldest`.

Each dependency of the package, of `export` and of `dev` is held to its lower bound. torch stays at the version of
constraints.txt (with another torch comes another Triton and another CUDA), and so do the tools without a bound.
transformers is left out, because it asks for newer tokenizers and safetensors than the package: its tests skip.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("dev", "export")
AS_NEWEST, LEFT_OUT = ("torch", "triton"), ("transformers",)


def oldest(project: dict[str, Any], constraints: str) -> list[str]:
    """A line `name==version` for each requirement; the requirement itself where neither file knows a version.

    Args:
        project: the table `project` of pyproject.toml.
        constraints: the text of constraints.txt.
    """
    newest = {canonicalize_name(line.split("==")[0]): line for line in constraints.splitlines() if "==" in line}
    extras = [text for extra in EXTRAS for text in project["optional-dependencies"][extra]]
    lines = {}
    for text in [*extras, *project["dependencies"]]:  # a bound of the package comes last: an extra may ask for more
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        lower = [one.version for one in requirement.specifier if one.operator in (">=", "==")]
        if lower and name not in AS_NEWEST:
            lines[name] = f"{requirement.name}=={lower[0]}"
        else:
            lines[name] = newest.get(name, text)
    return [line for name, line in sorted(lines.items()) if name not in LEFT_OUT]


if __name__ == "__main__":
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    print("\n".join(oldest(table, (ROOT / "constraints.txt").read_text())))
