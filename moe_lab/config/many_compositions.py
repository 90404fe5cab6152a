"""Many compositions by one loader of Hydra: what the jobs of a sweep have in common is worked out once.

A job differs from the next in a few values. For each, Hydra parses all overrides, reads all files, orders the default
list and merges the options anew: nine tenths of a composition. Here each of these is remembered under what it depends
on. The values of the job itself are applied by Hydra to a copy, so the result is the one that Hydra makes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.defaults_list import create_defaults_list as _create_defaults_list
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

_MOST = 256  # of each kind are kept: combinations of options are many, and the next job is most like the last ones


def remember(loader: ConfigLoader) -> None:
    """Make the compositions of `loader` share what they have in common. Files are not read again."""
    assert isinstance(loader, ConfigLoaderImpl)
    loader.repository = _Repository(loader.get_search_path())
    loader._compose_config_from_defaults_list = _merged_once(loader)  # type: ignore[method-assign]
    loader._parse_overrides_and_create_caching_repo = _parsed_once(loader)  # type: ignore[method-assign]
    config_loader_impl.create_defaults_list = _defaults_once  # type: ignore[attr-defined]


class _Repository(ConfigRepository):
    """Reads every file once. Its copies, of which Hydra makes one for each job, share what was read."""

    def __init__(self, search_path: ConfigSearchPath):
        super().__init__(search_path)
        self.loaded: dict[tuple[str, ...], ConfigResult | None] = {}
        self.groups: dict[tuple[str, ...], bool] = {}
        self.defaults: dict[tuple[Any, ...], DefaultsList] = {}

    def __deepcopy__(self, memo: Any) -> _Repository:
        return copy.copy(self)  # a job with a search path of its own sets new `sources`

    def places(self) -> tuple[str, ...]:
        return tuple(source.path for source in self.sources)

    def load_config(self, config_path: str) -> ConfigResult | None:
        key = config_path, *self.places()
        if key not in self.loaded:
            self.loaded[key] = super().load_config(config_path)
        return copy.deepcopy(self.loaded[key])

    def group_exists(self, config_path: str) -> bool:
        key = config_path, *self.places()
        if key not in self.groups:
            self.groups[key] = super().group_exists(config_path)
        return self.groups[key]


def _parsed_once(loader: ConfigLoaderImpl) -> Callable[..., Any]:
    @lru_cache(maxsize=_MOST)
    def parsed(text: str) -> Override:
        (override,) = OverridesParser.create().parse_overrides([text])
        return override

    def parse(config_name: str | None, overrides: list[str]) -> tuple[list[Override], CachingConfigRepository]:
        found = [parsed(text) for text in overrides]
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
    if repository is None:
        return _create_defaults_list(repo, config_name, overrides_list, prepend_hydra, skip_missing)
    values = Overrides(repo, overrides_list).config_overrides
    choices = [override.input_line for override in overrides_list if override not in values]
    key = (config_name, prepend_hydra, skip_missing, *choices, repository.places())
    if key not in repository.defaults:
        made = _create_defaults_list(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        _keep(repository.defaults, key, made)
    known = repository.defaults[key]
    return DefaultsList(known.defaults, known.defaults_tree, values, known.overrides)


def _merged_once(loader: ConfigLoaderImpl) -> Callable[..., DictConfig]:
    merge = loader._compose_config_from_defaults_list
    merged: dict[tuple[Any, ...], DictConfig] = {}

    def compose(defaults: list[ResultDefault], repo: Any) -> DictConfig:
        parts = ((part.config_path, part.package, part.parent, part.is_self) for part in defaults)
        key = (*parts, repo.delegate.places())
        if key not in merged:
            _keep(merged, key, merge(defaults=defaults, repo=repo))
        return copy.deepcopy(merged[key])

    return compose


def _keep(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Add to what is known, and forget the oldest where that is too much."""
    known[key] = value
    if len(known) > _MOST:
        del known[next(iter(known))]
