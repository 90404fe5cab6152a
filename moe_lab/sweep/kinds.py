"""The kinds of slots of a sweep, and what each says of the cells: asked once, kept in plan.json. Imports no torch.

Slots of one kind have the same `env_id`s, so one of them answers for all. A kind can run a cell or cannot; a cell can
run where one can. `sweep.require` leaves kinds out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from moe_lab.records import files, identity, store
from moe_lab.sweep.remembered import parts_of


@dataclass
class Kind:
    """Slots that measure alike."""

    env_ids: dict[str, str | None]
    """By the name of the device in a configuration: cpu, cuda, auto."""
    slots: list[str]
    ask: Callable[..., Any]
    """The answer of a slot to a step of a `Bench`."""
    answers: dict[str, Any] = field(default_factory=dict)
    """By a digest of the question."""


class HasKinds(Protocol):
    """Where slots are."""

    def kinds(self, configs: Sequence[Mapping[str, Any]]) -> list[Kind]:
        """The kinds of slots, as told apart by these configurations, one for each device."""
        ...


class Kinds:
    """Answers `look` and `refusals` for all kinds together, in the place of an engine."""

    def __init__(self, place: HasKinds, require: Mapping[str, Any] | None = None):
        self.place = place
        self.require: Any = OmegaConf.to_container(OmegaConf.create(dict(require or {})))  # lists are compared
        self.kinds: list[Kind] = []

    def call(self, step: str, *arguments: Any) -> Any:
        """See `Engine.call`; what `look` says of a configuration has the `env_ids` of all kinds that can run it too."""
        configs, *rest = arguments
        if not self.kinds:
            self.kinds = self.place.kinds(list({config["device"]["name"]: config for config in configs}.values()))
        answers = [_answers(kind, step, configs, rest) for kind in self.kinds]
        if step == "refusals":
            return [None if None in of_all else of_all[0] for of_all in zip(*answers, strict=True)]
        assert step == "look", step
        return [self._joined(of_all) for of_all in zip(*answers, strict=True)]

    def _joined(self, seen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the kinds say of one configuration; the first that can run it speaks for those that can."""
        can = [one for one in seen if one["skip"] is None]
        like = [one for one in can if is_like(one["env"], self.require)]
        if can and not like:
            there = ", ".join(dict.fromkeys(_described(one["env"], self.require) for one in can))
            skip = f"unavailable: sweep.require={json.dumps(dict(self.require))}: no slot is like this, only {there}"
            return {**can[0], "skip": skip, "env_ids": []}
        return {**(like or seen)[0], "env_ids": list(dict.fromkeys(one["env_id"] for one in like))}

    def content(self) -> list[dict[str, Any]]:
        """For plan.json; what was not refused is left out."""
        return [
            {
                "env_ids": kind.env_ids,
                "slots": kind.slots,
                "answers": {key: answer for key, answer in kind.answers.items() if answer is not None},
            }
            for kind in self.kinds
        ]


def is_like(environment: Mapping[str, Any], require: Mapping[str, Any]) -> bool:
    """Whether an environment is as `sweep.require` says; of text a part is enough, in upper or lower case."""
    return all(_agrees(environment.get(key), wanted) for key, wanted in require.items())


def _agrees(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return any(_agrees(value, one) for one in wanted)
    if isinstance(value, str):
        return str(wanted).casefold() in value.casefold()
    return bool(value == wanted)


def _described(environment: Mapping[str, Any], require: Mapping[str, Any]) -> str:
    return json.dumps({key: environment.get(key) for key in require})


class Unkept(LookupError):  # noqa: N818 - not an error: the slots are asked
    """plan.json has no answer to a question."""


def kept(directory: Path, engine: str, n_slots: Mapping[str, Any]) -> list[Kind]:
    """The kinds in a sweep's plan.json, if they are those of this engine and these slots; `ask` raises `Unkept`."""

    def ask(step: str, configs: Sequence[Any], *_: Any) -> Any:
        if step == "refusals":
            return [None] * len(configs)  # of those only what was refused is kept
        raise Unkept

    try:
        content = files.read_json(directory / store.PLAN)
        if (content["engine"], content["n_slots"]) != (engine, dict(n_slots)):
            return []
        return [Kind(kind["env_ids"], kind["slots"], ask, kind["answers"]) for kind in content["kinds"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


class Kept:
    """The kinds of an earlier start, without their slots."""

    def __init__(self, kinds: list[Kind]):
        self._kinds = kinds

    def kinds(self, configs: Sequence[Mapping[str, Any]]) -> list[Kind]:
        """See `HasKinds`. Raises `Unkept` if there are none, or they were not asked about such devices."""
        if not self._kinds or any(config["device"]["name"] not in self._kinds[0].env_ids for config in configs):
            raise Unkept
        return self._kinds


def _answers(kind: Kind, step: str, configs: Sequence[Mapping[str, Any]], rest: Sequence[Any]) -> list[Any]:
    """Of one kind; it is asked what it was not asked before."""
    keys = [_key(step, config, rest) for config in configs]
    asked = [number for number, key in enumerate(keys) if key not in kind.answers]
    if asked:
        new = kind.ask(step, [configs[number] for number in asked], *rest)
        kind.answers.update(zip((keys[number] for number in asked), new, strict=True))
    return [kind.answers[key] for key in keys]


def _key(step: str, config: Mapping[str, Any], rest: Sequence[Any]) -> str:
    if step == "refusals":  # sizes matter
        return identity.digest([step, identity.content(config)])
    return identity.digest([step, list(rest), *parts_of(config)])
