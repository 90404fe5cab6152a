"""`moe-lab list architectures`: which checkpoints can be read, and what of each is tested. Imports no torch."""

from __future__ import annotations

from moe_lab.cli.json_output import print_json
from moe_lab.models.architectures import ARCHITECTURES
from moe_lab.terminal import Console

NAMES = ("architectures", "architecture")


def show(*, json: bool = False) -> None:
    """Print all of them."""
    if json:
        print_json({"architectures": [each._asdict() for each in ARCHITECTURES]})
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print("architectures of checkpoints (model_type of config.json)", style="bold", markup=False)
    width = max(len(each.model_type) for each in ARCHITECTURES)
    for each in ARCHITECTURES:
        console.print(f"  {each.model_type:{width}}  {each.models}: {each.unusual}", markup=False)
        console.print(f"  {'':{width}}  tested: {each.tested}", markup=False)
    console.print("Tests have tiny models with random weights; released weights are not part of them.", markup=False)
