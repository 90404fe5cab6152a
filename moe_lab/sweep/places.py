"""Which slots a sweep has: `sweep.engine` and `sweep.slots`. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from moe_lab.config import targets
from moe_lab.errors import UnavailableError
from moe_lab.sweep import ray_variables
from moe_lab.sweep.engine import Engine
from moe_lab.sweep.kinds import Kind
from moe_lab.sweep.slots import slots_here
from moe_lab.sweep.tasks import THREADS, Setup

if TYPE_CHECKING:
    from moe_lab.sweep.pool import Pool


def has_slots(sweep: Mapping[str, Any]) -> bool:
    """Whether groups are spread over slots; else one worker runs them all, which is not pinned."""
    return sweep["engine"] != "worker" or any(sweep["slots"][kind] is not None for kind in ("cpu", "cuda"))


def open_pool(sweep: Mapping[str, Any], directory: Path, say: Callable[[str], None]) -> Pool:
    """The slots of a sweep; `say` shows a line.

    Raises:
        UnavailableError: they are not to be had.
    """
    variables = {name: os.environ[name] for name in THREADS if name in os.environ}
    setup = Setup(str(directory.absolute()), sweep["shared"], os.getcwd(), tuple(targets.trusted()), variables)
    if sweep["engine"] == "ray":
        if importlib.util.find_spec("ray") is None:
            raise UnavailableError("sweep.engine=ray: ray is not installed; run pip install 'moe-lab[ray]'.")
        ray_variables.prepare()
        from moe_lab.sweep.ray_pool import RayPool

        return RayPool(sweep["slots"], setup, say)
    if sweep["engine"] == "slurm":
        from moe_lab.sweep.slurm_pool import SlurmPool

        options: Any = OmegaConf.to_container(OmegaConf.create(sweep["slurm"]), resolve=True)
        return SlurmPool(setup, options, sweep["slots"], say)
    from moe_lab.sweep.pool import LocalPool  # imports numpy, for which nobody waits who has one worker

    return LocalPool(slots_here(sweep["slots"], platform.node()), setup)


class OnlyOne:
    """An engine as the only kind of slot."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def kinds(self, configs: Sequence[Mapping[str, Any]]) -> list[Kind]:
        """See `kinds.HasKinds`. Nothing needs to be asked to know that it is the only one."""
        names = (config["device"]["name"] for config in configs)
        return [Kind(dict.fromkeys(names), ["worker"], self.engine.call)]
