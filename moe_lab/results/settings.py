"""Short names for the settings of a sweep: only what differs is said."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pandas as pd

from moe_lab.results.columns import OPTIONS

_SIZES = ("batch", "seq_len")


def describe(frame: pd.DataFrame, without: Collection[str] = ()) -> pd.Series:
    """For each row its model and what else differs between the settings in `frame`: `decoder_moe, bf16, batch=2`.

    `frame` is one of `aggregate`'s tables. What differs within a setting is compared, and belongs to the variant.
    """
    return pd.Series([", ".join(part.values()) for part in parts(frame, without)], index=frame.index, dtype=object)


def parts(frame: pd.DataFrame, without: Collection[str] = ()) -> list[dict[str, str]]:
    """What `describe` joins, by key; a key without a value is left out."""
    columns = {}
    for key, text in _differing(frame):
        if key not in without:
            columns[key] = (text if key in OPTIONS else (_last(key) + "=" + text).where(text != "", "")).tolist()
    columns["machine"] = machines(frame).tolist()
    rows = zip(*columns.values(), strict=True)
    return [{key: text for key, text in zip(columns, row, strict=True) if text} for row in rows]


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _differing(frame: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """The model, and each key in which the settings differ, with its values as text."""
    others = [str(name) for name in frame if str(name).startswith("config.")]
    for key in (*OPTIONS, *_SIZES, "seed", *others):
        text = _texts(frame[key])
        # A model has no size or option that it does not read; of other keys, having none is a value.
        values = text if key in others else text[text != ""]
        if key == "model" or (values.nunique() > 1 and text.groupby(frame["setting_id"]).nunique().max() == 1):
            yield key, text


def places(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """For each row the values of the keys in which the settings differ, and of the machine: see `regions`."""
    columns = {key: frame[key].astype(object).tolist() for key, _ in _differing(frame)}
    columns["machine"] = machines(frame).tolist()
    rows = zip(*columns.values(), strict=True)
    return [{key: _value(value) for key, value in zip(columns, row, strict=True)} for row in rows]


def _value(value: Any) -> Any:
    if value is None or pd.isna(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


def machines(frame: pd.DataFrame) -> pd.Series:
    """Where the records are of several machines, which; with the start of `env_id` where the device does not tell."""
    device, env_id = (_texts(frame[key]) for key in ("environment.device_name", "env_id"))
    known = env_id != ""
    if env_id[known].nunique() < 2:
        return pd.Series("", index=frame.index, dtype=object)
    if device[known].nunique() < env_id[known].nunique():
        device = (device + " " + env_id.str[:6]).str.strip()
    return device.where(known, "")


def sizes(frame: pd.DataFrame) -> list[str]:
    """Each row's batch and sequence length, as far as the model reads them: `batch 2 x seq_len 128`."""
    columns = [(key, _texts(frame[key])) for key in _SIZES if key in frame]
    words = [[f"{key} {text}" if text else "" for text in column] for key, column in columns]
    return [" x ".join(filter(None, row)) for row in zip(*words, strict=True)]


def _texts(column: pd.Series) -> pd.Series:
    """Each different value is written once."""
    codes, values = pd.factorize(column)
    texts = np.array([*map(_text, values), ""], dtype=object)  # what is missing has the code -1
    return pd.Series(texts[codes], index=column.index, dtype=object)


def _text(value: Any) -> str:
    if value is None or pd.isna(value):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)
