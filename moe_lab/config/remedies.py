"""What to write in place of a value that a key does not take. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_origin

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException, ValidationError

from moe_lab.config.schemas import GROUPS, Config
from moe_lab.errors import nearest

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "one text", list: "a list"}
_OTHER_NAMES = {
    "device": {"gpu": "cuda", "nvidia": "cuda"},
    "dtype": {
        **dict.fromkeys(("float16", "half", "f16", "torch.float16"), "fp16"),
        **dict.fromkeys(("bfloat16", "torch.bfloat16"), "bf16"),
        **dict.fromkeys(("float32", "float", "single", "f32", "torch.float32"), "fp32"),
    },
    "execution": dict.fromkeys(("graph", "cudagraph", "cudagraphs"), "cuda_graph") | {"compiled": "compile"},
    "export": {"onnx": "netron"},
}
"""What other programs call an option."""


def unknown_option(group: str, option: str, options: Sequence[str]) -> str:
    """For an option that a group does not have, or none at all."""
    place, _, rest = group.partition("/")
    if rest and place in GROUPS and group != "model/shape":  # of model=a/b Hydra says that the group is model/a
        group, option = place, f"{rest}/{option}"
    key = f"{group}={option}"
    if option in ("", "null", "None", "none"):
        return f"{key}: {_none_of(group)}; choose one of {', '.join(options)}."
    stem = re.sub(r"\.ya?ml$", "", option).rpartition("/")[2]
    if stem in options and stem != option and re.search(r"^\.|/|\.ya?ml$", option):  # conf/router/sinkhorn.yaml
        return f"{key}: a file is not the name of an option; write {group}={stem}."
    if (first := option.partition("/")[0]) in options and first != option:  # model=moe_layer/demo
        return f"{key}: unknown option; write {group}={first}."
    if group == "model" and "/" in option:
        return f"{key}: a model of the Hugging Face hub is model=checkpoint; {download(option)}."
    if group == "device" and re.fullmatch(r"cuda:\d+", option):
        return f"{key}: write device=cuda, and choose the GPU with CUDA_VISIBLE_DEVICES={option[5:]} in the shell."
    meant = usual_name(group, option)
    near = f" Write {group}={meant}." if meant != option else nearest(option, options)
    return f"{key}: unknown option; choose one of {', '.join(options)}.{near}"


def usual_name(group: str, option: str) -> str:
    """What an option of this name is called here; the name itself if other programs do not have it."""
    return _OTHER_NAMES.get(group, {}).get(option.lower(), option)


_OPTIONAL = ("experiment", "debug")

_NO_TEXT = r"-?(\d[\d.]*(e[-+]?\d+)?|inf|nan)|true|false"
"""What Hydra reads as a number or a truth value."""


def _none_of(group: str) -> str:
    return f"leave {group}= out for none" if group in _OPTIONAL else f"a run needs one option of {group}"


def download(name: str) -> str:
    """How to get a checkpoint of this name on the Hugging Face hub."""
    folder = name.rsplit("/", 1)[-1]
    return f"download it first (hf download {name} --local-dir {folder}) and write model.path={folder}"


def refuse_removal(overrides: Iterable[str], options_of: Callable[[str], Sequence[str]]) -> None:
    """Raise `ValueError` for `~KEY` of what every run has, and for a value or an option's name that cannot be one."""
    groups = ("model/shape", *GROUPS, *_OPTIONAL)
    for override in overrides:
        key, is_set, value = override.lstrip("~+").partition("=")
        if key.startswith("router@") and re.fullmatch(_NO_TEXT, value, re.IGNORECASE):
            raise ValueError(unknown_option(key.removeprefix("router@"), value, options_of("router")))
        if "???" in value.split(","):
            raise ValueError(f"{override}: ??? stands for a value that is missing; write {key}=VALUE.")
        if key.startswith("hydra.sweeper.params") and value[:1] not in "'\"" and set(value) & set("{,"):
            raise ValueError(f"{override}: in a command the axes are typed as such: write batch=1,2, for example.")
        if key == "model.shape" and value and value[0] not in "{'\"":
            raise ValueError(
                f"{override}: is a group; write model/shape={value}, beside model=moe_layer or model=router."
            )
        for option in value.split(",") if key in groups else ():
            if re.fullmatch(_NO_TEXT, option, re.IGNORECASE):  # Hydra asks for a string and names no key
                raise ValueError(unknown_option(key, option, options_of(key)))
            if option.endswith((".yaml", ".yml")) or option.startswith(("./", "../")):  # Hydra finds the file
                raise ValueError(unknown_option(key, option, options_of(key)))
        if override.startswith("~") and key in Config.__dataclass_fields__:
            how = f"choose {key}=OPTION" if key in groups else f"set {key}=VALUE"
            raise ValueError(f"{override}: every run has {key}, so it cannot be removed; {how}, or leave it out.")
        if is_set and key in groups and value in ("", "null"):
            raise ValueError(unknown_option(key, value, options_of(key)))
        if is_set and key in groups and re.fullmatch(r"\[[\w, ]*\]", value):
            each = value[1:-1].replace(" ", "")
            raise ValueError(f"{override}: must be one option; for a run of each write {key}={each} with -m.")


def unreadable(override: str) -> str:
    """For an override that Hydra's grammar does not read."""
    key, _, value = override.partition("=")
    if key.strip() and key.strip() != key:
        return f"{override}: write {key.strip()}={value.strip()}, without spaces around =."
    if not re.fullmatch(r"[~+]*[\w$][\w$-]*([./@:][\w$-]+)*:?", key):
        return f"{override}: {key} cannot be a key; write KEY=VALUE (moe-lab --help lists keys)."
    if several := re.fullmatch(r"([\w./-]+)[ ;,]+([\w./]+=[^ ;,]+)", value):
        return f"{override}: has two overrides in one word; write them apart: {key}={several[1]} {several[2]}."
    if value.startswith("~"):
        return f"{override}: the shell leaves ~ as it is here; write {key}=$HOME{value[1:]}."
    if value == "choice()":
        return f"{override}: has no values, so the sweep has no cell; write {key}=A,B."
    is_number, is_group = Config.__annotations__.get(key) == "int", key in ("model/shape", *GROUPS, *_OPTIONAL)
    if (is_number or is_group) and (plain := re.sub(",+", ",", value.strip("=,; "))) and re.fullmatch(r"[\w,]+", plain):
        return f"{override}: cannot be read; write {key}={plain}."
    if is_number:
        return f"{override}: must be a whole number; write {key}=8, for example."
    unclosed = [pair for pair in ("[]", "{}", "()") if value.count(pair[0]) > value.count(pair[1])]
    close = f"{unclosed[0][0]} is not closed: add {unclosed[0][1]}; or " if unclosed else ""
    example = "" if set(value) & set("\"'") else f": '{key}=\"{value}\"'"
    return f"{override}: cannot be read; {close}write special characters in quotes that the shell leaves{example}."


def node_of(error: OmegaConfBaseException) -> Any:
    """The node that an error is about; None if there is none."""
    if not isinstance(error.parent_node, DictConfig) or error.key is None:
        return None
    return error.parent_node._get_node(error.key, validate_access=False)


def wrong_value(error: OmegaConfBaseException) -> str | None:
    """For a value that its key's type does not allow; None if the error is another."""
    key, value, node, example = error.full_key, error.value, node_of(error), None
    kind: Any
    if isinstance(error, ValidationError) and node is not None:
        kind, example = node._metadata.ref_type, node._value()
    elif "Cannot merge DictConfig with ListConfig" in str(error.msg):
        kind, value = list, "{...}"
    else:
        return None
    kind = get_origin(kind) or kind
    if key == "model.shape":
        return f"{key}={_typed(value)}: is a group; write model/shape={_typed(value)}."
    if kind not in _KINDS:
        return f"{key}={_typed(value)}: has keys of its own; set {key}.KEY=VALUE." if kind is not Any else None
    if value == {}:  # batch.x=3
        return f"{key}: has no keys of its own; it is {_KINDS[kind]}: write {key}=VALUE."
    return f"{key}={_typed(value)}: must be {_KINDS[kind]}; {_write(str(key), value, kind, example)}."


def _write(key: str, value: Any, kind: type, example: Any) -> str:
    """What to write instead; `example` is the value without the override."""
    if value is None:
        return f"leave {key} out for its default"
    if isinstance(value, list | tuple):
        if kind in (int, float, str) and len(value) > 1:
            return f"for a run of each write {key}={','.join(map(_typed, value))} with -m"
        return f"write {key}={_typed(value[0])}" if value else "write one value"
    if kind is list:
        return f"write {key}=[{value}]" if isinstance(value, str) else f"write {key}=[A,B]"
    text = str(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return f"write {key}={int(value)}"
    if kind is int and (several := re.fullmatch(r"(\d+)[:;-](\d+)", text)):
        return f"for several values write {key}={several[1]},{several[2]} with -m"
    if kind is float and (percent := re.fullmatch(r"([\d.]+) *%", text)):
        return f"write {key}={float(percent[1]) / 100:g}"
    if kind in (int, float) and (number := re.fullmatch(r"(-?\d+(?:\.\d+)?)\D+", text)) and not key.endswith("path"):
        return f"write the number alone, such as {key}={number[1]}"
    if kind is bool:
        return f"write {key}=true or {key}=false"
    if kind is str:
        return f"write {key}='TEXT'"
    shown = example if isinstance(example, int | float) else 8 if kind is int else 0.5
    return f"write {key}={shown}, for example"


def _typed(value: Any) -> str:
    """A value as it is typed."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_typed, value))}]"
    return str(value)
