"""model=checkpoint: a trained model in Hugging Face format, as our own decoder.

What kind of decoder it is says its config.json (`checkpoint_config`); its weights come from safetensors files
(`checkpoint_weights`). The router may be any: `router=native` is the one that it was trained with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moe_lab.config.targets import locate
from moe_lab.experts.base import Experts
from moe_lab.experts.loop import Loop
from moe_lab.models import MakeRouter, checkpoint_config, checkpoint_weights
from moe_lab.models.checkpoint_keys import some
from moe_lab.models.checkpoint_names import is_unused, sources
from moe_lab.models.checkpoint_order import order_of, reorder
from moe_lab.models.decoder_moe import DecoderMoE
from moe_lab.models.moe_layer import moe_layers
from moe_lab.models.parameters import shareable
from moe_lab.routers.base import Router
from moe_lab.routers.scored_topk import ScoredTopK

TOKENIZER = "tokenizer.json"


class Checkpoint(DecoderMoE):
    """The decoder of the checkpoint in the folder `path`; `ends` are the ids that end a text.

    `top_k` takes the place of the checkpoint's own experts per token, see `DecoderMoE`.

    Raises:
        ValueError: one line for what is missing, damaged or not supported.
    """

    max_positions: int

    def __init__(
        self,
        *,
        path: str,
        make_router: MakeRouter,
        experts: Experts,
        implementation: str,
        attention: str,
        top_k: int | Sequence[int] | None = None,
    ):
        settings = self._settings = checkpoint_config.read(path)
        self.folder = Path(path)
        self.max_positions, self.ends, self.unread = settings.max_positions, settings.ends, settings.unread
        self.form = settings.form
        keys = {**settings.decoder, "n_dense_layers": 0}  # `is_dense` says which layers are
        if top_k is not None:
            keys["top_k"] = top_k
        keys |= {"implementation": implementation, "attention": attention}
        super().__init__(make_router=make_router, experts=experts, **keys)
        file = self.folder / TOKENIZER
        self.tokenizer_file = file if os.path.lexists(file) else None

    def is_dense(self, layer: int) -> bool:
        """See `DecoderMoE.is_dense`."""
        return layer in self._settings.dense_layers

    def load_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Fill these parameters, by name: all that the files hold, and with 0 what a swapped router has of its own.

        Raises:
            ValueError: keys that are missing or unexpected, other shapes, files that are missing or damaged.
        """
        shared, settings = shareable(self).keys(), self._settings
        trained = shared | self.trained_biases()
        for name in parameters.keys() - trained:
            parameters[name].data.zero_()
        wanted = {name: parameter for name, parameter in parameters.items() if name in trained}
        if not wanted:
            return
        tensors = checkpoint_weights.headers(checkpoint_weights.files(self.folder))
        if wanted.keys() & shared:
            assert wanted.keys() >= shared
        else:  # a router's own, beside weights that are shared with another model
            keys = {source.key for name in wanted for layout in sources(name, (), settings.naming) for source in layout}
            tensors = {key: tensor for key, tensor in tensors.items() if key in keys}
        checkpoint_weights.execute(self.plan(wanted, tensors))
        latent, rotary_dim = settings.decoder.get("latent"), settings.decoder.get("rotary_dim")
        order = order_of(self.head_dim, rotary_dim or self.head_dim, settings.interleaved)
        head_dim = latent["nope_dim"] + latent["rope_dim"] if latent else self.head_dim
        kv_down_dim = latent["kv_rank"] + latent["rope_dim"] if latent else 0
        reorder(wanted, order, head_dim, kv_down_dim, gated=settings.decoder.get("output_gate", False))

    def plan(
        self, parameters: Mapping[str, Tensor], tensors: Mapping[str, checkpoint_weights.Found]
    ) -> list[checkpoint_weights.Copy]:
        """Which of the files' tensors goes where. Raises `ValueError` as `checkpoint_weights.plan`."""
        settings = self._settings
        unused = partial(
            is_unused,
            n_layers=settings.decoder["n_layers"],
            extra_layers=settings.extra_layers,
            has_bias=bool(settings.router.get("bias")),
            others=tuple(settings.others),
        )
        tied = self.head.weight is self.embed.weight
        return checkpoint_weights.plan(
            parameters, tensors, tied, unused=unused, blocks=settings.blocks, naming=settings.naming
        )

    def trained_biases(self) -> set[str]:
        """The names of the routers' biases that the files have: those of routers with the trained one's score."""
        trained = self._settings.router
        return {
            f"{name}.bias_E"
            for name, router in self.named_modules()
            if isinstance(router, ScoredTopK) and router.bias_E is not None
            if trained.get("bias") and router.score == trained["score"]
        }

    def warnings(self) -> list[str]:
        """What a person should know of its config.json."""
        file, found = self.folder / checkpoint_config.CONFIG, []
        if self.unread:
            found.append(
                f"model.path: {file} has keys that moe-lab does not use: {some(self.unread)}; if one changes what the "
                "model computes, the results are not the model's."
            )
        if self._settings.only_text:
            found.append(
                f"model.path: {self.folder} holds a model that reads images too; only its text part is loaded."
            )
        if self.form is not None:
            found.append(
                f"model.path: the weights are {self.form}; they were dequantised as they were loaded, so their memory "
                "and speed are those of dtype."
            )
        return found

    def untrained(self) -> list[str]:
        """What its routers have that neither the checkpoint holds nor calibration fits, as `bias_E`."""
        trained = {id(self.get_parameter(name)) for name in self.trained_biases()}
        layers = [layer for layer in moe_layers(self) if not layer.router.calibrates]
        own = [each for layer in layers for each in layer.router.named_parameters()]
        return sorted({name for name, parameter in own if id(parameter) not in trained})


def without_weights(folder: Path) -> Checkpoint:
    """The model of the checkpoint in `folder` with its native router, on no device: nothing is read but config.json."""
    node = dict(checkpoint_config.read(folder).router)
    target = locate(node.pop("_target_"))

    def make_router(n_experts: int, top_k: int) -> Router:
        router: Router = target(n_experts, top_k, impl="torch", **node)
        return router

    with torch.device("meta"):
        return Checkpoint(
            path=str(folder), make_router=make_router, experts=Loop(), implementation="torch", attention="auto"
        )
