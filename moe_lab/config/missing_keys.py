"""A key that the chosen option of a group has not: which option that is, and which ones have it. Imports no torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe_lab.config import entries
from moe_lab.config.unread import key_of

_REFERENCE = "router@measure.reference_router"


def load(
    compose: Callable[[list[str]], DictConfig],
    loader: ConfigLoaderImpl,
    name: str | None,
    overrides: list[str],
    in_a_sweep: bool,
) -> DictConfig:
    """What `compose` makes of the overrides; a missing key that another option has is a `ValueError` that says so.

    Hydra composes the master configuration of a sweep without the axes: it has the default option of a group whose
    options are swept, and that one need not have the key.
    """
    try:
        return compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        key = _missing_key(error)
        if key is None:
            raise
        parsed, repo = loader._parse_overrides_and_create_caching_repo(name, overrides)
        choices = create_defaults_list(repo, name, parsed, prepend_hydra=True, skip_missing=True).overrides
        group = _group_of(key, [group for group, option in choices.known_choices.items() if option is not None])
        if group is None:
            raise
        owners, chosen = _owners(loader, repo, group, key), str(choices.known_choices[group])
        if chosen in owners:  # it has the key, and no value yet (???): something else is wrong
            raise
        if not owners:
            if (line := _meant(_beside(loader, repo, group, key), group, key, chosen)) is None:
                raise
            raise ValueError(line) from error
        beneath = f"{key_of(group)}."
        added = [
            f"++{text}" if text[0] not in "+~" and key_of(text).startswith(beneath) else text for text in overrides
        ]
        if in_a_sweep and added != overrides:
            cfg = compose(added)
            by_key = _by_key(loader, cfg, overrides)
            if any(group == swept for swept, *_ in _axes(cfg, by_key)):
                given = dict(zip(added, overrides, strict=True))
                cfg.hydra.overrides.task = [given[text] for text in cfg.hydra.overrides.task]
                return cfg  # `refuse_in_a_sweep` looks at the options of the axis
        raise ValueError(_says(key, group, [chosen], owners)) from error


def _missing_key(error: BaseException) -> str | None:
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OmegaConfBaseException):
            is_missing = isinstance(link.parent_node, DictConfig) and link.key not in link.parent_node
            return str(link.full_key) if is_missing and link.full_key else None
        link = link.__cause__ or link.__context__
    return None


def _group_of(key: str, groups: Iterable[str]) -> str | None:
    """The group of the innermost node in which `key` stands: `model/shape` of `model.shape.top_k`."""
    above = [group for group in groups if key.startswith(f"{key_of(group)}.") and not group.startswith("hydra/")]
    return max(above, key=lambda group: len(key_of(group)), default=None)


def _owners(
    loader: ConfigLoaderImpl, repo: Any, group: str, key: str, among: Collection[str] | None = None
) -> list[str]:
    """The options of a group (`among` these, or all) that have the key."""
    word = key.rpartition(".")[2]
    return [option for option, keys in _beside(loader, repo, group, key, among).items() if word in keys]


def _beside(
    loader: ConfigLoaderImpl, repo: Any, group: str, key: str, among: Collection[str] | None = None
) -> dict[str, set[str]]:
    """What each option of a group has where `key` would stand. Each is composed alone."""
    folder, rest = group.partition("@")[0], key.removeprefix(f"{key_of(group)}.")
    words = [*folder.split("/"), *rest.split(".")]
    found = {}
    for option in repo.get_group_options(folder) if among is None else among:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Hydra's, on a defaults list without `_self_`
                made = create_defaults_list(repo, f"{folder}/{option}", [], prepend_hydra=False, skip_missing=True)
            node: Any = OmegaConf.to_container(loader._compose_config_from_defaults_list(made.defaults, repo))
        except (HydraException, OmegaConfBaseException):  # a broken file of a person's own has its own message
            continue
        for word in words[:-1]:
            node = node.get(word) if isinstance(node, dict) else None
        if isinstance(node, dict):
            found[option] = {str(name) for name in node}
    return found


def _says(key: str, group: str, without: Sequence[str], owners: Sequence[str]) -> str:
    name = key_of(group) if group == _REFERENCE else group
    lack, own = ("have" if len(options) > 1 else "has" for options in (without, owners))
    return f"{key}: {name}={', '.join(without)} {lack} no such key; {name}={', '.join(owners)} {own} it."


def _meant(beside: Mapping[str, set[str]], group: str, key: str, chosen: str) -> str | None:
    """The words for a misspelt key of another option; None if it is more like one of the chosen option's own."""
    word, own = key.rpartition(".")[2], beside.get(chosen, set())
    known = sorted({name for names in beside.values() for name in names})
    near = get_close_matches(word, known, n=1, cutoff=0.7)
    if not near or near[0] in own:
        return None
    owners = [option for option, names in beside.items() if near[0] in names]
    right = f"{key.rpartition('.')[0]}.{near[0]}"
    return f"{key}: unknown key. Did you mean {right}? {_says(right, group, [chosen], owners).partition(': ')[2]}"


# ---- in a sweep over the options of a group


def refuse_in_a_sweep(loader: ConfigLoaderImpl, cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Raise `ValueError` for a key that is set for all cells, and that some options of its group's axis have not."""
    by_key = _by_key(loader, cfg, overrides)
    _, repo = loader._parse_overrides_and_create_caching_repo(cfg.hydra.job.config_name, list(overrides))
    for group, options, axis in _axes(cfg, by_key):
        for key, override in by_key.items():
            if _group_of(key, cfg.hydra.runtime.choices) != group or override.is_add() or override.is_force_add():
                continue
            known = set(repo.get_group_options(group.partition("@")[0]))
            having = _owners(loader, repo, group, key, known.intersection(options))
            without = [option for option in options if option in known and option not in having]
            if without and (owners := _owners(loader, repo, group, key)):
                remedy = _remedy(group, options, owners, override, axis)
                raise ValueError(f"{_says(key, group, without, owners)}{remedy}")


def _by_key(loader: ConfigLoaderImpl, cfg: DictConfig, overrides: Sequence[str]) -> dict[str, Override]:
    """What is set for all cells, and the axes; of a key that is given twice the last one, which holds."""
    params = cfg.hydra.sweeper.get("params") or {}
    texts = [*(f"{key}={value}" for key, value in params.items()), *overrides]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(texts)
    return {key_of(str(override.input_line)): override for override in parsed}


def _axes(cfg: DictConfig, by_key: dict[str, Override]) -> Iterator[tuple[str, list[str], Override | None]]:
    """Each group of which the cells have several options, with these, and its axis if it is one."""
    sweep: Any = OmegaConf.to_container(cfg.sweep)
    variants = sweep["variants"] if isinstance(sweep["variants"], list) else []  # else it is refused where it is read
    chosen = [{key_of(str(key)): str(value) for key, value in e.items()} for e in variants if isinstance(e, dict)]
    for group, option in cfg.hydra.runtime.choices.items():
        place = key_of(group)
        axis = by_key.get(place)
        if any(place in entry for entry in chosen):
            yield group, list(dict.fromkeys(entry.get(place, str(option)) for entry in chosen)), None
        elif axis is not None and axis.is_discrete_sweep():
            yield group, [text.strip("'\"") for text in axis.sweep_string_iterator()], axis


def _remedy(
    group: str, options: Sequence[str], owners: Sequence[str], override: Override, axis: Override | None
) -> str:
    key, having = override.key_or_group, [option for option in options if option in owners]
    if not having:
        return ""
    if axis is None:
        return f" Write it in the entries of {group}={', '.join(having)} in place of {override.input_line}."
    is_axis = override.is_discrete_sweep()
    values = [*override.sweep_string_iterator()] if is_axis else [override.get_value_element_as_str()]
    made = [
        f"{{{group}: {option}, {key}: {value}}}" if option in owners else f"{{{group}: {option}}}"
        for option in options
        for value in (values if option in owners else values[:1])
    ]
    lines = f"{axis.input_line} and {override.input_line}"
    return f" In place of {lines} write '{entries.KEY}=[{', '.join(made)}]'."
