"""What each router of a decoder would choose before its input is there: the columns ahead and pre_attention of a trace.

    ahead          W_l x_{l-1}, with x_{l-1} what the MLP of the layer before read (Fate, 2502.12224); none in layer 0
    pre_attention  W_l norm_l(h), with h the residual stream before the layer's attention and norm_l the norm of the
                   gate's input: the choice if attention added nothing (2511.10676 fits a predictor to that state)

Experts are ranked as the layer's own router ranks them (`Routing.scores_TE`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.measure.layer_probe import scored_selection
from moe_lab.models.moe_layer import MoELayer
from moe_lab.models.transformer_decoder import Block, TransformerDecoder
from moe_lab.ops.softmax_topk import top_k
from moe_lab.records.trace import Layer, guess_width
from moe_lab.routers.base import RouteContext


class Guesses:
    """Collects the guesses of passes; int32 ids [T, W] layer by layer, -1 where there is none."""

    def __init__(self, model: TransformerDecoder, layers: list[Layer]):
        self._blocks = [block for block in model.layers if isinstance(block, Block)]
        self._widths = {layer.layer: guess_width(layer) for layer in layers}
        self._stream: Tensor | None = None  # before the attention of the present layer
        self._before: Tensor | None = None  # what the MLP of the layer before read
        self._clear()

    def _clear(self) -> None:
        self._kept: dict[int, dict[str, list[Tensor]]] = {
            index: {"ahead": [], "pre_attention": []} for index in self._widths
        }

    def take(self) -> list[dict[str, Tensor]]:
        """By layer and name, since this was last called."""
        found = [{name: torch.cat(p) for name, p in of_layer.items() if p} for of_layer in self._kept.values()]
        self._clear()
        return found

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Inside, every pass adds its guesses."""
        handles: list[Any] = []
        for index, block in enumerate(self._blocks):
            handles.append(block.register_forward_pre_hook(self._at_block))
            handles.append(block.mlp.register_forward_pre_hook(self._at_mlp(index, block)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _at_block(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        x, residual = arguments[:2]  # not what the norm gives: a kernel may do it together with what reads it
        self._stream = x if residual is None else x + residual

    def _at_mlp(self, index: int, block: Block) -> Any:
        def look(mlp: nn.Module, arguments: tuple[Any, ...]) -> None:
            x_TD = arguments[0].flatten(0, -2)
            if isinstance(mlp, MoELayer):
                ctx, kept, W = arguments[1], self._kept[index], self._widths[index]
                assert self._stream is not None
                stream_BSD = self._stream
                normed, _ = block.mlp_norm(torch.zeros_like(stream_BSD), stream_BSD)
                kept["pre_attention"].append(_ranked(mlp, normed.flatten(0, 1), ctx, W))
                if index and self._before is not None:
                    kept["ahead"].append(_ranked(mlp, self._before, ctx, W))
                else:
                    kept["ahead"].append(torch.full((len(x_TD), W), -1, dtype=torch.int32, device=x_TD.device))
            self._before = x_TD

        return look


def _ranked(layer: MoELayer, x_TD: Tensor, ctx: RouteContext, width: int) -> Tensor:
    """The first `width` experts in the order in which the layer's router ranks them for x."""
    routing = scored_selection(layer.router, layer.logits(x_TD), ctx)
    assert routing.scores_TE is not None
    return top_k(routing.scores_TE, width)
