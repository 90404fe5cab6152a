"""`moe-lab stability`: which routes and predictions change if the same tokens are computed otherwise."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.cli.arguments import Parser

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

_READ = ("model.*", "router.*", "experts.*", "workload.*", "device", "dtype", "execution", "batch", "seq_len", "seed")
_VARIES = ("model.*", "router.*", "experts.*", "device", "dtype", "execution", "batch")
_HEADINGS = {
    "variant": "variant",
    "same": "experts the same",
    "changed": "tokens changed",
    "first_changed_layer": "first in layer",
    "near_ties": "near-ties",
    "argmax_changed": "arg-max changed",
    "kl_nats": "KL, nats",
}


def main(arguments: list[str]) -> int:
    """`moe-lab stability`. Returns the exit code: 1 if a variant failed for another reason than that it is not here."""
    parser = Parser(
        prog="moe-lab stability",
        description="Compute the same tokens of texts in several ways, and say against the first one which routes and "
        "which predictions change. A variant is one word of overrides: 'batch=1', 'dtype=bf16 experts=loop', "
        "'model.path=OTHER'. One that repeats the first configuration shows what running again changes.",
    )
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="model.path=DIR workload.path=TEXTS ...")
    parser.add_argument(
        "--variants", nargs="+", required=True, metavar="'KEY=VALUE ...'", help="what each replaces in the first one"
    )
    parser.add_argument("--tokens", type=int, help="about so many tokens, spread over the texts (default: all)")
    parser.add_argument(
        "--out",
        "-o",
        type=Path,
        default=Path("outputs/stability"),
        help="folder of the tables, the plot and the page (default: outputs/stability)",
    )
    parser.add_argument("--config-dir", "-cd", help="a folder of your own YAML files")
    given = parser.parse_intermixed_args(arguments)
    if given.tokens is not None and given.tokens < 1:
        raise ValueError(f"--tokens {given.tokens}: must be an integer >= 1.")
    if twice := {name for name in given.variants if given.variants.count(name) > 1}:
        raise ValueError(f"--variants: {min(twice)} is given twice; remove one.")
    if given.out.exists() and not given.out.is_dir():
        raise ValueError(f"--out {given.out}: is a file; give the path of a folder.")
    from moe_lab.cli.trace import compose_over_texts

    first = compose_over_texts(given.overrides, given.config_dir, _READ, "moe-lab stability")
    variants = {name: _variant(name, given.overrides, given.config_dir) for name in given.variants}
    return _compare(first, variants, given.tokens, given.out)


def _variant(name: str, overrides: Sequence[str], config_dir: str | None) -> DictConfig:
    """The first configuration with these words in the place of those of the same keys."""
    from moe_lab.cli.trace import compose_over_texts
    from moe_lab.config.checks import refuse_other_keys
    from moe_lab.config.unread import key_of

    try:
        words = shlex.split(name)
    except ValueError as error:
        raise ValueError(f"--variants {name}: {error}; close it.") from error
    if not words:
        raise ValueError("--variants: a variant has no words; give KEY=VALUE.")
    refuse_other_keys(words, _VARIES, "a variant")
    keys = {key_of(word) for word in words}
    kept = [word for word in overrides if key_of(word) not in keys]
    return compose_over_texts([*kept, *words], config_dir, _READ, "moe-lab stability")


def _compare(first_cfg: DictConfig, variants: Mapping[str, DictConfig], n_tokens: int | None, out: Path) -> int:
    from rich.progress import track

    from moe_lab.analyses import page, stability_variants
    from moe_lab.runs import build
    from moe_lab.runs.stability import First, compare_all
    from moe_lab.runs.trace import source_of
    from moe_lab.terminal import Console

    console = Console(stderr=True)

    def progress(name: str, windows: range) -> Any:
        return track(windows, name, console=console, transient=True, disable=not console.is_terminal)

    first = First.of(first_cfg, list(variants.values()), n_tokens)
    seq_len = first.windows.ids_WS.shape[1]
    if n_tokens is not None and (n := first.n_windows * seq_len) > n_tokens:
        batches = ", ".join(map(str, sorted({int(cfg.batch) for cfg in (first_cfg, *variants.values())})))
        why = f"batches of {batches} take a multiple of {first.n_windows:,} windows of {seq_len:,} tokens"
        print(f"--tokens {n_tokens}: {n:,} are computed, for {why}", file=sys.stderr)
    found = compare_all(first, variants, progress)
    findings = stability_variants.conclude(found, first.layers, seq_len)
    source = source_of(first.cfg, first.model)
    of_first = {
        name: str(source[name]) for name in ("model", "router", "weight_changes", "dtype", "batch") if source[name]
    }
    ran = build.implementation(first.cfg, first.model, first.device)
    of_first |= {"device": str(first.device), **{f"{part} by": by for part, by in ran.items()}}
    tokens = f"{first.n_windows * seq_len:,} tokens in {first.n_windows:,} windows, on which intervals rest"
    names = first.windows.names
    texts = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    facts = [*of_first.items(), ("windows", tokens), ("texts", texts)]
    page.write(out, "What changes", [(name.capitalize(), value) for name, value in facts], [findings], first.missing)
    print(f"against {stability_variants.shown(of_first)}; {tokens}")
    _show(findings.tables["stability"])
    for text in first.missing:
        print(f"left out: {text}", file=sys.stderr)
    print(f"{out}: {page.PAGE}, tables and a plot")
    return int(any(isinstance(of, str) and not of.startswith("unavailable: ") for of in found.values()))


def _show(table: pd.DataFrame) -> None:
    """A row for each variant that was compared, then a line for each other one."""
    from moe_lab.cli.table import print_table

    rows = table.to_dict("records")
    ran = [row for row in rows if not isinstance(row["reason"], str)]
    if ran:
        print_table(list(_HEADINGS.values()), [[_cell(row, key) for key in _HEADINGS] for row in ran])
    for row in rows:
        if isinstance(row["reason"], str):
            print(f"{row['variant']}: {row['reason']}")


def _cell(row: Mapping[str, Any], key: str) -> str:
    from moe_lab.analyses.findings import percent

    value = row[key]
    if key == "variant":
        return str(value)
    if value is None or value != value:
        return "-"
    if key == "first_changed_layer":
        return f"{value:.0f}"
    ends = [row.get(f"{key}_ci95_{end}") for end in ("low", "high")]
    known = [None if end is None or end != end else end for end in ends]
    if key == "kl_nats":
        return f"{value:.2g}" + (f" [{known[0]:.2g}, {known[1]:.2g}]" if None not in known else "")
    return percent(value, *known)
