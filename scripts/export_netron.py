"""Export the model of an earlier run, verify an export, or look at one in Netron.

    python scripts/export_netron.py RUN_DIR                      # into RUN_DIR/netron, from RUN_DIR/config.yaml
    python scripts/export_netron.py RUN_DIR --open               # ... and open it (needs moe-lab[netron])
    python scripts/export_netron.py RUN_DIR export.opset=18 export.view=flat export.dir=/tmp/pair
    python scripts/export_netron.py --verify /tmp/pair           # files, checker, and ONNX Runtime against the model

The parameters are made anew, from the seed or the checkpoint; they are those of the run. Exit code: 0; 1 if an export
is not what it was or does not compute what the model does; 2 for a mistake on the command line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import yaml
from omegaconf import DictConfig, OmegaConf

import moe_lab
from moe_lab.config import targets
from moe_lab.config.checks import validate
from moe_lab.errors import ExportError, MismatchError, UnavailableError
from moe_lab.runs import build
from moe_lab.runs import export as exports


def configuration(run: Path, overrides: list[str]) -> DictConfig:
    """That of the run, with `export=netron` and these keys of it. Raises `ValueError` if there is none."""
    try:
        cfg = OmegaConf.create(yaml.safe_load((run / "config.yaml").read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{run}: it is no run's folder ({error}).") from error
    if wrong := [word for word in overrides if not word.startswith("export.")]:
        raise ValueError(f"{wrong[0]}: only keys of export may be given; the rest is the run's.")
    cfg.export = moe_lab.compose(["export=netron", *overrides]).export
    validate(cfg)
    return cfg


def export(run: Path, overrides: list[str]) -> Path:
    """The folder of the pair, made now unless it is there already."""
    cfg = configuration(run, overrides)
    folder = Path(cfg.export.dir or run / "netron")
    if cfg.export.dir is None and folder.exists() and not cfg.export.overwrite:
        print(f"{folder} is there already (export.overwrite=true makes it anew)")
        return folder
    module = exports.exporter()
    model = build.build_model(cfg, torch.device("cpu"))
    module.require_exportable(cfg, model, folder)
    found = module.export(cfg, model, folder, exports.make_inputs)
    said = found["parity"]
    error = f", relative error {said['rel_error']:.1e}" if "rel_error" in said else ""
    print(
        f"{folder}: {found['nodes']} nodes, {found['functions']} functions, {found['params_bytes'] / 1e6:.1f} MB of "
        f"weights; {said['status']}{error}"
    )
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="the folder of an earlier run")
    parser.add_argument("overrides", nargs="*", metavar="export.KEY=VALUE", help="see conf/export/netron.yaml")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="an export to hold against its manifest and model")
    parser.add_argument("--open", action="store_true", help="show it in Netron")
    parser.add_argument("--config-dir", help="a folder of your own YAML files, if the run had one")
    given = parser.parse_intermixed_args()
    if (given.run is None) == (given.verify is None):
        parser.error("give either RUN_DIR or --verify DIR")
    try:
        if given.config_dir:
            targets.trust(given.config_dir)
        if given.verify is not None:
            folder, said = given.verify, exports.verify(given.verify)
            print(f"{folder}: {said['status']}{': ' + said['reason'] if said['reason'] else ''}")
        else:
            folder = export(given.run, given.overrides)
        if given.open:
            from moe_lab.export import netron

            netron.show(folder)
    except (ExportError, MismatchError) as error:
        print(f"export_netron.py: {error}", file=sys.stderr)
        return 1
    except (ValueError, UnavailableError, OSError) as error:
        print(f"export_netron.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
