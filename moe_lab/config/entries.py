"""The entries of `sweep.variants`: sets of overrides, each combined with all of the axes.

    sweep.variants=[{router: native}, {router: sinkhorn, router.temperature: 0.25}]

An entry becomes the overrides that a person would type, so its cells are those that the same words make.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from moe_lab.config.schemas import SCHEMAS, Config
from moe_lab.config.unread import key_of
from moe_lab.records import variants

KEY = "sweep.variants"
_EXAMPLE = "[{router: native}, {router: sinkhorn, router.temperature: 0.25}]"
_SWEEP = re.compile(r"\s*(choice|range|interval|glob|sort|shuffle|tag)\(.*\)\s*")
_CHOICES = ("model.shape", "measure.reference_router")  # options of groups, which stand deeper


def overrides_of(node: Any, *, may_have_axes: bool = False) -> list[list[str]]:
    """The overrides of each entry; an empty list without variants. Raises `ValueError` for a mistake in them.

    `may_have_axes`: of a search, whose entries may give a key several values, `router.threshold: "interval(0.1, 0.9)"`.
    """
    found = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{KEY}={_shown(found)}: must be a list of entries, such as {_EXAMPLE}.")
    return [list(_overrides(entry, may_have_axes)) for entry in found]


def keys_of(entries: Sequence[Sequence[str]]) -> set[str]:
    """The keys that entries set, `model.shape` for `model/shape`."""
    return {key_of(override) for entry in entries for override in entry}


def refuse_keys_given_twice(entries: Sequence[Sequence[str]], others: Sequence[Override]) -> None:
    """Raise `ValueError` for a key of an entry that is also among the `others`: which of the two holds is not said."""
    keys = keys_of(entries)
    for other in others:
        if (key := key_of(str(other.input_line))) in keys:
            what = "is an axis of the sweep" if other.is_sweep_override() else "is set for all cells"
            raise ValueError(
                f"{KEY}: {key} {what} too ({other.input_line}); remove that, or take {key} out of the entries."
            )


def _overrides(entry: Mapping[Any, Any], may_have_axes: bool) -> Iterator[str]:
    seen: set[str] = set()
    for key, value in entry.items():
        place = _place(key)
        if place in seen:
            raise ValueError(f"{KEY}: {place} stands twice in {_shown(entry)}; remove one.")
        seen.add(place)
        if may_have_axes and _is_axis(place, value):
            yield f"{key}={value}"
            continue
        _check_value(str(key), place, value)
        yield f"{key}={Override._get_value_element_as_str(_element(value))}"


@cache
def _place(key: Any) -> str:
    """Where a key of an entry stands in the configuration."""
    if str(key).startswith("~"):
        raise ValueError(f"{KEY}: {key}: an entry sets keys and deletes none; remove it.")
    try:
        OverridesParser.create().parse_override(f"{key}=0")
    except HydraException as error:
        raise ValueError(f"{KEY}: {key} is not a key; write entries such as {_EXAMPLE}.") from error
    place = key_of(str(key))
    if (first := place.partition(".")[0]) in ("sweep", "tracker", "hydra"):
        raise ValueError(f"{KEY}: {key}: {first}.* holds for the whole sweep; set it beside {KEY}.")
    return place


def _check_value(key: str, place: str, value: Any) -> None:
    if isinstance(value, Mapping):
        leaves = variants.leaves(value, key)  # an option's name is set by choosing it
        dotted = ", ".join(f"{name.removesuffix('.name')}: {_shown(inner)}" for name, inner in leaves)
        raise ValueError(f"{KEY}: {key}: {_shown(value)}: write dotted keys: {{{dotted or f'{key}.KEY: VALUE'}}}.")
    if _is_axis(place, value) or (isinstance(value, list) and _is_one(place)):
        raise ValueError(
            f"{KEY}: {key}: {_shown(value)}: an entry has one value for each key; write an entry for each value, "
            f"or take {key} out of the entries and make it an axis."
        )


def _is_axis(place: str, value: Any) -> bool:
    return isinstance(value, str) and (_SWEEP.fullmatch(value) is not None or ("," in value and _is_one(place)))


def _is_one(place: str) -> bool:
    """Whether a key takes the name of one option, or one number: it is not for lists, and not for free text."""
    node, _, name = place.rpartition(".")
    if not node:
        return place in Config.__dataclass_fields__ and place != "name"
    if place in _CHOICES:
        return True
    schemas = SCHEMAS.get(node.replace(".", "/"), {}).values()
    kinds = {field.type for schema in schemas for field in fields(schema) if field.name == name}
    return bool(kinds) and kinds.isdisjoint({"Any", "list[str]", "str", "str | None"})


def _element(value: Any) -> Any:
    """A value for Hydra's own writer: a text in quotes where it would be read as something else without them."""
    if isinstance(value, list):
        return [_element(item) for item in value]
    return _quoted(value) if isinstance(value, str) else value


@cache
def _quoted(text: str) -> str | QuotedString:
    quoted = QuotedString(text=text, quote=Quote.single)
    try:
        read = OverridesParser.create().parse_override(f"x={Override._get_value_element_as_str(text)}").value()
    except HydraException:
        return quoted
    return text if read == text else quoted


def _shown(value: Any) -> str:
    """A value as it would be typed, on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
