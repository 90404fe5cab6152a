"""generation_config.json of a checkpoint: the ids that end a text, and what else it asks for.

As in transformers it counts before config.json, which has the same key.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_lab.models.checkpoint_config import ids_of
from moe_lab.models.checkpoint_keys import Keys, read_object, shown

FILE = "generation_config.json"
_NO_EFFECT = {"_from_model_config", "bos_token_id", "decoder_start_token_id", "pad_token_id", "transformers_version"}
_NO_EFFECT |= {"output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate"}
_NO_EFFECT |= {"cache_implementation", "use_cache"}
_AS_HERE = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}
_AS_HERE |= {"temperature": 1.0, "top_p": 1.0}
"""Settings that change nothing at these values."""


@dataclass(frozen=True)
class GenerationConfig:
    """ends: the ids that end a text, None where the file does not say; unread: `key=value` of what is not followed."""

    ends: frozenset[int] | None = None
    unread: tuple[str, ...] = ()


def read(folder: Path, vocab_size: int) -> GenerationConfig:
    """What the file in `folder` says; nothing if there is none.

    Raises:
        ValueError: one line for what is damaged or cannot be meant.
    """
    path = folder / FILE
    try:
        content = read_object(path)
    except FileNotFoundError:
        return GenerationConfig()
    except OSError as error:
        raise ValueError(f"model.path: {path} cannot be read ({error.strerror}); download the file again.") from error
    except ValueError as error:
        raise ValueError(f"model.path: {path} is not valid JSON ({error}); download the file again.") from error
    keys = Keys(path, content)
    ends = ids_of(keys, vocab_size)
    unread = [key for key in keys.unread(_NO_EFFECT) if _AS_HERE.get(key) != content[key]]
    return GenerationConfig(ends or None, tuple(shown(f"{key}={content[key]}") for key in unread))
