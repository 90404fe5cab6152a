"""moe-lab: a laboratory for Mixture-of-Experts inference.

    import moe_lab

    cfg    = moe_lab.compose(["model=decoder_moe", "router=sinkhorn", "batch=2"])  # the command line's language
    result = moe_lab.run(cfg)                     # a Record; result.to_dict() is result.json
    df     = moe_lab.load("outputs/my_sweep")     # pandas, a row per run
    router = moe_lab.build_router(cfg)            # router.select(logits_TE) -> Routing
    model  = moe_lab.build_model(cfg)             # nn.Module

The names are imported when first used: `import moe_lab` loads neither torch nor pandas.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_lab.config.compose import compose as compose
    from moe_lab.results.load import load as load
    from moe_lab.runs.build import build_model as build_model
    from moe_lab.runs.build import build_router as build_router
    from moe_lab.runs.run import run as run

__all__ = ["build_model", "build_router", "compose", "load", "run"]

_HOME = {
    "build_model": "moe_lab.runs.build",
    "build_router": "moe_lab.runs.build",
    "compose": "moe_lab.config.compose",
    "load": "moe_lab.results.load",
    "run": "moe_lab.runs.run",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":  # stands in pyproject.toml
        return importlib.metadata.version("moe-lab")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
