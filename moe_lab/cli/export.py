"""`moe-lab export`: export the model of an earlier run, verify an export, or show one in Netron."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from moe_lab.cli.arguments import Parser
from moe_lab.config import targets
from moe_lab.config.checks import validate
from moe_lab.config.compose import compose
from moe_lab.config.unread import refuse_twice
from moe_lab.errors import ExportError, MismatchError
from moe_lab.records import files

OK, DIFFERS = 0, 1
_HELP = """\
Export the model of an earlier run as an ONNX pair, or verify an export.

The model is built again from RUN_DIR/config.yaml; its parameters come from the
seed or the checkpoint, so they are the same as in the run.
"""
_EXAMPLES = """\
exit codes:
  0  exported, or verified
  1  the export was changed, or does not compute what the model computes
  2  an error on the command line

examples:
  moe-lab export RUN_DIR                      write RUN_DIR/netron
  moe-lab export RUN_DIR --open               and show it in Netron (needs moe-lab[netron])
  moe-lab export RUN_DIR export.opset=18 export.view=flat export.dir=/tmp/pair
  moe-lab export --verify /tmp/pair           check the files and compare the outputs with the model
"""


def configuration(run: Path, overrides: list[str]) -> DictConfig:
    """The configuration of the run, with `export=netron` and `overrides` of its keys.

    Raises:
        ValueError: `run` is not the folder of a run, or an override is not a key of `export`.
    """
    try:
        content = yaml.safe_load(files.read_text(run / "config.yaml"))
        if not isinstance(content, dict) or not {"model", "export"} <= content.keys():
            raise ValueError("config.yaml is not the configuration of a run")
        cfg: DictConfig = OmegaConf.create(content)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{run}: not the folder of a run ({error}).") from error
    if other := [word for word in overrides if not word.startswith("export.")]:
        raise ValueError(f"{other[0]}: only keys of export can be changed; all others come from the run.")
    refuse_twice(overrides, sweeps=False)
    cfg.export = compose(["export=netron", *overrides]).export
    validate(cfg)
    return cfg


def export(run: Path, overrides: list[str]) -> Path:
    """Export the run's model unless its folder has an export already, and return the folder of the pair."""
    cfg = configuration(run, overrides)
    folder = Path(cfg.export.dir or run / "netron")
    if cfg.export.dir is None and folder.exists() and not cfg.export.overwrite:
        print(f"{folder} already exists (export.overwrite=true replaces it)")
        return folder
    from moe_lab.runs import export as exports  # imports torch

    print(words({**exports.export(cfg, folder), "dir": str(folder)}))
    return folder


_SAID = {
    "passed": "ONNX Runtime computes the same",
    "verified_in_fp32": "ONNX Runtime computes the same with the weights in fp32, for it has no bf16 kernels here",
    "not_verified": "not checked with ONNX Runtime (export.verify=false)",
}


def words(export: Mapping[str, Any]) -> str:
    """Where a pair lies, whether ONNX Runtime agreed, and how to open it; of `export` as a record has it."""
    folder, parity = export["dir"], export["parity"]
    quoted, model = shlex.quote(folder), shlex.quote(f"{folder}/__model__")
    error = f" (relative error {parity['rel_error']:.1e})" if "rel_error" in parity else ""
    return (
        f"{folder}: {export['nodes']} nodes, {export['functions']} functions, "
        f"{export['params_bytes'] / 1e6:.1f} MB of weights; {_SAID[parity['status']]}{error}\n"
        f"to open it: moe-lab export --verify {quoted} --open (or netron {model})"
    )


def words_of_all(exports: Sequence[Mapping[str, Any]]) -> str:
    """As `words`; of several how many there are, and what ONNX Runtime said of them."""
    if len(exports) == 1:
        return words(exports[0])
    counts = Counter(_SAID[export["parity"]["status"]] for export in exports)
    said = "; ".join(f"{number} times: {text}" for text, number in counts.items())
    return f"{len(exports)} ONNX pairs, in the cells' folders. {said}\nto open one: moe-lab export --verify DIR --open"


def verify(folder: Path) -> None:
    """Print whether the pair in `folder` is unchanged and computes what its model computes."""
    from moe_lab.runs import export as exports  # imports torch

    parity = exports.verify(folder)
    print(f"{folder}: {parity['status']}{': ' + parity['reason'] if parity['reason'] else ''}")


def main(arguments: list[str]) -> int:
    """`moe-lab export`. Returns the exit code."""
    parser = Parser(
        prog="moe-lab export",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN_DIR", help="the folder of an earlier run")
    parser.add_argument("overrides", nargs="*", metavar="export.KEY=VALUE", help="keys of export=netron")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="an export to check against its manifest and model")
    parser.add_argument("--open", action="store_true", help="show the export in Netron")
    parser.add_argument("--config-dir", "-cd", help="a folder of your own YAML files, if the run used one")
    given = parser.parse_intermixed_args(arguments)
    if (given.run is None) == (given.verify is None):
        parser.error("give either RUN_DIR or --verify DIR")
    if given.config_dir:
        targets.trust(given.config_dir)
    try:
        if given.verify is not None:
            verify(given.verify)
        folder = given.verify or export(given.run, given.overrides)
    except (ExportError, MismatchError) as error:
        print(f"moe-lab: {error}", file=sys.stderr)
        return DIFFERS
    if given.open:
        from moe_lab.runs import export as exports

        exports.show(folder)
    return OK
