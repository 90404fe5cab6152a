"""Other routes of a token at the same cost, and how likely each makes the token that follows (2605.07260).

The model runs once by its own router. Then for each token t, and n times:

    S_l = what layer l's router selects from its logits plus Gumbel noise: for a softmax a sample of k experts without
          replacement, by their probabilities
    w_l = what it gives to these experts by the logits themselves

in every MoE layer, forced, while all tokens before t keep their own routes: what they left in the cache. So the routes
of one token are compared, and nothing else differs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lab.models.moe_layer import MoELayer, hooked, moe_layers
from moe_lab.models.transformer_decoder import TransformerDecoder
from moe_lab.routers.base import RouteContext, Router, Routing


def require_own_routes(model: nn.Module, phase: str) -> None:
    """Raise `ValueError` unless one token's route can be replaced and nothing else with it."""
    if phase == "decode":
        raise ValueError("--routes: only for tokens of a whole pass; remove workload.phase=decode.")
    for layer in moe_layers(model):
        router, kind = layer.router, type(layer.router).__name__
        if not (router.causal and router.batch_invariant and router.static_k):
            raise ValueError(
                f"--routes: {kind} does not give each token a route of its own with a fixed number of experts; "
                "use router=native."
            )
    assert isinstance(model, TransformerDecoder)
    if model.make_cache(1, 1).in_order:
        raise ValueError("--routes: this model keeps states, whose steps cannot be repeated; record without --routes.")


@torch.inference_mode()
def log_probabilities(model: TransformerDecoder, ids_BS: Tensor, targets_BS: Tensor, n: int, seed: int) -> Tensor:
    """Natural logarithms [B * S, 2 + n], float32.

    Of each token: the largest probability of the next one, that of `targets_BS`, and the latter by each of n routes.

    Args:
        model: see `require_own_routes`.
        ids_BS, targets_BS: int64; the token that follows each.
    """
    B, S = ids_BS.shape
    routes_RS, targets_R = ids_BS.repeat_interleave(n, dim=0), targets_BS.repeat_interleave(n, dim=0)
    cache = model.make_cache(B * n, S)
    generator, sampled = torch.Generator().manual_seed(seed), list[Routing]()

    def sample(layer: MoELayer, arguments: tuple[Tensor, RouteContext], _: object) -> None:
        sampled.append(sampled_routing(layer.router, layer.logits(arguments[0]), arguments[1], generator))

    with hooked(moe_layers(model), sample):
        own_BSV = model(routes_RS, cache=cache).y.view(B, n, S, -1)[:, 0]
    log_own_BSV = own_BSV.log_softmax(-1, dtype=torch.float32)
    own_BS2 = torch.stack([log_own_BSV.amax(-1), log_own_BSV.gather(-1, targets_BS.unsqueeze(-1)).squeeze(-1)], dim=-1)
    others_RS = torch.empty(B * n, S, device=ids_BS.device)
    for t in reversed(range(S)):  # a step overwrites what token t left in the cache, which only later tokens read
        forced = [
            Routing(ids_TK.view(B * n, S, -1)[:, t], weights_TK.view(B * n, S, -1)[:, t])
            for ids_TK, weights_TK, *_ in sampled
        ]
        y_R1V = model(
            routes_RS[:, t : t + 1], forced, cache=cache, position_S=torch.tensor([t], device=ids_BS.device)
        ).y
        log_p_RV = y_R1V[:, 0].log_softmax(-1, dtype=torch.float32)
        others_RS[:, t] = log_p_RV.gather(-1, targets_R[:, t : t + 1]).squeeze(-1)
    others_BSn = others_RS.view(B, n, S).transpose(1, 2)
    return torch.cat([own_BS2, others_BSn], dim=-1).flatten(0, 1)


def sampled_routing(router: Router, logits_TE: Tensor, ctx: RouteContext, generator: torch.Generator) -> Routing:
    """What `router` selects with Gumbel noise, weighed without it.

    Raises:
        ValueError: it cannot weigh experts that were chosen otherwise.
    """
    uniform_TE = torch.rand(logits_TE.shape, generator=generator, dtype=torch.float64)
    gumbel_TE = -(-uniform_TE.clamp(min=1e-300).log()).log()
    noisy = router.select(logits_TE.float() + gumbel_TE.to(logits_TE.device, torch.float32), ctx)
    weights_TK = router.weigh(logits_TE, noisy.expert_ids_TK)
    if weights_TK is None:
        raise ValueError(
            f"--routes: {type(router).__name__}.weigh(logits, ids) must return weights; use router=native."
        )
    return Routing(noisy.expert_ids_TK, weights_TK)
