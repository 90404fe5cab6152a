"""`moe_lab.list_routers`: what there is to choose from."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from moe_lab.cli.implementations import described
from moe_lab.cli.listing import about


def list_routers(config_dir: str | Path | None = None) -> pd.DataFrame:
    """A row per router, as `moe-lab list routers` prints them.

    `name` is what stands behind `router=`, `about` says what it is, `properties` are those that it declares (`causal`,
    ...), `implementations` those that can run here and `chosen` the one of `router.impl=auto`. `skip` says why a
    router cannot run here.

    Args:
        config_dir: a folder of your own YAML files, whose routers are listed too.
    """
    found = described("router", None if config_dir is None else str(config_dir))
    fields = ("properties", "implementations", "chosen", "skip")
    rows = [
        {"name": path.stem, "about": about(path), **{field: option[field] for field in fields}}
        for path, option in found
    ]
    return pd.DataFrame(rows)
