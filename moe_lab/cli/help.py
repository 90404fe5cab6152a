"""The text of `moe-lab --help`."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import OmegaConf

from moe_lab.cli import listing
from moe_lab.config.compose import composing

HELP = """\
moe-lab: a laboratory for Mixture-of-Experts inference

moe-lab [GROUP=OPTION ...] [KEY=VALUE ...]      run once and write the record to outputs/runs/
moe-lab -m router=torch,sinkhorn batch=1,8      run every combination and write tables, plots and a report page
moe-lab plan -m router=torch,sinkhorn batch=1,8 show what it would run
moe-lab -m experiment=search_router             search: Optuna chooses what to run (hydra/sweeper=moe_lab_optuna)
moe-lab status DIR                              show where a sweep is, from another terminal or machine
moe-lab report DIR [--tables] [--plotly MODE]   write the tables, plots and report page of a folder of results
moe-lab plot DIR [X Y]                          plot column Y of these tables against column X, or all for a paper
moe-lab card DIR [--license ID]                 write a folder to upload: a README, Parquet tables and plots
moe-lab compare A B                             compare two folders of results: faster, slower or the same
moe-lab generate TEXT model.path=DIR            generate text with a checkpoint
moe-lab trace model.path=DIR --out FILE         record which experts each token of texts (workload.path) chooses
moe-lab import FORMAT FILE --out FILE           convert routes that vLLM, SGLang or llama.cpp recorded to a trace
moe-lab analyze FILE [KEY=VALUE ...]            what a trace says: caches, verification steps, placements
moe-lab stability model.path=DIR --variants V   which routes change with batch, dtype, kernel or checkpoint
moe-lab allocate model.path=DIR                 find fewer experts per token for each layer (model.top_k=[...])
moe-lab inspect DIR                             show what a checkpoint is and whether it is supported
moe-lab export RUN_DIR [export.KEY=VALUE ...]   export the model of an earlier run as ONNX; --verify DIR, --open
moe-lab list [GROUP | architectures] [--json]   list the options of each group, or which checkpoints can be read
moe-lab doctor [--noise] [--rates PATH]         show what runs on this machine, how noisy it is, how fast it loads
moe-lab clean [DIR] [--remove]                  list, or remove, failed runs and results set aside; --older-than DAYS
moe-lab build [--arch 80,90]                    compile the C++/CUDA extension before its first use

Groups (GROUP=OPTION)

{groups}

Keys (KEY=VALUE) and their values

{values}
--cfg job       print the composed configuration and stop
--config-dir D  add a folder of your own YAML files; _target_ can name classes in it
--hydra-help    show Hydra's own options
--version       show the versions of moe-lab, Hydra and torch
HYDRA_FULL_ERROR=1 shows the traceback of a one-line error
"""


def help_text(overrides: Sequence[str], config_dir: str | None) -> str:
    """The text of `--help`: groups, options, and every key with its value under `overrides`."""
    options = {group: sorted({path.stem for path in paths}) for group, paths in listing.groups(config_dir).items()}
    with composing(overrides, config_dir) as composed:
        del composed.overrides, composed["hydra"]
        groups = "\n".join(f"{group}: {', '.join(names)}" for group, names in options.items())
        return HELP.format(groups=groups, values=OmegaConf.to_yaml(composed))
