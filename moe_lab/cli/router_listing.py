"""`moe-lab list routers`: every router with what it declares and who can compute it here."""

from __future__ import annotations

from rich.console import Console

from moe_lab.cli.listing import about, groups
from moe_lab.config.compose import compose
from moe_lab.sweep import plan as planning
from moe_lab.sweep.engine import Worker


def show(config_dir: str | None) -> None:
    """Print a block per router: its name, its comment, and its properties or what keeps it from running here.

    They are asked of routers made in a process of its own, for the sizes of model=decoder_moe.
    """
    paths = groups(config_dir)["router"]
    worker = Worker()
    try:
        worker.start()
        configs = [compose(["model=decoder_moe", f"router={path.stem}"], config_dir=config_dir) for path in paths]
        described = worker.call("describe", [planning.plain(cfg) for cfg in configs])
    finally:
        worker.close()
    console = Console(soft_wrap=True, highlight=False)
    console.print("router", style="bold", markup=False)
    width = max(len(path.stem) for path in paths)
    for path, router in zip(paths, described, strict=True):
        console.print(f"  {path.stem:{width}}  {about(path)}", markup=False)
        words = router["skip"] or f"{', '.join(router['properties'])}; by {', '.join(router['implementations'])}"
        console.print(f"  {'':{width}}  {words}", style="dim", markup=False)
