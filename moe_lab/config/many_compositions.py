"""Many compositions by Hydra: what they have in common is worked out once.

One differs from the next in a few values. For each, Hydra parses all overrides, reads all files, orders the default
list and merges the options anew: nine tenths of a composition. Here each of these is remembered under what it depends
on. The values of the composition itself are applied by Hydra to a copy, so the result is the one that Hydra makes.

The files of the packages are read once in a process, as its modules are. Those of a person's own folder, which may
change meanwhile, are read once in a sweep.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal import defaults_list as hydras
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.defaults_list import _create_interpolation_map as _choices_until_here
from hydra._internal.defaults_list import create_defaults_list as _create_defaults_list
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.default_element import InputDefault, ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

_MOST = 256  # of each kind are kept: combinations of options are many, and the next one is most like the last ones
_PACKAGES = ("pkg://moe_lab.conf", "pkg://hydra.conf", "structured://")


class _Known:
    """What compositions have in common. Each key holds the places that were searched."""

    def __init__(self, stored: tuple[ConfigNode, ...] = ()):
        self.stored = stored
        self.loaded: dict[tuple[Any, ...], ConfigResult | None] = {}
        self.groups: dict[tuple[Any, ...], bool] = {}
        self.defaults: dict[tuple[Any, ...], DefaultsList] = {}
        self.merged: dict[tuple[Any, ...], DictConfig] = {}


_of_packages = _Known()


def known_of_packages() -> _Known:
    """What this process knows of the packages' files, and of what is in Hydra's ConfigStore now."""
    global _of_packages
    stored = tuple(_nodes(ConfigStore.instance().repo))
    before = _of_packages.stored
    if len(stored) != len(before) or any(node is not known for node, known in zip(stored, before, strict=True)):
        _of_packages = _Known(stored)
    return _of_packages


def _nodes(group: Mapping[str, Any]) -> Iterator[ConfigNode]:
    for item in group.values():
        if isinstance(item, dict):
            yield from _nodes(item)
        else:
            yield item


def remember(loader: ConfigLoader, in_a_sweep: bool) -> None:
    """Make the compositions of `loader` share what they have in common: in a sweep, files of any folder.

    Again changes nothing, but that it may be in a sweep from then on.
    """
    assert isinstance(loader, ConfigLoaderImpl)
    if isinstance(loader.repository, _Repository) and not in_a_sweep:
        return
    loader.repository = _Repository(loader.get_search_path(), _Known() if in_a_sweep else None)
    loader._compose_config_from_defaults_list = _merged_once(loader)  # type: ignore[method-assign]
    loader._parse_overrides_and_create_caching_repo = _parsed_once(loader)  # type: ignore[method-assign]
    config_loader_impl.create_defaults_list = _defaults_once  # type: ignore[attr-defined]
    hydras._create_interpolation_map = _choices_if_named


class _Repository(ConfigRepository):
    """Reads every file once. Its copies, of which Hydra makes one for each job, share what was read."""

    def __init__(self, search_path: ConfigSearchPath, of_sweep: _Known | None):
        self.of_sweep = of_sweep
        super().__init__(search_path)

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        super().initialize_sources(config_search_path)
        self.places = tuple(f"{source.scheme()}://{source.path}" for source in self.sources)
        self._choose_known()

    def _choose_known(self) -> None:
        only_packages = all(place in _PACKAGES for place in self.places)
        self.known = known_of_packages() if only_packages else self.of_sweep

    def __deepcopy__(self, memo: Any) -> _Repository:
        other = copy.copy(self)  # a job with a search path of its own sets new `sources`
        other._choose_known()
        return other

    def load_config(self, config_path: str) -> ConfigResult | None:
        if self.known is None:
            return super().load_config(config_path)
        key = config_path, *self.places
        if key not in self.known.loaded:
            self.known.loaded[key] = super().load_config(config_path)
        return copy.deepcopy(self.known.loaded[key])

    def group_exists(self, config_path: str) -> bool:
        if self.known is None:
            return super().group_exists(config_path)
        key = config_path, *self.places
        if key not in self.known.groups:
            self.known.groups[key] = super().group_exists(config_path)
        return self.known.groups[key]


@lru_cache(maxsize=_MOST)
def _parsed(text: str) -> Override:
    (override,) = OverridesParser.create().parse_overrides([text])
    return override


def _parsed_once(loader: ConfigLoaderImpl) -> Callable[..., Any]:
    def parse(config_name: str | None, overrides: list[str]) -> tuple[list[Override], CachingConfigRepository]:
        found = [_parsed(text) for text in overrides]
        repository = CachingConfigRepository(loader.repository)
        loader._process_config_searchpath(config_name, found, repository)
        return found, repository

    return parse


def _repository_of(repo: Any) -> _Repository | None:
    delegate = getattr(repo, "delegate", None)
    return delegate if isinstance(delegate, _Repository) else None


def _defaults_once(
    repo: Any, config_name: str | None, overrides_list: list[Override], prepend_hydra: bool, skip_missing: bool
) -> DefaultsList:
    """Only the choices of options decide on the default list. Other loaders have Hydra's own."""
    repository = _repository_of(repo)
    if repository is None or repository.known is None:
        return _create_defaults_list(repo, config_name, overrides_list, prepend_hydra, skip_missing)
    values = Overrides(repo, overrides_list).config_overrides
    choices = [override.input_line for override in overrides_list if override not in values]
    key = (config_name, prepend_hydra, skip_missing, *choices, repository.places)
    if key not in repository.known.defaults:
        made = _create_defaults_list(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        _keep(repository.known.defaults, key, made)
    known = repository.known.defaults[key]
    return DefaultsList(known.defaults, known.defaults_tree, values, known.overrides)


def _choices_if_named(overrides: Overrides, defaults_list: list[InputDefault], self_added: bool) -> DictConfig:
    """Hydra notes all choices after each file, a fifth of a composition, and reads them only for a `${group}`."""
    if any(entry.is_interpolation() for entry in defaults_list):
        return _choices_until_here(overrides, defaults_list, self_added)
    return DictConfig({})


def _merged_once(loader: ConfigLoaderImpl) -> Callable[..., DictConfig]:
    merge = partial(ConfigLoaderImpl._compose_config_from_defaults_list, loader)

    def compose(defaults: list[ResultDefault], repo: Any) -> DictConfig:
        known: _Known | None = repo.delegate.known
        if known is None:
            own: DictConfig = merge(defaults=defaults, repo=repo)
            return own
        parts = ((part.config_path, part.package, part.parent, part.is_self) for part in defaults)
        key = (*parts, repo.delegate.places)
        if key not in known.merged:
            _keep(known.merged, key, merge(defaults=defaults, repo=repo))
        return copy.deepcopy(known.merged[key])

    return compose


def _keep(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Add to what is known, and forget the oldest where that is too much."""
    known[key] = value
    if len(known) > _MOST:
        del known[next(iter(known))]
