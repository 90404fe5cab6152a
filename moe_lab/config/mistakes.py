"""One line for a mistake in the configuration: the key, the value, what is allowed, the nearest name."""

from __future__ import annotations

import errno
import re

from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from moe_lab.config import remedies, targets
from moe_lab.errors import UnavailableError, nearest

_IN_WORDS = (ValueError, UnavailableError, OSError)  # their messages are sentences already

_NOT_FOR_TYPING = ("_target_", "ignores", "overrides", "hydra")  # keys that nobody sets on the command line


def explain(error: BaseException) -> str:
    """One line for a mistake in the configuration: the key, the value, what is allowed, the nearest name."""
    if isinstance(error.__cause__, OSError) and str(error).startswith("Unable to configure"):  # logging's own words
        error = error.__cause__
    if not isinstance(error, HydraException | OmegaConfBaseException):
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return f"{error}; free some space, or choose another folder, and give the same command again."
        text = _one_line(str(error) if isinstance(error, _IN_WORDS) else f"{type(error).__name__}: {error}")
        place = targets.place_of(error)
        return f"{text.rstrip('.')}; HYDRA_FULL_ERROR=1 shows the traceback{place}" if place else text
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if str(error).startswith("In 'measure/"):
            group = "measure.reference_router"
        return remedies.unknown_option(group, option, [name.rsplit("/", 1)[-1] for name in error.options])
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OmegaConfBaseException):
            if isinstance(link.object_type, type) and issubclass(link.object_type, Sweep):
                override = str(error).split("\n")[0].removeprefix("Error merging override ")
                return (
                    f"{override}: choice(), range() and glob() make an axis and cannot stand in a list; write values."
                )
            return _explain_key(link)
        link = link.__cause__ or link.__context__
    if isinstance(error, OverrideParseException) and "missing EQUAL" not in str(error):
        return remedies.unreadable(error.override)
    text = _one_line("\n".join(line for line in str(error).splitlines() if not line.startswith("See https")))
    for pattern, line in _OF_HYDRA:
        if (found := re.match(pattern, text)) is not None:
            return found.expand(line)
    return text


# What Hydra says without a remedy, and what is said in its place.
_OF_HYDRA = (
    (
        r"Ambiguous value for argument '(.*?)'",
        r"\1: several values need a sweep: add -m. If it is one value, quote it.",
    ),
    (r"Sweep parameters '(.*)' requires", r"\1: several values need a sweep: add -m."),
    (
        r"Sweeping over Hydra's configuration is not supported : '(.*)'",
        r"\1: a key of Hydra has one value in a sweep; run it once for each, with a sweep.name of its own.",
    ),
    (r"Error parsing override '(.*?)'", r"\1: not a KEY=VALUE override (moe-lab --help lists keys and groups)."),
    (r"Multiple values for (\S+)\. .*: (\S+)'", r"+\1=\2: \1 has an option already; write \1=\2, without +."),
    (
        r"Could not append to config. .* at '(.*?)'.*Either remove \+ prefix: '(.*?)'",
        r"+\1: is there; write \2, without +.",
    ),
    (r"Could not delete from config\. '(.*?)' does not exist", r"~\1: there is no \1 to remove; leave it out."),
    (
        r"Could not override '([^']*)'\. No match",
        r"\1: only for model=moe_layer and model=router; leave it out.",
    ),
    (r"Could not override '([^'@]*)(@[^']*)'", r"\1\2: this place does not exist; write \1=OPTION."),
    (r"(?:Override|Could not \w+) (\S+) looks like a config group", r"\1: must be one option; write KEY=OPTION."),
    (
        r"Cannot find primary config '(.*?)'",
        r"--config-name \1: not found; leave out --config-name and --config-path, and add your own YAML files with "
        r"--config-dir DIR.",
    ),
)


def _explain_key(error: OmegaConfBaseException) -> str:
    full_key, parent = str(error.full_key or error.key or ""), error.parent_node
    if isinstance(error, InterpolationKeyError):
        name = str(error.msg).split("'")[1]
        return f"{full_key}: ${{{name}}} names no key; write the value itself, or the name of a key."
    is_there = remedies.node_of(error) is not None
    if full_key and isinstance(parent, DictConfig) and not is_there:
        known = sorted(str(key) for key in parent if key not in _NOT_FOR_TYPING)
        where = full_key.rpartition(".")[0]
        if not where and (inner := _places_of(full_key, parent)):
            return f"{full_key}: unknown key; write {' or '.join(f'{place}=VALUE' for place in inner)}."
        near = nearest(str(error.key), known)
        return f"{full_key}: unknown key; {where or 'the configuration'} has {', '.join(known) or 'no keys'}.{near}"
    if (line := remedies.wrong_value(error)) is not None:
        return line
    message = _one_line(str(error.msg or error).split("\n")[0])
    return f"{full_key}: {message}" if full_key and full_key not in message else message


def _places_of(name: str, root: DictConfig) -> list[str]:
    """Where the groups have a key that was typed without its group: `router.temperature` of `temperature`."""
    groups = (key for key in map(str, root) if key not in _NOT_FOR_TYPING)
    return [f"{key}.{name}" for key in groups if isinstance(node := root._get_node(key), DictConfig) and name in node]


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines) if lines else "(no message)"
