"""model=checkpoint: a trained model in Hugging Face format, as our own decoder.

What kind of decoder it is says its config.json (`checkpoint_config`); its weights come from safetensors files
(`checkpoint_weights`). The router may be any: `router=native` is the one that it was trained with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from moe_lab.experts.base import Experts
from moe_lab.models import MakeRouter, checkpoint_config, checkpoint_weights
from moe_lab.models.checkpoint_keys import some
from moe_lab.models.decoder_moe import DecoderMoE
from moe_lab.models.moe_layer import moe_layers
from moe_lab.models.parameters import shareable

TOKENIZER = "tokenizer.json"


class Checkpoint(DecoderMoE):
    """The decoder of the checkpoint in the folder `path`; `ends` are the ids that end a text.

    Raises:
        ValueError: one line for what is missing, damaged or not supported.
    """

    max_positions: int

    def __init__(self, *, path: str, make_router: MakeRouter, experts: Experts, implementation: str):
        settings = checkpoint_config.read(path)
        self.folder, self._dense_layers = Path(path), settings.dense_layers
        self.max_positions, self.ends, self.unread = settings.max_positions, settings.ends, settings.unread
        keys = {**settings.decoder, "n_dense_layers": 0}  # `is_dense` says which layers are
        super().__init__(make_router=make_router, experts=experts, implementation=implementation, **keys)
        file = self.folder / TOKENIZER
        self.tokenizer_file = file if os.path.lexists(file) else None

    def is_dense(self, layer: int) -> bool:
        """See `DecoderMoE.is_dense`."""
        return layer in self._dense_layers

    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Fill these parameters, by name: all that the files hold, and with 0 what a swapped router has of its own.

        Raises:
            ValueError: keys that are missing or unexpected, other shapes, files that are missing or damaged.
        """
        trained = shareable(self).keys()
        for name in parameters.keys() - trained:
            parameters[name].data.zero_()
        wanted = {name: parameter for name, parameter in parameters.items() if name in trained}
        if not wanted:
            return
        assert wanted.keys() == trained
        tensors = checkpoint_weights.headers(checkpoint_weights.files(self.folder))
        checkpoint_weights.execute(checkpoint_weights.plan(wanted, tensors, self.head.weight is self.embed.weight))

    def warnings(self) -> list[str]:
        """What a person should know of its config.json."""
        if not self.unread:
            return []
        return [
            f"model.path: {self.folder / checkpoint_config.CONFIG} has keys that moe-lab does not use: "
            f"{some(self.unread)}; if one changes what the model computes, the results are not the model's."
        ]

    def untrained(self) -> list[str]:
        """What its routers have that neither the checkpoint holds nor calibration fits, as `bias_E`."""
        layers = [layer for layer in moe_layers(self) if not layer.router.calibrates]
        return sorted({name for layer in layers for name, _ in layer.router.named_parameters()})
