"""What a sweep compares: a setting is what its cells share, a variant is how they differ under `sweep.compare`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_lab.records import identity
from moe_lab.records.weight_changes import SWITCHES

COMPARE = ("router", "experts", "execution")
"""The default of `sweep.compare`."""


def setting_id(content: Mapping[str, Any], compare: Sequence[str] = COMPARE) -> str:
    """12 hex digits of `identity.content(...)` without the keys of `compare`: equal for the members of a group."""
    return identity.digest({key: value for key, value in content.items() if key not in compare})


def labels(contents: Sequence[Mapping[str, Any]], compare: Sequence[str] = COMPARE) -> list[str]:
    """A short name of each content's variant: the options that differ, with the keys that tell namesakes apart.

    For example `torch` and `sinkhorn` where only routers differ, `sinkhorn/loop` where experts do too,
    `sinkhorn(iters=5)` beside `sinkhorn(iters=10)`. With nothing to compare it is the router's name. A model that reads
    none of what is compared is a variant by its own name. One model with other keys is called by these alone:
    `native/top_k=[2, 1]`.
    """
    columns: list[list[str]] = []
    for key in compare:
        nodes = [content.get(key) for content in contents]
        ids = [identity.digest(node) for node in nodes]
        distinct = {id_: node for id_, node in zip(ids, nodes, strict=True) if node is not None}
        if len(distinct) > 1 or (key == compare[0] and not columns):
            names = {id_: _label(node, distinct.values()) for id_, node in distinct.items()}
            if key == "model" and len(compare) > 1 and len({_name(node) for node in distinct.values()}) == 1:
                names = {id_: name[len(_name(distinct[id_])) + 1 : -1] for id_, name in names.items()}
            columns.append([names.get(id_, "") for id_ in ids])
    if len({name for name in columns[0] if name}) == 1 and all(map(any, zip(*columns[1:], strict=True))):
        columns = columns[1:] or columns  # only others differ
    return [
        "/".join(filter(None, (column[position] for column in columns))) or _name(content["model"])
        for position, content in enumerate(contents)
    ]


def named(content: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a configuration for people to read: a checkpoint is called by its folder, a replay a replay."""
    result, model, workload = {**content}, content["model"], content.get("workload", {})
    if "path" in model:
        result["model"] = {**model, "name": identity.model_name(config["model"])}
    if (load := workload.get("load")) in ("replay", "fitted"):  # and not by where the tokens come from
        result["workload"] = {**workload, "name": load}
    return result


def all_named(contents: Sequence[Mapping[str, Any]], configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As `named`; checkpoints in folders of one name are called by as much of their paths as tells them apart."""
    results = [named(*pair) for pair in zip(contents, configs, strict=True)]
    paths = [Path(str(config["model"].get("path", ""))) for config in configs]
    by_name: dict[str, set[tuple[str, ...]]] = {}
    for path in paths:
        by_name.setdefault(path.name, set()).add(path.parts)
    for result, path in zip(results, paths, strict=True):
        namesakes = by_name[path.name]
        if "path" in result["model"] and len(namesakes) > 1:
            longest = max(map(len, namesakes))
            n = next(n for n in range(1, longest + 1) if len({parts[-n:] for parts in namesakes}) == len(namesakes))
            result["model"] = {**result["model"], "name": "/".join(path.parts[-n:])}
    return results


def _name(node: Any) -> str:
    return identity.option_name(node) if isinstance(node, Mapping) else str(node)


def _label(node: Any, among: Iterable[Any]) -> str:
    """The node's name, followed by the keys in which nodes of that name differ; a null that all could have is left out.

    Values are written as they are typed: true, null.
    """
    if not isinstance(node, Mapping):
        return json.dumps(node) if node is None or isinstance(node, bool) else str(node)
    name = _name(node)
    namesakes = [_flat(other) for other in among if isinstance(other, Mapping) and _name(other) == name]
    node = _flat(node)
    settings = []
    for key in dict.fromkeys(key for other in namesakes for key in other):
        is_detail = "." in key and key not in SWITCHES  # of what others may not have at all
        values = [other.get(key) for other in namesakes if key in other or not is_detail]
        if key not in node or (node[key] is None and (is_detail or all(key in other for other in namesakes))):
            continue
        if len({identity.digest(value) for value in values}) > 1:
            settings.append(f"{key}={_label(node.get(key), values)}")
    return name + (f"({', '.join(settings)})" if settings else "")


def _flat(node: Mapping[str, Any]) -> dict[str, Any]:
    """The node with the keys of what is no option of its own, as `prune.experts`; what is off is left out."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and not {"name", "_target_"} & value.keys():
            inner = {f"{key}.{name}": of for name, of in value.items()}
            flat |= {name: of for name, of in inner.items() if of or name not in SWITCHES}
        else:
            flat[key] = value
    return flat


def matches(content: Mapping[str, Any], partial: Mapping[str, Any]) -> bool:
    """Whether a configuration agrees with a partial one (`sweep.exclude`, `sweep.anchor`).

    A group may be given by its option's name: `{router: sinkhorn, batch: 1, model: {top_k: 2}}`. A key may be dotted as
    it is typed: `{router: sinkhorn, router.temperature: 0.25, model/shape: demo}`. A list agrees with each of its
    values: `{batch: [1, 8]}`.
    """
    return all(_has(content, str(key), wanted) for key, wanted in partial.items())


def missing_key(
    contents: Sequence[Mapping[str, Any]], partial: Mapping[str, Any], above: tuple[str, ...] = ()
) -> tuple[str, list[str]] | None:
    """The first key of a partial configuration that no content has, and those that stand at its place."""
    for key, wanted in partial.items():
        path = (*above, *str(key).replace("/", ".").split("."))
        nodes: list[Any] = list(contents)
        for depth, name in enumerate(path):
            beside = [node for node in nodes if isinstance(node, Mapping)]
            nodes = [node[name] for node in beside if name in node]
            if not nodes:
                return ".".join(path[: depth + 1]), sorted({str(known) for node in beside for known in node})
        if isinstance(wanted, Mapping) and (found := missing_key(contents, wanted, path)):
            return found
    return None


def _has(content: Any, key: str, wanted: Any) -> bool:
    if not isinstance(content, Mapping):
        return False
    if key in content:
        return _agrees(content[key], wanted)
    first, dot, rest = key.replace("/", ".").partition(".")
    return bool(dot) and first in content and _has(content[first], rest, wanted)


def _agrees(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Sequence) and not isinstance(wanted, str) and not isinstance(value, Sequence):
        return any(_agrees(value, option) for option in wanted)
    if isinstance(value, Mapping):
        return matches(value, wanted) if isinstance(wanted, Mapping) else _name(value) == str(wanted)
    return bool(value == wanted)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(`path.key.key`, value) of every value in nested mappings."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node
