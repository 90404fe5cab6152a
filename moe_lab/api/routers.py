"""`moe_lab.list_routers`: what there is to choose from."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from moe_lab.cli.listing import about, groups
from moe_lab.config.compose import compose
from moe_lab.sweep import plan
from moe_lab.sweep.engine import Worker


def list_routers(config_dir: str | Path | None = None) -> pd.DataFrame:
    """A row per router, as `moe-lab list routers` prints them.

    `name` is what stands behind `router=`, `about` says what it is, `properties` are those that it declares (`causal`,
    ...), `implementations` those that can run here and `chosen` the one of `router.impl=auto`. `skip` says why a
    router cannot run here.

    Args:
        config_dir: a folder of your own YAML files, whose routers are listed too.
    """
    folder = None if config_dir is None else str(config_dir)
    paths = groups(folder)["router"]
    worker = Worker()
    try:
        worker.start()
        configs = [compose(["model=decoder_moe", f"router={path.stem}"], config_dir=folder) for path in paths]
        described = worker.call("describe", "router", [plan.plain(config) for config in configs])
    finally:
        worker.close()
    fields = ("properties", "implementations", "chosen", "skip")
    rows = [
        {"name": path.stem, "about": about(path), **{field: option[field] for field in fields}}
        for path, option in zip(paths, described, strict=True)
    ]
    return pd.DataFrame(rows)
