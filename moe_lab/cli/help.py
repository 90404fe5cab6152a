"""`moe-lab --help`, and what the command line's words mean before Hydra reads them."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import OmegaConf

from moe_lab.cli import listing
from moe_lab.config.compose import composing

HELP = """\
moe-lab: a laboratory for Mixture-of-Experts inference

moe-lab [GROUP=OPTION ...] [KEY=VALUE ...]      one run, its record under outputs/runs/
moe-lab -m router=torch,sinkhorn batch=1,8      every combination, with tables, plots and a report page
moe-lab plan -m router=torch,sinkhorn batch=1,8 what that would do
moe-lab report DIR [--tables]                   tables, plots and the report page of a folder of results
moe-lab plot DIR X Y                            two columns of these tables against each other
moe-lab compare A B                             faster, slower, the same: two folders of results
moe-lab generate TEXT model.path=DIR            the text that a checkpoint writes
moe-lab export RUN_DIR [export.KEY=VALUE ...]   the model of an earlier run as ONNX; --verify DIR, --open
moe-lab list [GROUP]                            the options and what they are
moe-lab doctor [--noise]                        what runs on this machine, and how noisy it is
moe-lab build [--arch 80,90]                    compile the C++/CUDA extension before its first use

Groups (GROUP=OPTION)

{groups}

Keys (KEY=VALUE) and their values

{values}
--cfg job       print the composed configuration and stop
--config-dir D  add a folder of your own YAML files; classes in it may be named by _target_
--hydra-help    Hydra's own options
HYDRA_FULL_ERROR=1 shows the traceback behind a one-line error
"""


def help_text(overrides: Sequence[str], config_dir: str | None) -> str:
    """The text of `--help`: groups, options, and every key with its value under `overrides`."""
    options = {group: sorted({path.stem for path in paths}) for group, paths in listing.groups(config_dir).items()}
    with composing(overrides, config_dir) as composed:
        del composed.overrides, composed["hydra"]
        groups = "\n".join(f"{group}: {', '.join(names)}" for group, names in options.items())
        return HELP.format(groups=groups, values=OmegaConf.to_yaml(composed))


def argv_overrides(argv: Sequence[str]) -> list[str]:
    """The overrides among command-line arguments."""
    return [argument for argument in argv if "=" in argument and not argument.startswith("-")]


def config_dir_of(argv: Sequence[str]) -> str | None:
    """The folder that `--config-dir` (or `-cd`) names among command-line arguments."""
    for position, argument in enumerate(argv):
        name, separator, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            return value if separator else next(iter(argv[position + 1 :]), "")
    return None
