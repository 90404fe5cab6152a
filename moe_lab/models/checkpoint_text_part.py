"""The config.json of a model that also reads images: what is said of its text part has a part of its own."""

from __future__ import annotations

from moe_lab.models import checkpoint_router as routers
from moe_lab.models.checkpoint_keys import Keys

_OF_IMAGES = ["vision_config", "image_token_id", "video_token_id"]
_OTHERS = {
    "qwen3_5_moe": [*_OF_IMAGES, "vision_start_token_id", "vision_end_token_id"],
    "gemma4": [
        *_OF_IMAGES,
        *("audio_config", "audio_token_id", "boi_token_id", "eoi_token_id", "boa_token_id"),
        *("eoa_token_id", "eoa_token_index", "vision_soft_tokens_per_image"),
    ],
}
"""The keys of what is not text, by type."""
HAVE_TEXT_PART = frozenset(_OTHERS)
_TIED_BY_DEFAULT = {"gemma4"}


def text_part(config: Keys) -> Keys:
    """The keys of the text part. Raises `ValueError` if it is missing, of another type, or contradicts the whole."""
    model_type = config.get("model_type")
    if config.get("text_config") in (None, {}):
        raise config.refuse("text_config is missing or empty; download the file again.")
    text = config.part("text_config")
    text.need("model_type")
    routers.require(text, "model_type", f"{model_type}_text")
    usual = model_type in _TIED_BY_DEFAULT
    tied = config.flag("tie_word_embeddings", default=usual)
    if text.flag("tie_word_embeddings", default=usual) != tied:
        raise config.refuse(
            f"tie_word_embeddings is {tied}, and text_config.tie_word_embeddings {not tied}; both must be the same."
        )
    for key in _OTHERS[model_type]:
        config.get(key)
    return text
