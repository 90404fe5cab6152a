"""transformers' model as a peer of a run, on the run's weights and its cache where both keep the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import StaticLayer

from moe_lab.models import checkpoint_config
from moe_lab.models.checkpoint_forms import AS_IT_IS
from moe_lab.models.checkpoint_names import sources
from moe_lab.models.kv_cache import KVCache, LayerCache
from moe_lab.models.parameters import without_storage
from moe_lab.runs.built import Built


def peer_model(built: Built, weights: Mapping[str, Tensor], attention: str) -> Any:
    """transformers' model, on our `weights` where it keeps them all as we do: a second copy may not fit."""
    folder, settings = built.model.folder, {"dtype": built.dtype, "attn_implementation": attention}
    if (lent := same_weights(folder, weights)) is not None:
        config = transformers.AutoConfig.from_pretrained(folder)
        with without_storage(), torch.device(built.device):
            model = transformers.AutoModelForCausalLM.from_config(config, **settings).requires_grad_(False)
        if not model.load_state_dict(lent, strict=False, assign=True).missing_keys:
            return model.eval()
    print("transformers loads its own weights", file=sys.stderr)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).to(built.device).eval()


def same_weights(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Ours by all names that transformers may have for them; None if one of them it does not keep as we do."""
    settings = checkpoint_config.read(folder)
    if settings.interleaved:  # we keep rows of queries and keys in another order
        return None
    if "head.weight" not in weights:  # tied: parameters of a model are listed once
        weights = {**weights, "head.weight": weights["embed.weight"]}
    lent: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layouts = sources(name, tensor.shape, settings.naming)
        keys = [each[0].key for each in layouts if len(each) == 1 and each[0].place == () and each[0].form is AS_IT_IS]
        if not keys:
            return None
        lent |= dict.fromkeys(keys, tensor.detach())  # another object: see `lends` on marks
    return lent


class Peer:
    """transformers' model with one experts implementation, on the ids of a run; it decodes from `context` tokens on."""

    def __init__(self, model: Any, experts: str, built: Built, context: int | None):
        self.model, self.experts, self.ids_BN, self.context = model, experts, built.x, context
        self.cache: Any = None
        self.how = f"{model.config._attn_implementation}, not compiled"
        self.forward: Callable[..., Any] = model
        if context is None:
            return
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=built.x.shape[1])
        interleaved = checkpoint_config.read(built.model.folder).interleaved
        if interleaved or not lends(built.task.cache, self.cache):
            self.model.set_experts_implementation("grouped_mm")  # of the context; batched_mm needs much memory
            model(built.x[:, :context], past_key_values=self.cache, logits_to_keep=1)
        if built.x.is_cuda:
            self.forward = torch.compile(model, mode="reduce-overhead", fullgraph=True)
            self.how = f"{model.config._attn_implementation}, compiled"
        self.token_B1, self.position_1 = built.x[:, :1].clone(), built.x.new_tensor([context])

    def settle(self) -> None:
        """Nothing: there is one way."""

    def begin(self) -> None:
        """Before the steps of a round: choose the experts, and set the cache's counts back, for it counts by itself."""
        self.model.set_experts_implementation(self.experts)
        if self.cache is not None:
            for layer in self.cache.layers:
                if isinstance(layer, StaticLayer):
                    layer.cumulative_length.fill_(self.context)

    def prefill(self) -> Tensor:
        cache = transformers.DynamicCache(config=self.model.config)
        return self.model(self.ids_BN, past_key_values=cache, logits_to_keep=1).logits

    def step(self, at: int) -> Tensor:
        """Decode the token at `at`, the next one."""
        self.token_B1.copy_(self.ids_BN[:, at : at + 1])
        self.position_1.fill_(at)
        if self.ids_BN.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return self.forward(
            self.token_B1, past_key_values=self.cache, position_ids=self.position_1.unsqueeze(0), logits_to_keep=1
        ).logits

    def require_graphs(self) -> None:
        """Raises `ValueError` if what was compiled runs without CUDA graphs, whose launches would then be timed."""
        skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        if self.forward is not self.model and skipped:
            raise ValueError(f"torch.compile left out CUDA graphs ({skipped} times); TORCH_LOGS=perf_hints says why")

    def require_counted(self, length: int) -> None:
        """Raises `ValueError` if the cache counts in another way than `begin` relies on; a full window stands still."""
        counts = {int(layer.cumulative_length) for layer in self.cache.layers if type(layer) is StaticLayer}
        if not counts <= {length}:
            raise ValueError(f"transformers' cache counts {sorted(counts)} positions, not {length}")


def lends(ours: KVCache, theirs: Any) -> bool:
    """Whether `theirs`, a StaticCache, now is our keys and values: a second cache of long contexts may not fit."""
    pairs = list(zip(ours.layers, theirs.layers, strict=True))
    if not all(type(mine) is LayerCache and type(layer) is StaticLayer for mine, layer in pairs):
        return False  # one of the two keeps latents, states, or a window
    for mine, layer in pairs:
        layer.lazy_initialization(mine.k_BHNd[:0], mine.v_BHNd[:0])  # all but the tensors
        layer.batch_size, layer.keys, layer.values = len(mine.k_BHNd), mine.k_BHNd[:], mine.v_BHNd[:]
        for view in (layer.keys, layer.values):  # not ours: what is compiled for a marked tensor is for that one only
            torch._dynamo.mark_static_address(view)
    return True
