"""moe-lab: a laboratory for Mixture-of-Experts inference.

    import moe_lab

    result = moe_lab.run(["model=decoder_moe", "router=sinkhorn"])  # the command line's language; a record
    sweep  = moe_lab.multirun(["router=torch,sinkhorn", "batch=1,8"])  # as moe-lab -m: records in one folder
    df     = moe_lab.load(sweep.directory)        # pandas, a row per run
    page   = moe_lab.report(sweep.directory)      # tables, plots, report.html
    found  = moe_lab.compare("outputs/a", "outputs/b")  # slower, faster or the same; found.gate()
    moe_lab.list_routers()                        # what there is to choose from

    cfg    = moe_lab.compose(["router=sinkhorn", "batch=2"])  # one configuration; moe_lab.run(cfg) takes it too
    router = moe_lab.build_router(cfg)            # router.select(logits_TE) -> Routing
    model  = moe_lab.build_model(cfg)             # nn.Module

docs/python.md has an example of each. The names are imported when first used: `import moe_lab` loads neither torch nor
pandas.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_lab.api.compare import compare as compare
    from moe_lab.api.compose import compose as compose
    from moe_lab.api.load import load as load
    from moe_lab.api.multirun import multirun as multirun
    from moe_lab.api.report import report as report
    from moe_lab.api.routers import list_routers as list_routers
    from moe_lab.api.run import run as run
    from moe_lab.runs.build import build_model as build_model
    from moe_lab.runs.build import build_router as build_router

__all__ = [
    "build_model",
    "build_router",
    "compare",
    "compose",
    "list_routers",
    "load",
    "multirun",
    "report",
    "run",
]

_HOME = {
    "build_model": "moe_lab.runs.build",
    "build_router": "moe_lab.runs.build",
    "compare": "moe_lab.api.compare",
    "compose": "moe_lab.api.compose",
    "list_routers": "moe_lab.api.routers",
    "load": "moe_lab.api.load",
    "multirun": "moe_lab.api.multirun",
    "report": "moe_lab.api.report",
    "run": "moe_lab.api.run",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":  # stands in pyproject.toml
        return importlib.metadata.version("moe-lab")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """What completion offers: the functions, and what every module has."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__")), "__version__"])
