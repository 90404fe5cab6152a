"""One line for a mistake in the configuration: the key, the value, what is allowed, the nearest name."""

from __future__ import annotations

from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from moe_lab.errors import UnavailableError, nearest

_IN_WORDS = (ValueError, UnavailableError, OSError)  # their messages are sentences already

_NOT_FOR_TYPING = ("_target_", "ignores", "overrides", "hydra")  # keys that nobody sets on the command line


def explain(error: BaseException) -> str:
    """One line for a mistake in the configuration: the key, the value, what is allowed, the nearest name."""
    if isinstance(error.__cause__, OSError) and str(error).startswith("Unable to configure"):  # logging's own words
        error = error.__cause__
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return _one_line(str(error) if isinstance(error, _IN_WORDS) else f"{type(error).__name__}: {error}")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = [name.rsplit("/", 1)[-1] for name in error.options]
        near = nearest(option, options)
        return f"{group}={option}: unknown option; choose one of {', '.join(options)}.{near}"
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
    text = str(error)
    quoted = text.split("'")[1] if text.count("'") > 1 else ""
    if text.startswith("Ambiguous value for argument"):
        return f"{quoted}: several values need a sweep: add -m. If it is one value, quote it."
    if text.startswith("Error parsing override") and "missing EQUAL" in text:
        return f"{quoted}: not a KEY=VALUE override (moe-lab --help lists keys and groups)."
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        example = "" if set(value) & set("\"'") else f": '{key}=\"{value}\"'"
        return f"{error.override}: cannot be read; write special characters in quotes that the shell leaves{example}."
    return _one_line("\n".join(line for line in text.splitlines() if not line.startswith("See https")))


def _explain_key(error: OmegaConfBaseException) -> str:
    full_key, parent = str(error.full_key or error.key or ""), error.parent_node
    if full_key and isinstance(parent, DictConfig) and error.key not in parent:
        known = sorted(str(key) for key in parent if key not in _NOT_FOR_TYPING)
        where = full_key.rpartition(".")[0]
        near = nearest(str(error.key), known)
        return f"{full_key}: unknown key; {where or 'the configuration'} has {', '.join(known)}.{near}"
    message = _one_line(str(error.msg or error).split("\n")[0])
    return f"{full_key}: {message}" if full_key and full_key not in message else message


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines) if lines else "(no message)"
